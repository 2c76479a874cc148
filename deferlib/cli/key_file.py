"""A key file as commands change it: under a lock, replaced whole, and never with a key lost that should stay."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import BinaryIO

from deferlib import keys
from deferlib.core.model import Micros
from deferlib.errors import KeyringError

# Above the key that `keys rotate` added, until that signs. No comma, and longer than a key must be: a reader that knows no
# comments takes it for one more key, which nobody signs with; so it never stands above the first key.
_MARK = "# next key: made by `deferlib keys rotate` to verify now and to sign after the next rotate"


class KeyFile:
    """A key file that nobody else changes as long as it is held."""

    def __init__(self, path: str, text: str, stamp: keys.Stamp) -> None:
        self.path = path
        self.text = text
        self.changed: Micros = stamp[0] // 1000

    def replace(self, text: str, expected: Sequence[bytes]) -> None:
        """Put *text* in the file's place, whole or not at all, also in a power cut; `KeyringError` if that can't be done.

        Its keys must be the *expected* ones: what a file says, by whoever wrote it, isn't changed by guessing.
        """
        if keys.split(text) != list(expected):
            raise KeyringError(f"{self.path}: its keys can't be told from its comments; write one key a line, and repeat")
        try:
            self._replace(text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise KeyringError(f"{self.path}: it can't be replaced, and is as it was: {error.strerror}") from error

    def _replace(self, data: bytes) -> None:
        draft = f"{self.path}.new"
        with suppress(FileNotFoundError):
            os.unlink(draft)  # of somebody who was killed with the lock in his hands
        descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            with open(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o600)  # whatever the umask took away
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.replace(draft, self.path)
        except BaseException:
            os.unlink(draft)
            raise
        keys.sync_folder(os.path.dirname(self.path) or ".")


@contextmanager
def locked(path: str) -> Iterator[KeyFile]:
    """Hold the key file at *path*; who comes second waits, and then finds what the first one made of it."""
    path = os.path.realpath(path)  # a link stays one
    with _lock(path):
        stamp, text = keys.read(path)
        keys.ring_of(path, text)
        yield KeyFile(path, text, stamp)


def _lock(path: str) -> BinaryIO:
    """Return the file, open and locked. The lock is the file's own, so one that was replaced meanwhile doesn't count."""
    while True:
        keys.read(path)  # says what is wrong with it
        try:
            file = open(path, "rb")  # noqa: SIM115  # closed by the caller, or below
        except OSError as error:
            raise KeyringError(f"{path}: the signing keys can't be read: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


# --- what is written ------------------------------------------------------------------------------------------------


def next_key(text: str) -> bytes | None:
    """Return the key that the last `rotate` added, if it doesn't sign yet."""
    place = _next(_lines(text))
    return None if place is None else keys.split(_lines(text)[place])[0]


def rotated(text: str, fresh: str) -> tuple[str, list[bytes], bool]:
    """Return the file's next text with its keys, and whether the next key signs now; if there was none, *fresh* is it."""
    lines = _lines(text)
    place = _next(lines)
    if place is None:
        return _text([*lines, _MARK, fresh]), [*keys.split(text), fresh.encode()], False
    [secret] = keys.split(lines[place])
    rest = lines[: place - 1] + lines[place + 1 :]
    return _text([lines[place], *rest]), [secret, *keys.split("\n".join(rest))], True


def without(text: str, id: bytes) -> tuple[str, list[bytes]]:
    """Return the file's text without the key of *id*, and the keys that remain."""
    lines = _lines(text)
    following = _next(lines)
    kept: list[str] = []
    for number, line in enumerate(lines):
        gone = {keys.Key(secret).id for secret in keys.split(line)} == {id}
        if gone and number == following:
            kept.pop()  # its mark
        if not gone:
            kept.append(line)
    return _text(kept), [secret for secret in keys.split(text) if keys.Key(secret).id != id]


def _lines(text: str) -> list[str]:
    """Return comments and keys, each on a line of its own."""
    found = []
    for line in text.splitlines():
        parts = [line] if keys.is_comment(line) else [part.strip() for part in line.split(",")]
        found += [part for part in parts if part]
    return found


def _next(lines: Sequence[str]) -> int | None:
    """Return where the next key stands: right under the mark."""
    for number, line in enumerate(lines[1:], 1):
        if lines[number - 1] == _MARK and not keys.is_comment(line):
            return number
    return None


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
