"""What this machine is, and how fast it is right now."""

from __future__ import annotations

import hmac
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from benchmarks.stage import rate


def machine() -> str:
    """Say how fast this machine is right now, beside the one that the goals were set on."""
    body = bytes(300)
    digest = 1 / rate(20_000, lambda: hmac.digest(b"key", body, "sha256")) * 1e6
    with tempfile.TemporaryFile(dir=Path.cwd()) as file:

        def sync() -> None:
            os.write(file.fileno(), body)
            os.fdatasync(file.fileno())

        synced = 1 / rate(300, sync) * 1e3
    return (
        f"this machine: HMAC-SHA-256 of 300 bytes {digest:.1f} us (goals were set at 1.6), "
        f"fdatasync {synced:.2f} ms (goals: 0.1 to 0.2)"
    )


def described() -> dict[str, str]:
    """Return the machine's parts, for the report."""
    return {
        "cores": str(os.cpu_count()),
        "CPU": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "memory": _memory(),
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": _file_system(),
    }


def _field(path: str, name: str) -> str:
    if not Path(path).exists():
        return ""
    lines = Path(path).read_text(errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


def _file_system() -> str:
    """Return the type and the device of the file system that the stores of the measures are on."""
    done = subprocess.run(["df", "-PT", "."], capture_output=True, text=True)
    fields = done.stdout.splitlines()[-1].split() if done.returncode == 0 else []
    return f"{fields[1]} on {fields[0]}" if len(fields) > 1 else "unknown"
