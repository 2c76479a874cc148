"""Signing keys: a ring of secrets, of which the first signs and all verify.

Each secret yields one key a purpose (HKDF-SHA-256, RFC 5869), so that what is signed for one purpose is never valid for
another, and a public id, which tells the keys apart without telling anything about them.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Sequence

from deferlib.errors import KeyringError

MIN_BYTES = 16
_REMEDY = "`python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes a good one"


class Key:
    """One secret's derived keys. Its repr shows the id only."""

    __slots__ = ("dispatch", "id", "payload")

    def __init__(self, secret: bytes) -> None:
        self.id = _derive(secret, b"deferlib/key-id/1", 8)
        self.payload = _derive(secret, b"deferlib/payload/1", 32)
        self.dispatch = _derive(secret, b"deferlib/dispatch/1", 32)

    def __repr__(self) -> str:
        return f"<Key {self.id.hex()}>"


class Keyring:
    """The keys a process knows."""

    __slots__ = ("_keys", "signing")

    def __init__(self, ring: Sequence[bytes]) -> None:
        """Derive the keys of the secrets in *ring*; `KeyringError` if there is none, or one is shorter than 16 bytes."""
        if not ring:
            raise KeyringError(f"there is no signing key; {_REMEDY}")
        for number, secret in enumerate(ring, 1):
            if len(secret) < MIN_BYTES:
                raise KeyringError(
                    f"signing key {number} has {len(secret)} bytes, at least {MIN_BYTES} are needed; {_REMEDY}"
                )
        keys = [Key(secret) for secret in ring]
        self.signing = keys[0]
        self._keys = {key.id: key for key in keys}

    def get(self, id: bytes) -> Key | None:
        """Return the key of this id, if the process has it."""
        return self._keys.get(id)

    def ids(self) -> list[bytes]:
        """Return the ids of all keys, the signing one first."""
        return list(self._keys)

    def __repr__(self) -> str:
        return f"<Keyring {', '.join(id.hex() for id in self._keys)}>"


def parse(text: str) -> Keyring:
    """Return the ring of comma- or line-separated *text*.

    Bytes that aren't UTF-8, in a file or the environment, count as they are: Python carries them as surrogates.
    """
    parts = (part.strip() for line in text.splitlines() for part in line.split(","))
    try:
        return Keyring([part.encode("utf-8", "surrogateescape") for part in parts if part])
    except UnicodeEncodeError:  # its text would show the key
        raise KeyringError(f"a signing key has characters that no encoding has; {_REMEDY}") from None


def generate() -> str:
    """Return a new secret: 32 random bytes as text."""
    return secrets.token_urlsafe(32)


def from_file(path: str) -> Keyring:
    """Return the ring of the file at *path*, made with one random key if it isn't there; its mode must be 0600."""
    try:
        if not os.path.exists(path):
            _make(path)
    except OSError as error:
        raise KeyringError(f"{path}: a signing key can't be written: {error.strerror}; set DEFERLIB_KEY") from error
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise KeyringError(f"{path}: others can read the signing keys (mode {mode:04o}); run `chmod 600 {path}`")
            text = file.read()
    except OSError as error:
        raise KeyringError(f"{path}: the signing keys can't be read: {error.strerror}") from error
    try:
        return parse(text)
    except KeyringError as error:
        raise KeyringError(f"{path}: {error}") from None


def _make(path: str) -> None:
    """Write a new key file whole, or leave it to another process that was quicker."""
    folder = os.path.dirname(path) or "."
    draft = f"{path}.new-{os.getpid()}-{secrets.token_hex(4)}"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask took away
            file.write(generate() + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Make the new file's name survive a power cut: without its key no task that it signed could ever run."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _derive(secret: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA-256 without salt, for up to 32 bytes: one block of the expansion."""
    extracted = hmac.digest(bytes(32), secret, hashlib.sha256)
    return hmac.digest(extracted, info + b"\x01", hashlib.sha256)[:length]
