"""`deferlib keys`: new, list, rotate, retire. Ids tell keys apart; a secret is shown only where one must be set by hand."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from deferlib import config, keys
from deferlib.cli.show import count, print_json, print_table, rough, safe
from deferlib.core.model import SECOND, Micros
from deferlib.errors import ConfigError, KeyringError

if TYPE_CHECKING:
    from deferlib.cli.key_file import KeyFile
    from deferlib.cli.key_use import Use
    from deferlib.cli.settings import Commands
    from deferlib.cli.store import Opened

_REFUSED = 1
# A process looks at the file within LOOK_EVERY, and what it signed just before that may wait 10 s for a busy store.
_SETTLED: Micros = round((keys.LOOK_EVERY + 11) * SECOND)
_SIGNS, _VERIFIES, _NEXT, _MISSING = "signs", "verifies", "next", "MISSING"
_PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")

_NEW = """\
It is the only thing that is printed. Whoever has it can run code in your app.

example:
  export DEFERLIB_KEY=$(deferlib keys new)
"""
_LIST = """\
ROLE: the key signs, or only verifies; the next one signs after another
`keys rotate`. MISSING: tasks need it, but it isn't among the keys here; they
can't run until it is back. JSON: source (where the keys come from), file (null
if not from one), keys (id, role, tasks, dead: how many dead letters), missing
(id, tasks, dead).

example:
  deferlib keys list
