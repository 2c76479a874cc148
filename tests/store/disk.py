"""A disk to cut the power of: what SQLite and our own syncs did to a store's files, and what could be left of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import apsw
import pytest

from deferlib.store import sqlite_log

_VFS = "deferlib-recorder"
SECTOR = 512


class Write(NamedTuple):
    """Bytes written to a file, or (None) its length set to the offset."""

    file: str
    offset: int
    data: bytes | None


class Sync(NamedTuple):
    """A sync of a file that has ended; it began when there were *began* events, and covers what was written before."""

    file: str
    began: int


class Promise(NamedTuple):
    """What was said to a caller: from now on it holds, whatever happens."""

    kind: str
    id: int


@dataclass(slots=True)
class Recording:
    """What happened to the files of the database at *path*, in order; at first they were as in *start*."""

    path: str
    start: dict[str, bytes] = field(default_factory=dict)
    events: list[Write | Sync | Promise] = field(default_factory=list)

    def promise(self, kind: str, id: int) -> None:
        self.events.append(Promise(kind, id))

    @contextmanager
    def on(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Record every file of SQLite that is opened in the block, and each sync of ours."""
        for file in (self.path, f"{self.path}-wal"):
            self.start[file] = Path(file).read_bytes() if os.path.exists(file) else b""
        recorder = _Recorder(self)
        flush = sqlite_log.flush

        def recorded(descriptor: int) -> None:
            began = len(self.events)
            flush(descriptor)
            self.events.append(Sync(os.readlink(f"/proc/self/fd/{descriptor}"), began))

        monkeypatch.setattr(sqlite_log, "flush", recorded)
        apsw.set_default_vfs(_VFS)
        try:
            yield
        finally:
            apsw.set_default_vfs("unix")
            monkeypatch.setattr(sqlite_log, "flush", flush)
            recorder.unregister()


class _Recorder(apsw.VFS):
    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        super().__init__(_VFS, "unix")

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        return _File(self._recording, name, flags)


class _File(apsw.VFSFile):
    def __init__(self, recording: Recording, name: Any, flags: list[int]) -> None:
        self._name = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._events = recording.events
        super().__init__("unix", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self._events.append(Write(self._name, offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:
        super().xTruncate(newsize)
        self._events.append(Write(self._name, newsize, None))

    def xSync(self, flags: int) -> None:
        began = len(self._events)
        super().xSync(flags)
        self._events.append(Sync(self._name, began))


class Wreck(NamedTuple):
    """What a power cut could have left: the content of each file, and what was promised until then."""

    files: dict[str, bytes]
    promised: list[Promise]
    how: str


def wrecks(recording: Recording, rng: Random, share: float) -> Iterator[Wreck]:
    """Cut the power after a *share* of the events, and keep none, all and some of what wasn't synced then."""
    synced = {file: bytearray(content) for file, content in recording.start.items()}
    unsynced: list[tuple[int, Write]] = []
    promised: list[Promise] = []
    for place, event in enumerate(recording.events):
        match event:
            case Write():
                unsynced.append((place, event))
            case Promise():
                promised.append(event)
            case Sync(file, began):
                for at, write in unsynced:
                    if write.file == file and at < began:
                        _apply(synced[file], write)
                unsynced = [(at, write) for at, write in unsynced if write.file != file or at >= began]
        if rng.random() < share:
            for how in ("none", "all", "some", "some", "torn", "torn"):
                left = _left(synced, [write for _, write in unsynced], how, rng)
                yield Wreck(left, promised[:], f"{how} of {len(unsynced)} after event {place}")


def _left(synced: dict[str, bytearray], unsynced: list[Write], how: str, rng: Random) -> dict[str, bytes]:
    files = {file: bytearray(content) for file, content in synced.items()}
    chance = {"none": 0.0, "all": 1.0}.get(how) if how in ("none", "all") else rng.choice((0.1, 0.5, 0.9))
    assert chance is not None
    for write in unsynced:
        for part in _sectors(write) if how == "torn" else (write,):
            if rng.random() < chance:
                _apply(files[part.file], part)
    return {file: bytes(content) for file, content in files.items()}


def _sectors(write: Write) -> Iterator[Write]:
    if write.data is None:
        yield write
        return
    at, end = write.offset, write.offset + len(write.data)
    while at < end:
        until = min(at - at % SECTOR + SECTOR, end)
        yield Write(write.file, at, write.data[at - write.offset : until - write.offset])
        at = until


def _apply(content: bytearray, write: Write) -> None:
    end = write.offset + len(write.data or b"")
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    if write.data is None:
        del content[end:]
    else:
        content[write.offset : end] = write.data
