"""queue.yaml: the file of queues, read so that each mistake is told with its line and column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deferlib.core.model import QueueConfig
from deferlib.errors import InvalidQueueError
from deferlib.queue_fields import (
    TOP_KEYS,
    Marked,
    Place,
    from_mapping,
    mapping,
    refuse_twins,
    shown,
    storage_limit,
    yes_or_no,
)

MAX_BYTES = 128 * 1024  # of which nothing takes more than 45 MB to read


class QueueFile(NamedTuple):
    """What a queue.yaml says."""

    queues: Sequence[QueueConfig] = ()
    entries: Sequence[Mapping[str, Any]] = ()  # each queue's as it is written
    places: Sequence[Place] = ()  # of each
    notes: Sequence[str] = ()  # what is in it and has no effect
    resume_paused_queues: bool = False


def read(path: Path) -> QueueFile:
    """Return the queues of the file at *path*; `InvalidQueueError` says where it is wrong and what is allowed."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidQueueError(f"{path}: can't be read: {error.strerror}") from error
    if len(text) > MAX_BYTES:
        raise InvalidQueueError(f"{path}: is larger than {MAX_BYTES // 1024} KiB")
    place = Place(str(path))
    document = _load(text, str(path))
    raw = mapping(document, TOP_KEYS, place.of(document))
    notes = []
    if raw.get("total_storage_limit") is not None:
        storage_limit(raw["total_storage_limit"], place.at(raw, "total_storage_limit"))
        notes.append(f"{place.at(raw, 'total_storage_limit')} isn't enforced")
    resume = raw.get("resume_paused_queues")
    resume = resume is not None and yes_or_no(resume, place.at(raw, "resume_paused_queues"))
    if raw.get("application") is not None and not isinstance(raw["application"], str):
        raise InvalidQueueError(f"{place.at(raw, 'application')}: {shown(raw['application'])}: a name is needed")
    entries = raw.get("queue")
    if entries is None:
        entries = []
    if not isinstance(entries, list):
        raise InvalidQueueError(
            f"{place.at(raw, 'queue', '')}: `queue:` is a list of queues, each beginning with `- name:`"
        )
    at_queues = place.at(raw, "queue", "")
    queues = [from_mapping(entry, at_queues) for entry in entries]
    places = [at_queues.of(entry) for entry in entries]
    refuse_twins(queues, places)
    for queue, entry, at in zip(queues, entries, places, strict=True):
        here = at.at(None, None, f"queue {queue.name!r}")
        if entry.get("acl") is not None:
            notes.append(f"{here.at(entry, 'acl')} isn't enforced")
        notes += (f"{here.at(entry, key)} has no effect on a pull queue" for key in _pushed(entry))
    return QueueFile(queues, entries, places, notes, resume)


def _pushed(entry: Mapping[str, Any]) -> list[str]:
    """Return the keys of a pull queue that mean something for a push queue only."""
    if entry.get("mode") != "pull":
        return []
    return [key for key in ("rate", "bucket_size", "max_concurrent_requests", "target") if entry.get(key) is not None]


def _load(text: bytes, where: str) -> object:
    """Parse YAML without what a list of queues never needs: anchors, aliases, tags, and the same key twice."""
    import yaml  # 15 ms: only where there is a file

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            event = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML leaves it out
            # An alias that repeats its anchor nine times, nine levels deep, is a gigabyte ("billion laughs").
            if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
                raise yaml.MarkedYAMLError(None, None, "anchors and aliases aren't allowed", event.start_mark)
            if event.tag is not None:
                raise yaml.MarkedYAMLError(None, None, "tags (!) aren't allowed", event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = set()
            for key, _value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in keys:
                        raise yaml.MarkedYAMLError(None, None, f"{key.value!r} stands there twice", key.start_mark)
                    keys.add(key.value)
            return super().construct_mapping(node, deep)

        def construct_yaml_map(self, node: yaml.MappingNode) -> Any:
            data = Marked()
            data.mark = _mark(node)
            data.marks = {key.value: _mark(value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
            yield data
            data.update(self.construct_mapping(node))

    Loader.add_constructor("tag:yaml.org,2002:map", Loader.construct_yaml_map)
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = Place(where, None if mark is None else (mark.line + 1, mark.column + 1))
        raise InvalidQueueError(f"{place}: is not the YAML of a queue.yaml: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InvalidQueueError(f"{where}: is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InvalidQueueError(f"{where}: is not the YAML of a queue.yaml: it is nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a date or a number that is none
        raise InvalidQueueError(f"{where}: is not YAML: {error}") from None


def _mark(node: Any) -> tuple[int, int]:
    """Return where a node of YAML begins: line and column, from 1."""
    return node.start_mark.line + 1, node.start_mark.column + 1
