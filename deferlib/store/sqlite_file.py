"""The SQLite file itself: made whole or not at all, recognised, refused when it isn't ours, and its errors translated."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator

import apsw

from deferlib import errors
from deferlib.store import queries

APPLICATION_ID = 0x44_65_66_72  # "Defr", in the file's header
SCHEMA = max(queries.migrations("sqlite"))
_PAGE = 4096  # bytes
_SPARE = 8  # times what the log takes: with less room on the disk it isn't made larger than it must be
_CACHED = 600  # pages: SQLite's cache of 2 MB, and some
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the user's quota, the process's limit


def create(path: str) -> None:
    """Make the file with its schema if there is none.

    It is made under another name and linked into place, so that a crash or a race never leaves an empty file: an empty
    file is always somebody else's mistake, and is refused instead of being filled (`check_file`).
    """
    if os.path.exists(path):
        return
    folder = os.path.dirname(path)
    draft = f"{path}.new-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        _make_folder(folder)
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            _fill(draft)
            with contextlib.suppress(FileExistsError):  # another process was quicker: its file serves as well
                os.link(draft, path)
            _sync_folder(folder)
        finally:
            os.unlink(draft)
    except OSError as error:
        if error.errno in _FULL:
            raise errors.StoreFullError(f"{path}: the disk is full; nothing was made. Free some space") from error
        raise errors.StoreUnavailableError(
            f"{path}: can't be created: {error.strerror}. Make its folder writable, or name another store "
            "with DEFERLIB_STORE"
        ) from error


def _make_folder(folder: str) -> None:
    """Make *folder* and those above it, each 0700: who can rename a folder above ours could put another in its place."""
    if not os.path.isdir(folder):
        _make_folder(os.path.dirname(folder))
        with contextlib.suppress(FileExistsError):  # another process was quicker, or it is a file: what follows will tell
            os.mkdir(folder, 0o700)


def _fill(path: str) -> None:
    connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.pragma("page_size", _PAGE)
        connection.pragma("application_id", APPLICATION_ID)
        with connection:
            upgrade(connection, 0)
        connection.pragma("journal_mode", "wal")
    finally:
        connection.close()


def upgrade(connection: apsw.Connection, version: int) -> None:
    """Bring the schema from *version* (0: nothing there) to ours."""
    for later, sql in sorted(queries.migrations("sqlite").items()):
        if later > version:
            connection.execute(sql)
    connection.pragma("user_version", SCHEMA)


def migrate(connection: apsw.Connection) -> None:
    """Bring an older file's schema to this version, whole or not at all; a newer one is left as it is."""
    if connection.pragma("user_version") >= SCHEMA:
        return
    connection.execute("begin immediate")
    try:
        version = connection.pragma("user_version")  # again: another process, perhaps a newer one, may have been quicker
        if version < SCHEMA:
            upgrade(connection, version)
        connection.execute("commit")
    finally:
        if connection.in_transaction:
            connection.execute("rollback")