"""
_ROTATE = """\
Of a key file, the first call adds a new key, which only verifies; the second
one lets it sign. What runs notices both by itself, within a second.
Keys of a setting (DEFERLIB_KEY) can't be changed from here: the values to set
are printed, with what to do between them. They are secrets.
JSON: source, file, step (added, signs, or by-hand), key (the new one's id),
and by hand: first, then (the values).

example:
  deferlib keys rotate
"""
_RETIRE = """\
Refused while anything needs the key: it signs, or is the only one; live tasks
or dead letters were signed with it; or the file was changed so shortly ago that
others may still sign with it. ID is as `keys list` shows it, or its beginning.
Of a setting (DEFERLIB_KEY), it says which key to take out.
JSON: source, file, retired (the id), places (in a setting, from 1; else null).

example:
  deferlib keys retire 5f6db7f7
"""


def add_to(commands: Commands) -> None:
    from deferlib.cli.settings import add_flags
    from deferlib.cli.verbs import add_verb, add_verbs

    parser = commands.add_parser("keys", help="make, list, rotate or retire signing keys", allow_abbrev=False)
    add = partial(add_verb, add_verbs(parser))
    add("new", "print a new signing key", _NEW, new_key)
    listing = add("list", "list the keys with what they signed", _LIST, list_keys)
    rotate = add("rotate", "replace the signing key, in two steps", _ROTATE, rotate_keys)
    retire = add("retire", "take a key away that nothing needs any more", _RETIRE, retire_key)
    retire.add_argument("id", metavar="ID")
    for each in (listing, rotate, retire):
        each.add_argument("--json", action="store_true", help="print one JSON document")
        add_flags(each, ["store"])


class _Keys(NamedTuple):
    """The keys that the settings name, as they stand there."""

    source: str  # for people
    file: str | None  # the key file, if they come from one
    secrets: list[bytes]
    next: bytes | None  # the id of the one that signs after the next rotate

    @property
    def ids(self) -> list[bytes]:
        return list(dict.fromkeys(keys.Key(secret).id for secret in self.secrets))

    def role(self, id: bytes) -> str:
        return _SIGNS if id == self.ids[0] else _NEXT if id == self.next else _VERIFIES

    def document(self, **more: Any) -> dict[str, Any]:
        return {"source": self.source, "file": self.file, **more}


def _keys(runtime: config.Runtime) -> _Keys:
    """Return the keys; none if their file isn't there yet. `KeyringError` if they can't be used."""
    setting = runtime.settings.all["key"]
    if setting.value is not None:
        _ = runtime.ring  # says what is wrong with it
        return _Keys(setting.source, None, keys.split(setting.value), None)
    file = runtime.key_file()
    if file is None:
        raise ConfigError("a store in memory has keys of its own in every process; name another store, or set DEFERLIB_KEY")
    return _of_file(file)


def _of_file(file: str, text: str | None = None) -> _Keys:
    from deferlib.cli.key_file import next_key

    if text is None:
        if not os.path.lexists(file):
            return _Keys(file, file, [], None)
        text = keys.read(file)[1]
    following = next_key(text)
    return _Keys(file, file, keys.ring_of(file, text), None if following is None else keys.Key(following).id)


def _no_file(file: str) -> int:
    return _refuse(f"{file} is not there. If it was, bring it back; else the first defer() makes it, or an engine")


def _refuse(text: str) -> int:
    from deferlib.cli import fail

    fail(text)
    return _REFUSED


# --- new, list ------------------------------------------------------------------------------------------------------


def new_key(arguments: argparse.Namespace) -> int:
    print(keys.generate())
    return 0


def list_keys(arguments: argparse.Namespace) -> int:
    from deferlib.cli.key_use import NO_USE, used
    from deferlib.cli.store import opened

    with opened(arguments) as it:
        found = _keys(config.Runtime(settings=it.settings))
        with it.store.read() as tx:
            uses = used(tx)
    missing = {id: use for id, use in uses.items() if id not in found.ids}
    if arguments.json:
        listed = [{"id": id.hex(), "role": found.role(id), **uses.get(id, NO_USE)._asdict()} for id in found.ids]
        print_json(found.document(keys=listed, missing=[{"id": id.hex(), **use._asdict()} for id, use in missing.items()]))
    else:
        rows = [(id.hex(), found.role(id), *_counts(uses.get(id, NO_USE))) for id in found.ids]
        rows += [(id.hex(), _MISSING, *_counts(use)) for id, use in missing.items()]
        print_table(("KEY", "ROLE", "TASKS", "DEAD LETTERS"), rows)
    _warn(found, missing)
    return 0


def _counts(use: Use) -> tuple[str, str]:
    return f"{use.tasks:,}", f"{use.dead:,}"


def _warn(found: _Keys, missing: Mapping[bytes, Use]) -> None:
    """Tell, on stderr, of what can't run because its key isn't here."""
    for id, use in missing.items():
        remedy = "put it back, after the first one" if found.secrets else f"{found.source} is not there; bring it back"
        text = f"{use} can't run: signed with key {id.hex()}, which isn't among the keys of {found.source}; {remedy}"
        print(f"deferlib: warning: {safe(text)}", file=sys.stderr)


# --- rotate ---------------------------------------------------------------------------------------------------------


def rotate_keys(arguments: argparse.Namespace) -> int:
    from deferlib.cli.key_file import locked, rotated
    from deferlib.cli.settings import settings_of

    found = _keys(config.Runtime(settings=settings_of(arguments)))
    if found.file is None:
        return _rotate_by_hand(found, arguments.json)
    if not found.secrets:
        return _no_file(found.file)
    with locked(found.file) as file:
        text, ring, signs = rotated(file.text, keys.generate())
        former = keys.Key(keys.split(file.text)[0]).id.hex()
        file.replace(text, ring)
    id = keys.Key(ring[0 if signs else -1]).id.hex()
    if arguments.json:
        print_json(found.document(step="signs" if signs else "added", key=id))
    elif signs:
        print(
            f"{safe(found.file)}: key {id} signs from now on; key {former} only verifies. "
            "What runs notices within a second.\n"
            f"When `deferlib keys list` shows nothing that {former} signed: deferlib keys retire {former}"
        )
    else:
        print(
            f"{safe(found.file)}: key {id} was added; it verifies, and doesn't sign yet. "
            "What runs notices within a second.\n"
            "Then let it sign: deferlib keys rotate"
        )
    return 0


def _rotate_by_hand(found: _Keys, as_json: bool) -> int:
    """Print what to set in the place of the keys of a setting: the only output, beside a new key, that holds secrets."""
    fresh = keys.generate()
    ring = [secret.decode("utf-8", "surrogateescape") for secret in found.secrets]
    if not all(secret.isprintable() for secret in ring):
        raise KeyringError(
            f"the keys from {found.source} can't be printed: not all of it is text; add one of `deferlib keys new` by hand"
        )
    first, then = ",".join([*ring, fresh]), ",".join([fresh, *ring])
    id, former = keys.Key(fresh.encode()).id.hex(), found.ids[0].hex()
    if as_json:
        print_json(found.document(step="by-hand", key=id, first=first, then=then))
        return 0
    if len(found.ids) > 1:
        text = f"{found.source} has {len(found.ids)} keys already; if they are being replaced, finish that first"
        print(f"deferlib: warning: {text}", file=sys.stderr)
    print(
        f"The keys come from {found.source}. Set there, one after the other (these are secrets):\n\n"
        f"1. This adds key {id}, which only verifies. Restart all that defers, runs or delivers calls:\n\n"
        f"{_assignment(found, first)}\n\n"
        f"2. Once every process has it, this lets it sign. Restart all of it again:\n\n"
        f"{_assignment(found, then)}\n\n"
        f"3. When `deferlib keys list` shows nothing that {former} signed: deferlib keys retire {former}"
    )
    return 0


def _assignment(found: _Keys, value: str) -> str:
    if found.source.startswith("DEFERLIB_"):
        return f"DEFERLIB_KEY={shlex.quote(value)}"
    return f"key = {json.dumps(value)}"  # a string in TOML as well


# --- retire ---------------------------------------------------------------------------------------------------------


def retire_key(arguments: argparse.Namespace) -> int:
    from deferlib.cli.key_file import locked, without
    from deferlib.cli.store import opened

    with opened(arguments) as it:
        found = _keys(config.Runtime(settings=it.settings))
        if found.file is not None and not found.secrets:
            return _no_file(found.file)
        if found.file is None:
            return _retire_by_hand(arguments, found, it)
        with locked(found.file) as file:
            found = _of_file(found.file, file.text)
            id, problem = _choose(found, arguments.id)
            if problem := problem or _unsettled(file, it.now()) or _needed(it, id):
                return _refuse(problem)
            file.replace(*without(file.text, id))
    if arguments.json:
        print_json(found.document(retired=id.hex(), places=None))
    else:
        print(f"{safe(found.source)}: key {id.hex()} was taken out. What runs forgets it within a second.")
    return 0


def _retire_by_hand(arguments: argparse.Namespace, found: _Keys, it: Opened) -> int:
    """Say which key to take out of a setting, by its place: never by what it is."""
    id, problem = _choose(found, arguments.id)
    if problem := problem or _needed(it, id):
        return _refuse(problem)
    places = [place for place, secret in enumerate(found.secrets, 1) if keys.Key(secret).id == id]
    if arguments.json:
        print_json(found.document(retired=id.hex(), places=places))
        return 0
    named = " and the ".join(_PLACES[place - 1] if place <= len(_PLACES) else f"{place}th" for place in places)
    print(
        f"Nothing in this store needs key {id.hex()}. If every process has been restarted since another key stands first, "
        f"take it out of {found.source}: it is the {named} of {count(len(found.secrets), 'key')} there."
    )
    return 0


def _choose(found: _Keys, prefix: str) -> tuple[bytes, str]:
    """Return the key whose id begins with *prefix*, and what speaks against retiring it, whatever the store holds."""
    ids = [id for id in found.ids if prefix and id.hex().startswith(prefix.lower())]
    if len(ids) != 1:
        known = ", ".join(id.hex() for id in found.ids)
        what = f"{len(ids)} keys begin" if ids else "no key begins"
        return b"", f"{what} with {prefix!r} in {found.source}; known are: {known}"
    [id] = ids
    if len(found.ids) == 1:
        return id, f"key {id.hex()} is the only one in {found.source}; `deferlib keys rotate` adds another"
    if id == found.ids[0]:
        then = "lets the next key sign" if found.next is not None else "adds one that will"
        return id, f"key {id.hex()} signs what is added; `deferlib keys rotate` {then}"
    return id, ""


def _unsettled(file: KeyFile, now: Micros) -> str:
    """Return what speaks against retiring a key in how lately the file was changed; '' for nothing."""
    age = now - file.changed
    if age >= _SETTLED:
        return ""
    if age < 0:
        return f"{file.path} was changed in the future, by this machine's clock; `touch` it, and repeat in 15 s"
    wait = (_SETTLED - age) // SECOND + 1
    return f"{file.path} was changed {rough(age)} ago, and others may still sign with what it was; repeat in {wait} s"


def _needed(it: Opened, id: bytes) -> str:
    """Return what speaks against retiring a key in what the store holds; '' for nothing."""
    from deferlib.cli.key_use import NO_USE, used

    with it.store.read() as tx:
        use = used(tx).get(id, NO_USE)
    if use == NO_USE:
        return ""
    remedies = []
    if use.tasks:
        remedies.append("wait until the tasks have run (`deferlib keys list` counts them)")
    if use.dead:
        remedies.append("retry or delete the dead letters (`deferlib tasks list --state dead`)")
    return f"{use} signed with key {id.hex()} would never run without it; {', and '.join(remedies)}"
