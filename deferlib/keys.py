"""Signing keys: a ring of secrets, of which the first signs and all verify, and the file that it may be kept in.

Each secret yields one key a purpose (HKDF-SHA-256, RFC 5869), so that what is signed for one purpose is never valid for
another, and a public id, which tells the keys apart without telling anything about them. The ring of a file follows the
file: whoever holds it signs with its first key within a second of a change.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import math
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from functools import lru_cache
from time import monotonic
from typing import NamedTuple

from deferlib import owners
from deferlib.errors import KeyringError

log = logging.getLogger("deferlib.keys")

MIN_BYTES = 16
LOOK_EVERY = 1.0  # seconds between two looks at a key file; a task signed by its former first key is no older than that
_MOST_LOOKS = 100  # in that time, because of keys that aren't known: whoever sends a token may name any
_MOST_BYTES = 64 * 1024  # of a key file
_REMEDY = "`deferlib keys new` makes a good one"

Stamp = tuple[int, int, int]  # what tells a file from what it was: its time of change, its inode, its size
News = Callable[[Stamp | None], "tuple[Stamp, list[bytes]] | None"]  # given the stamp of what is held: what it is now


class Key:
    """One secret's derived keys. Its repr shows the id only."""

    __slots__ = ("dispatch", "id", "payload")

    def __init__(self, secret: bytes) -> None:
        self.id = _derive(secret, b"deferlib/key-id/1", 8)
        self.payload = _derive(secret, b"deferlib/payload/1", 32)
        self.dispatch = _derive(secret, b"deferlib/dispatch/1", 32)

    def __repr__(self) -> str:
        return f"<Key {self.id.hex()}>"


def mac(key: bytes, *parts: bytes) -> bytes:
    """Return the HMAC-SHA-256 (RFC 2104) of *parts*, one after the other.

    By copies of the keyed states: 0.7 µs for 300 bytes; 1.3 with `hmac.HMAC`, whose methods are Python's. `hmac.digest`
    takes 1.4, and gives other threads a turn each time: in a pool that was one switch a call (20,000 a second, now 25,000).
    """
    inner, outer = _keyed(key)
    state, result = inner.copy(), outer.copy()
    for part in parts:
        state.update(part)
    result.update(state.digest())
    return result.digest()


_BLOCK = 64  # bytes, of SHA-256


@lru_cache(64)
def _keyed(key: bytes) -> tuple[hashlib._Hash, hashlib._Hash]:
    """Return the two states that RFC 2104 makes of *key*."""
    if len(key) > _BLOCK:
        key = hashlib.sha256(key).digest()
    padded = key.ljust(_BLOCK, b"\0")
    inner, outer = (hashlib.sha256(bytes(byte ^ pad for byte in padded)) for pad in (0x36, 0x5C))
    return inner, outer


class _Held(NamedTuple):
    """A ring as it was read: swapped as one, so that threads need no lock."""

    signing: Key
    keys: dict[bytes, Key]
    stamp: Stamp | None


class Keyring:
    """The keys a process knows. One of a file looks at it once a second, and at once for a key that it doesn't know."""

    __slots__ = ("_held", "_look_at", "_looks", "_news")

    def __init__(self, ring: Sequence[bytes], news: News | None = None, stamp: Stamp | None = None) -> None:
        """Derive the keys of the secrets in *ring*; `KeyringError` if there is none, or one is shorter than 16 bytes.

        *news* is asked what the ring is now; *stamp* is that of *ring*.
        """
        self._held = _held(ring, stamp)
        self._news = news
        self._look_at = math.inf if news is None else monotonic() + LOOK_EVERY
        self._looks = 0

    @property
    def signing(self) -> Key:
        """The key that signs."""
        if monotonic() >= self._look_at:  # 0.1 µs, as long as there is nothing to look at
            self._look()
        return self._held.signing

    def get(self, id: bytes) -> Key | None:
        """Return the key of this id, if the process has it."""
        if monotonic() >= self._look_at:
            self._look()
        key = self._held.keys.get(id)
        if key is None and self._news is not None and self._looks < _MOST_LOOKS:
            self._looks += 1
            self._read()
            key = self._held.keys.get(id)
        return key

    def ids(self) -> list[bytes]:
        """Return the ids of all keys, the signing one first."""
        if monotonic() >= self._look_at:
            self._look()
        return list(self._held.keys)

    def _look(self) -> None:
        self._look_at, self._looks = monotonic() + LOOK_EVERY, 0
        self._read()

    def _read(self) -> None:
        """Take what the file holds now. Threads may do so at once: what one of them takes too late is read again."""
        assert self._news is not None
        news = self._news(self._held.stamp)
        if news is not None:
            stamp, ring = news
            self._held = _held(ring, stamp)

    def __repr__(self) -> str:
        return f"<Keyring {', '.join(id.hex() for id in self._held.keys)}>"


