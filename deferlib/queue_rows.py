"""The rows of the queues: what the file says of each, and what commands have put over it until that is cleared.

An engine applies the file, commands override single values of it, and the store keeps both apart (`QueueRow.said`), so that
every value can be shown with its source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from deferlib import queue_fields
from deferlib.core.model import QueueConfig, QueueRow, QueueSource
from deferlib.errors import InvalidQueueError
from deferlib.limits import Limits
from deferlib.queue_fields import Place
from deferlib.queue_yaml import QueueFile
from deferlib.store import Tx

FILE_ERROR = "queue_file_error"  # the note that says why the file isn't applied
_FILE_DIGEST = "queue_file_digest"
_MAPS = frozenset({"retry_parameters", "deferlib"})
_COMMAND = Place("deferlib queues put")

Entry = Mapping[str, Any]  # a queue as a queue.yaml writes it


class Said(NamedTuple):
    """What is said of a queue, in a queue.yaml's words."""

    file: Entry | None = None  # None: it is in no file that was applied
    command: Entry = {}  # noqa: RUF012  # never changed

    def text(self) -> str:
        """Return it as the store keeps it."""
        return json.dumps({"file": self.file, "command": self.command}, separators=(",", ":"), default=str)


class Applied(NamedTuple):
    """What came of a file."""

    disabled: list[str]  # queues that have left it
    resumed: list[str]


def said_of(row: QueueRow | None) -> Said:
    """Return what is said of *row*."""
    if row is None or not row.said:
        return Said()
    raw: dict[str, Any] = json.loads(row.said)
    return Said(raw.get("file"), raw.get("command") or {})


def apply(tx: Tx, file: QueueFile, *, whole: bool) -> Applied:
    """Make the rows what *file* says, under what commands have put; with *whole*, disable those that have left it.

    A disabled queue keeps its tasks, and takes new ones; none is dispatched until it is in the file again.
    `InvalidQueueError` if a command's value contradicts the file's: nothing is changed.
    """
    rows = {row.name: row for row in tx.queues()}
    configs, said = [], {}
    for config, entry in zip(file.queues, file.entries, strict=True):
        command = said_of(rows.get(config.name)).command
        configs.append(queue_fields.from_mapping(merged(entry, command), _COMMAND) if command else config)
        said[config.name] = Said(entry, command).text()
    left = []
    if whole:
        left = [row for row in rows.values() if row.source is QueueSource.FILE and row.name not in said]
    said |= {row.name: row.said for row in left}
    disabled = [row.name for row in left]
    tx.put_note(FILE_ERROR, "")
    tx.put_queues([*configs, *(row.config for row in left)], QueueSource.FILE, said=said, disabled=disabled)
    resumed = _resume(tx, file, rows)
    return Applied([row.name for row in left if not row.disabled], resumed)


def _resume(tx: Tx, file: QueueFile, rows: Mapping[str, QueueRow]) -> list[str]:
    """Resume the paused queues of a file that says so, once for each text of it."""
    text = json.dumps([*file.entries, file.resume_paused_queues], default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if tx.notes().get(_FILE_DIGEST) == digest:
        return []
    tx.put_note(_FILE_DIGEST, digest)
    names = [queue.name for queue in file.queues if queue.name in rows and rows[queue.name].paused]
    if not file.resume_paused_queues or not names:
        return []
    tx.pause(names, False)
    return names


def put(tx: Tx, name: str, changes: Entry, limits: Limits) -> QueueConfig:
    """Put *changes*, in a queue.yaml's words, over what the file says of a queue, or make a new one of them.

    A value of None takes back what was put. `InvalidQueueError` says what is wrong.
    """
    row = next((row for row in tx.queues() if row.name == name), None)
    said = said_of(row)
    command = _cleaned(merged(said.command, changes))
    base = said.file if said.file is not None else {} if row is None else queue_fields.to_mapping(row.config)
    if row is not None and row.source is QueueSource.COMMAND:
        base = {}
    config = queue_fields.from_mapping({**merged(base, command), "name": name}, _COMMAND)
    queue_fields.check(config, limits, _COMMAND)
    if row is not None and config.mode is not row.config.mode:
        raise InvalidQueueError(f"{_COMMAND}: queue {name!r} is a {row.config.mode} queue, and stays one: make another")
    source = row.source if row is not None else QueueSource.COMMAND
    if source is QueueSource.LIBRARY:
        source, said = QueueSource.FILE, Said(base, said.command)
    disabled = [name] if row is not None and row.disabled else []
    tx.put_queues([config], source, said={name: Said(said.file, command).text()}, disabled=disabled)
    return config


def clear(tx: Tx, name: str) -> None:
    """Take back all that commands have put over a queue; one that only a command made stays as it is."""
    for row in tx.queues():
        said = said_of(row)
        if row.name == name and said.file is not None and said.command:
            config = queue_fields.from_mapping(said.file, _COMMAND)
            disabled = [name] if row.disabled else []
            tx.put_queues([config], row.source, said={name: Said(said.file).text()}, disabled=disabled)


def merged(under: Entry, over: Entry) -> dict[str, Any]:
    """Return the entry *under* with the values of *over* in it, key by key also in its maps."""
    result = dict(under)
    for key, value in over.items():
        inner = result.get(key)
        both = key in _MAPS and isinstance(value, Mapping) and isinstance(inner, Mapping)
        result[key] = {**inner, **value} if both and inner is not None else value
    return result


def _cleaned(entry: Entry) -> dict[str, Any]:
    """Return *entry* without what is None."""
    cleaned = {
        key: {name: each for name, each in value.items() if each is not None} if isinstance(value, Mapping) else value
        for key, value in entry.items()
    }
    return {key: value for key, value in cleaned.items() if value is not None and value != {}}


def sources(row: QueueRow) -> dict[str, str]:
    """Return where each value comes from (command, file, settings, default), by its key: `deferlib.jitter`."""
    said = said_of(row)
    command, file = set(_keys(said.command)), set(_keys(said.file or {}))
    unsaid = set(_keys(queue_fields.to_mapping(row.config))) if said.file is None and not command else set()
    found = {}
    for key in queue_fields.ALL_KEYS:
        if key in command:
            found[key] = "command"
        elif key in file:
            found[key] = "file"
        else:
            found[key] = "settings" if key in unsaid else "default"
    return found


def _keys(entry: Entry) -> Iterator[str]:
    for key, value in entry.items():
        if key in _MAPS and isinstance(value, Mapping):
            yield from (f"{key}.{str(name).replace('-', '_')}" for name in value)
        else:
            yield key