def extend_log(path: str, connection: apsw.Connection, pages: int) -> None:
    """Give the write-ahead log room for *pages* at once, so that no commit has to make it grow.

    By pages that are rolled back: there are more of them than a cache holds, so most are written into the log, where what
    is written next takes their place. It is for speed only: where the disk has little room, the log grows as it must, and
    it does after a fork of the only process, which closes it.
    """
    log = f"{path}-wal"
    if _size(log) >= pages * _PAGE:
        return
    with contextlib.suppress(apsw.Error, OSError):
        disk = os.statvfs(os.path.dirname(path))
        if disk.f_bavail * disk.f_frsize < _SPARE * pages * _PAGE:
            return
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)  # what it holds has its place in the file, then
        try:
            connection.execute("begin immediate; create table filler (bytes blob) strict")
            connection.execute("insert into filler values (zeroblob(?))", [(pages + _CACHED) * _PAGE])
        except (apsw.FullError, apsw.IOError):  # a quota is an IOError
            if connection.in_transaction:
                connection.execute("rollback")
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)  # gives the room back
        finally:
            if connection.in_transaction:
                connection.execute("rollback")
        descriptor = os.open(log, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # here, rather than in somebody's first commit
        finally:
            os.close(descriptor)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file(path: str, connection: apsw.Connection) -> None:
    """Refuse a file that isn't a sound deferlib store of a version that this one can write, and leave it as it is."""
    if _size(f"{path}-wal"):  # closing the connection of a refused file would write its owner's log into it
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    if _size(path) == 0:
        raise errors.StoreCorruptError(
            f"{path}: is empty, and a store never is. If it held tasks, restore it from a backup; if it didn't, delete "
            "it and a new one is made"
        )
    if connection.pragma("application_id") != APPLICATION_ID:
        raise errors.StoreCorruptError(
            f"{path}: is an SQLite database, but not a deferlib store. Name another file with DEFERLIB_STORE"
        )
    version = connection.pragma("user_version")
    if _min_writer(path, connection) > SCHEMA:
        raise errors.StoreVersionError(
            f"{path}: has schema {version}, this deferlib writes up to {SCHEMA}. Upgrade deferlib, or name another "
            "store with DEFERLIB_STORE"
        )
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
    if connection.pragma("journal_mode") != "wal":
        connection.pragma("journal_mode", "wal")


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _min_writer(path: str, connection: apsw.Connection) -> int:
    try:
        [(value,)] = connection.execute("select value from meta where key = 'min_writer'").fetchall()
        return int(str(value))
    except (apsw.SQLError, ValueError) as error:
        raise errors.StoreCorruptError(f"{path}: its schema version is missing. Restore it from a backup") from error


@contextlib.contextmanager
def translated(path: str) -> Iterator[None]:
    """Turn the driver's errors into ours, with the file's name and the remedy."""
    try:
        yield
    except apsw.Error as error:
        raise translation(path, error) from error


def translation(path: str, error: apsw.Error, code: int = 0) -> errors.StoreError:
    """Return our error for the driver's; *code* is the system's errno, where it is known."""
    if isinstance(error, apsw.FullError) or (isinstance(error, apsw.IOError) and code in _FULL):
        return errors.StoreFullError(f"{path}: the disk is full; nothing was written. Free some space")
    match error:
        case apsw.BusyError():
            return errors.StoreBusyError(
                f"{path}: another process has kept the store locked; nothing was written. Try again, and look for a "
                "long write transaction"
            )
        case apsw.ReadOnlyError():
            return errors.StoreReadOnlyError(
                f"{path}: can't be written to. Give this process write access to the file and its folder"
            )
        case apsw.CorruptError() | apsw.NotADBError():
            return errors.StoreCorruptError(
                f"{path}: is damaged or no database ({error}); it is left untouched. Restore it from a backup"
            )
        case apsw.CantOpenError():
            return errors.StoreUnavailableError(
                f"{path}: can't be opened. Check that the file and its folder can be read and written, or name another "
                "store with DEFERLIB_STORE"
            )
    return errors.StoreError(f"{path}: {type(error).__name__}: {error}")


def definite(error: apsw.Error) -> bool:
    """Tell whether a commit that failed with *error* surely left nothing.

    A write that failed did so before the commit frame was whole, and a checksum covers that frame.
    """
    if isinstance(error, apsw.IOError):
        return bool(error.extendedresult == apsw.SQLITE_IOERR_WRITE)  # type: ignore[attr-defined]  # not in its stubs
    return isinstance(error, apsw.FullError | apsw.BusyError | apsw.ReadOnlyError)


def unsynced(error: Exception) -> bool:
    """Tell whether *error* is that of a failed sync."""
    if isinstance(error, apsw.IOError):
        return bool(error.extendedresult == apsw.SQLITE_IOERR_FSYNC)  # type: ignore[attr-defined]  # not in its stubs
    return False