def _held(ring: Sequence[bytes], stamp: Stamp | None) -> _Held:
    check(ring)
    keys: dict[bytes, Key] = {}
    for secret in ring:
        key = Key(secret)
        keys.setdefault(key.id, key)  # one that stands there twice counts once, at its first place
    return _Held(next(iter(keys.values())), keys, stamp)


def check(ring: Sequence[bytes]) -> None:
    """Raise `KeyringError` if *ring* is empty, or one of its secrets is shorter than 16 bytes."""
    if not ring:
        raise KeyringError(f"there is no signing key; {_REMEDY}")
    for number, secret in enumerate(ring, 1):
        if len(secret) < MIN_BYTES:
            raise KeyringError(f"signing key {number} has {len(secret)} bytes, at least {MIN_BYTES} are needed; {_REMEDY}")


def parse(text: str) -> Keyring:
    """Return the ring of *text*; `KeyringError` as `Keyring` says."""
    return Keyring(split(text))


def split(text: str) -> list[bytes]:
    """Return the secrets in comma- or line-separated *text*, without the comments: lines that begin with `# `.

    Bytes that aren't UTF-8, in a file or the environment, count as they are: Python carries them as surrogates.
    """
    lines = (line for line in text.splitlines() if not is_comment(line))
    parts = (part.strip() for line in lines for part in line.split(","))
    try:
        return [part.encode("utf-8", "surrogateescape") for part in parts if part]
    except UnicodeEncodeError:  # its text would show the key
        raise KeyringError(f"a signing key has characters that no encoding has; {_REMEDY}") from None


def is_comment(line: str) -> bool:
    """Tell whether a line between keys is none itself."""
    return line.startswith("# ") or line.rstrip() == "#"


def generate() -> str:
    """Return a new secret: 32 random bytes as text."""
    return secrets.token_urlsafe(32)


# --- the file -------------------------------------------------------------------------------------------------------


def from_file(path: str) -> Keyring:
    """Return the ring of the file at *path*, made with one random key if it isn't there; `KeyringError` as `read` says.

    The ring follows the file. While that is gone, or wrong, the ring stays what it was, and an error is logged.
    """
    try:
        if not os.path.exists(path):
            _make(path)
    except OSError as error:
        raise KeyringError(f"{path}: a signing key can't be written: {error.strerror}; set DEFERLIB_KEY") from error
    stamp, text = read(path)
    return Keyring(ring_of(path, text), _Follower(path), stamp)


