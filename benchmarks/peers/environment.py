"""The peers' own virtual environment, so that the project's stays as it is."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
HOME = ROOT / ".venv" / "peers"
_REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_VERSIONS = """
import importlib.metadata, json
print(json.dumps({each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}))
"""


class Peers(NamedTuple):
    """What could be installed, and why the rest could not."""

    python: str
    versions: dict[str, str]
    missing: dict[str, str]  # by distribution: the reason

    @property
    def site(self) -> Path:
        """Return where the packages are."""
        return next(HOME.glob("lib/python*/site-packages"))

    def program(self, name: str) -> str:
        """Return the path of an installed command."""
        return str(HOME / "bin" / name)


def install() -> Peers:
    """Install what isn't there yet, each requirement by itself: one that fails keeps none of the others away."""
    python = HOME / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(HOME)], check=True)
    missing = {}
    for line in _REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        requirement = line.partition("#")[0].strip()
        if not requirement:
            continue
        name = requirement.partition(">")[0].partition("[")[0]
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [text for text in done.stderr.splitlines() if "ERROR" in text] or ["pip failed"]
            missing[name] = lines[-1].removeprefix("ERROR: ")
        elif time.monotonic() - started > 5:
            print(f"installed {requirement}", flush=True)
    found = subprocess.run([str(python), "-c", _VERSIONS], capture_output=True, text=True, check=True).stdout
    return Peers(str(python), json.loads(found), missing)
