"""Wake-ups between processes on one machine: a Unix datagram to every engine that watches the same file.

Each watcher binds a socket of its own in a folder whose name follows from the store; whoever adds a task sends one empty
datagram to each. A hint only: a full buffer, a stale socket or a foreign folder is ignored, because a slow poll of the
database stands behind it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
import threading
import time

_FRESH_NS = 50_000_000  # a folder's mtime counts in steps of up to 10 ms: within one it may change without showing it


class Hints:
    """The wake-up sockets of the store at *path* (absolute, without links)."""

    def __init__(self, path: str) -> None:
        digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        # Not tempfile.gettempdir(): it writes a file to find out, and raises where the disk is full.
        self._folder = os.path.join(os.environ.get("TMPDIR") or "/tmp", f"deferlib-{os.getuid()}-{digest}")
        self._lock = threading.Lock()
        self._sender: socket.socket | None = None
        self._listed_at = -1  # the folder's mtime when it was listed
        self._peers: list[str] = []
        self._own: set[str] = set()

    def bind(self) -> socket.socket | None:
        """Return a socket that receives the hints, or None where none can be had (then the poll must do)."""
        # Never a name used before: whoever finds a dead process's socket removes it by its name.
        path = os.path.join(self._folder, f"{os.getpid()}-{secrets.token_hex(4)}")
        receiver = self._bound(path) or self._bound(path)  # again: the last watcher may just have removed the folder
        if receiver is None:
            return None
        with self._lock:
            self._own.add(path)
            self._listed_at = -1
        return receiver

    def _bound(self, path: str) -> socket.socket | None:
        with contextlib.suppress(OSError):
            os.mkdir(self._folder, 0o700)
        if not self._trusted():
            return None
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            receiver.bind(path)
        except OSError:  # the path is too long for a socket, say
            receiver.close()
            return None
        return receiver

    def unbind(self, receiver: socket.socket) -> None:
        """Close what `bind` returned and remove its path."""
        path = receiver.getsockname()
        receiver.close()
        with self._lock:
            self._own.discard(path)
        with contextlib.suppress(OSError):
            os.unlink(path)
            os.rmdir(self._folder)  # if it was the last one

    def send(self) -> None:
        """Wake the watchers in other processes. Never blocks, never raises."""
        try:
            mtime = os.stat(self._folder).st_mtime_ns
        except OSError:
            return  # nobody watches
        with self._lock, contextlib.suppress(OSError):
            if mtime != self._listed_at:
                self._list(mtime)
            if self._peers and self._sender is None:
                self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._sender.setblocking(False)
            for path in self._peers:
                self._send_to(path)

    def close(self) -> None:
        """Close the sending socket; a later `send` opens another."""
        with self._lock:
            if self._sender is not None:
                self._sender.close()
                self._sender = None

    def _list(self, mtime: int) -> None:
        self._peers = []
        if self._trusted():
            with os.scandir(self._folder) as entries:
                self._peers = [entry.path for entry in entries if entry.path not in self._own]
        self._listed_at = mtime if time.time_ns() - mtime > _FRESH_NS else -1

    def _send_to(self, path: str) -> None:
        assert self._sender is not None
        try:
            self._sender.sendto(b"", path)
        except BlockingIOError:
            pass  # its buffer is full: it has been woken
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(OSError):
                os.unlink(path)  # its process died; the next listing leaves it out
            self._listed_at = -1
        except OSError:
            pass

    def _trusted(self) -> bool:
        """Tell whether the folder is ours alone: /tmp belongs to everybody."""
        try:
            stat = os.lstat(self._folder)
        except OSError:
            return False
        return stat.st_uid == os.getuid() and stat.st_mode & 0o777 == 0o700