class _Follower:
    """Tells what a key file has become, and logs what is wrong with it, once."""

    __slots__ = ("_path", "_told")

    def __init__(self, path: str) -> None:
        self._path = path
        self._told = ""

    def __call__(self, held: Stamp | None) -> tuple[Stamp, list[bytes]] | None:
        """Return the file's stamp and secrets, None if they are the *held* ones, or can't be used."""
        try:
            if stamp_of(os.stat(self._path)) == held and not self._told:  # 1 µs
                return None
            stamp, text = read(self._path)
            ring = ring_of(self._path, text)
        except (OSError, KeyringError) as error:
            self._tell(error)
            return None
        self._told = ""
        if stamp == held:
            return None
        ids = [Key(secret).id.hex() for secret in ring]
        log.info(
            "%s was changed: key %s signs now, and verifies%s", self._path, ids[0], "".join(f", {id}" for id in ids[1:])
        )
        return stamp, ring

    def _tell(self, error: Exception) -> None:
        gone = isinstance(error, FileNotFoundError)
        text = f"{self._path} is gone; bring it back" if gone else str(error)
        if text != self._told:
            self._told = text
            log.error("the signing keys stay what they were when they were read last, until this process ends: %s", text)


def read(path: str) -> tuple[Stamp, str]:
    """Return the stamp and the text of a key file; `KeyringError` says why it can't be used, and what to do.

    Whoever could have written it knows its keys, and may run code here: so it must be this user's or root's, of mode 0600,
    where nobody else can put another in its place.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise KeyringError(f"{path}: the signing keys can't be read: it is no file; move it away")
            _check_owner(path, found.st_uid)
            mode = stat.S_IMODE(found.st_mode)
            if mode & 0o077:
                raise KeyringError(f"{path}: others can read the signing keys (mode {mode:04o}); run `chmod 600 {path}`")
            _check_place(path)
            data = file.read(_MOST_BYTES + 1)
    except IsADirectoryError as error:
        raise KeyringError(f"{path}: the signing keys can't be read: it is a folder; move it away") from error
    except FileNotFoundError as error:
        raise KeyringError(f"{path}: the signing keys can't be read: {error.strerror}; bring it back") from error
    except PermissionError as error:
        raise KeyringError(f"{path}: the signing keys can't be read: {error.strerror}; {_owner(path)}") from error
    except OSError as error:
        raise KeyringError(f"{path}: the signing keys can't be read: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise KeyringError(f"{path}: it has more than {_MOST_BYTES} bytes, so it is no key file; put the key file there")
    return stamp_of(found), data.decode("utf-8", "surrogateescape")


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe in its place has nobody who writes into it


def _owner(path: str) -> str:
    """Return whose the file is, if that can be said, and so who can read it."""
    with contextlib.suppress(OSError):
        return f"it belongs to {owners.name(os.stat(path).st_uid)}: run this process as the same user"
    return "run this process as the user that it belongs to"


def _check_owner(path: str, uid: int) -> None:
    if not owners.is_trusted(uid):
        whose = owners.name(uid)
        raise KeyringError(
            f"{path}: the signing keys belong to {whose}, not to {owners.trusted()}; run this process as {whose}, or, if "
            f"nobody else knows these keys, `chown {owners.myself()} {path}`"
        )


def _check_place(path: str) -> None:
    """Raise `KeyringError` if others could put a file, or a link, of theirs where the key file is, or will be."""
    for place in {os.path.abspath(path), os.path.realpath(path)}:
        if os.path.islink(place):
            _check_owner(path, os.lstat(place).st_uid)
        why = owners.replaceable(os.path.dirname(place))
        if why:
            raise KeyringError(f"{path}: others could put keys of theirs in its place: {why}")


def ring_of(path: str, text: str) -> list[bytes]:
    """Return the secrets in the *text* of the file at *path*; `KeyringError` if they make no ring."""
    try:
        ring = split(text)
        check(ring)
    except KeyringError as error:
        raise KeyringError(f"{path}: {error}") from None
    return ring


def stamp_of(found: os.stat_result) -> Stamp:
    """Return what tells the file from what it was before it was changed, or replaced."""
    return found.st_mtime_ns, found.st_ino, found.st_size


def _make(path: str) -> None:
    """Write a new key file whole, or leave it to another process that was quicker."""
    folder = os.path.dirname(path) or "."
    draft = f"{path}.new-{os.getpid()}-{secrets.token_hex(4)}"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    _check_place(path)
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
    sync_folder(folder)


def sync_folder(folder: str) -> None:
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
