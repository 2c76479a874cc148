"""What `deferlib doctor` looks at, one function a question; each yields what it found."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from deferlib import config, owners
from deferlib.cli.key_use import used
from deferlib.cli.probe import Answer, ask
from deferlib.cli.settings import unknown_hint, unknown_variables
from deferlib.cli.show import count, rough
from deferlib.cli.store import listed
from deferlib.core.model import MINUTE, SECOND, Micros, Mode, Page, QueueConfig, QueueRow, QueueStats
from deferlib.errors import Error
from deferlib.keys import Keyring
from deferlib.store import Store
from deferlib.taskqueue.unserved import oldest_due

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"
_SAMPLE = 1000  # tasks of a queue that are looked at
_LOW_DISK = 200 * 1024 * 1024
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "fuse.sshfs", "fuse.glusterfs"})
_DEPTH = 3  # folders below the project root in which another store is looked for


class Finding(NamedTuple):
    """One thing that was looked at."""

    level: str
    subject: str
    text: str


class Case:
    """What the checks share: the runtime, and what the store says."""

    def __init__(self, runtime: config.Runtime) -> None:
        self.runtime = runtime
        self.settings = runtime.settings
        self.path = config.sqlite_path(self.settings["store"], self.settings.root)
        self.store: Store | None = None
        self.ring: Keyring | None = None
        self.queues: list[QueueRow] = []
        self.stats: list[QueueStats] = []
        self.served = False
        self.now: Micros = runtime.clock.now()


def check(runtime: config.Runtime) -> Iterator[Finding]:
    """Look at everything, in order; what a missing store makes pointless is left out."""
    case = Case(runtime)
    try:
        yield from _settings(case)
        yield from _store(case)
        yield from _key(case)
        yield from _other_stores(case)
        if case.store is not None:
            yield from _queues(case)
            yield from _failing(case, case.store)
            yield from _engine(case)
        if case.ring is not None:
            yield from _apps(case)
    finally:
        if case.store is not None:
            case.store.close()


# --- here -----------------------------------------------------------------------------------------------------------


def _settings(case: Case) -> Iterator[Finding]:
    queue_file = case.runtime.queue_file()
    file = case.runtime.read_queues()  # a mistake in queue.yaml ends the command, as it would end an engine
    queues = file.queues
    where = (
        f"{queue_file} with {count(len(queues), 'queue')}"
        if queue_file is not None
        else "no queue.yaml: one queue, default"
    )
    yield Finding(OK, "settings", f"project root {case.settings.root}; {where}")
    for note in file.notes:
        yield Finding(NOTE, "settings", note)
    for name in unknown_variables():
        yield Finding(WARNING, "settings", unknown_hint(name))


def _store(case: Case) -> Iterator[Finding]:
    shown = case.runtime.store_name
    if case.path is None and case.settings["store"].startswith("sqlite:"):
        yield Finding(NOTE, "store", "in memory: every process has its own, and no command can look at it")
        return
    if case.path is not None and not os.path.exists(case.path):
        yield Finding(
            WARNING, "store", f"{shown} is not there: is this the folder where the app runs? Run the doctor there, or name "
            "the store with --store. (If nothing was deferred yet: the first defer() makes it, or an engine.)"
        )  # fmt: skip
        return
    store = config.connect(case.settings["store"], case.settings.root)
    try:
        store.migrate()
        with store.read() as tx:
            case.queues = tx.queues()
            case.stats = tx.stats(case.now, [row.name for row in case.queues])
        case.served = store.served()
    except Error as error:
        store.close()
        yield Finding(PROBLEM, "store", str(error))
        return
    case.store = store
    tasks, dead = sum(each.tasks for each in case.stats), sum(each.dead for each in case.stats)
    yield Finding(OK, "store", f"{shown}: {count(tasks, 'task')}, {count(dead, 'dead letter')}")
    if case.path is not None:
        yield from _disk(case.path)
        yield from _permissions(case.path)


def _disk(path: str) -> Iterator[Finding]:
    kind = _file_system(path)
    if kind in _NETWORK:
        yield Finding(
            PROBLEM,
            "store",
            f"it lies on a network file system ({kind}), where SQLite's locks don't hold; use a local disk",
        )
    disk = os.statvfs(path)
    free = disk.f_bavail * disk.f_frsize
    if free < _LOW_DISK:
        yield Finding(WARNING, "store", f"only {free // 2**20:,} MB are free on its disk; a full one takes no more tasks")


def _permissions(path: str) -> Iterator[Finding]:
    """Tell of what others on this machine can read or write. A key file that is in use is told of with the key."""
    for name in (path, f"{path}-wal", f"{path}-shm", f"{path}.key"):
        with suppress(FileNotFoundError):
            mode = stat.S_IMODE(os.stat(name).st_mode)
            if mode & 0o066:
                can = "write" if mode & 0o022 else "read"
                yield Finding(
                    PROBLEM if mode & 0o002 else WARNING, "store", f"others can {can} {name} (mode {mode:04o}); run "
                    f"`chmod 600 {name}`"
                )  # fmt: skip
    folder = os.path.dirname(path)
    why = owners.replaceable(folder)
    if why:
        yield Finding(PROBLEM, "store", f"others could put a file of theirs in the place of {path}: {why}")
    elif os.stat(folder).st_mode & 0o002:
        yield Finding(
            WARNING, "store", f"others can put files beside {path}, such as the log that SQLite looks for there; keep it "
            "in a folder of your own"
        )  # fmt: skip


def _file_system(path: str) -> str:
    """Return the kind of the file system that *path* is on; '' where the system doesn't tell."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    mounts = [line.split(" ")[1:3] for line in lines if line.count(" ") >= 3]
    fitting = [(place, kind) for place, kind in mounts if f"{path}/".startswith(place.rstrip("/") + "/")]
    return max(fitting, key=lambda mount: len(mount[0]), default=("", ""))[1]


def _key(case: Case) -> Iterator[Finding]:
    file = case.runtime.key_file()
    if file is not None and not os.path.exists(file):
        if any(each.tasks or each.dead for each in case.stats):
            yield Finding(PROBLEM, "key", f"{file} is gone: what the store holds can't be verified any more; bring it back")
        else:
            yield Finding(NOTE, "key", f"{file} is not there yet; the first defer() makes it, or an engine")
        return
    if file is None and case.settings["key"] is None:  # in memory: every process makes its own key up
        return
    try:
        case.ring = case.runtime.ring
    except Error as error:
        yield Finding(PROBLEM, "key", str(error))
        return
    foreign = _foreign_keys(case.store, case.ring) if case.store is not None else []
    where = file or f"from {case.settings.all['key'].source}"
    if foreign:
        yield Finding(
            PROBLEM, "key", f"{where}: tasks in the store were signed with {listed(foreign)}, which isn't among "
            "the keys here; add it after the first one"
        )  # fmt: skip
    else:
        yield Finding(OK, "key", f"{where}: {count(len(case.ring.ids()), 'key')}")


def _foreign_keys(store: Store, ring: Keyring) -> list[str]:
    """Return the keys of tasks in the store that aren't in *ring* (0.3 s for a million tasks)."""
    with store.read() as tx:
        return [f"key {id.hex()}" for id in used(tx) if ring.get(id) is None]


def _other_stores(case: Case) -> Iterator[Finding]:
    """Look for stores that were made by a process that was started in another folder."""
    if case.path is None:
        return
    root = case.settings.root
    places = [folder / ".deferlib" / "tasks.db" for folder in root.parents]
    for depth in range(_DEPTH + 1):
        places += root.glob(f"{'*/' * depth}.deferlib/tasks.db")
    for path in sorted({os.path.realpath(place) for place in places if os.path.isfile(place)} - {case.path}):
        tasks = _tasks_in(path)
        level = WARNING if tasks else NOTE
        yield Finding(
            level, "store", f"there is another one, {path}, with {count(tasks, 'task')}: a process started in another "
            "folder takes another store; set DEFERLIB_STORE, or have a pyproject.toml in the project's root"
        )  # fmt: skip


def _tasks_in(path: str) -> int:
    try:
        store = config.connect(f"sqlite:///{path}")
        try:
            with store.read() as tx:
                return sum(each.tasks for each in tx.stats(0, [row.name for row in tx.queues()]))
        finally:
            store.close()
    except Error:
        return 0


# --- queues and engine ----------------------------------------------------------------------------------------------


def _queues(case: Case) -> Iterator[Finding]:
    targets = case.runtime.targets
    waiting = {each.queue: each.tasks for each in case.stats}
    for row in case.queues:
        target, retry = row.config.target, row.config.retry
        if row.disabled and waiting.get(row.name):
            yield Finding(
                WARNING, f"queue {row.name}", f"has left queue.yaml, and {count(waiting[row.name], 'task')} of it wait; "
                f"put it back, or `deferlib queues purge {row.name}`"
            )  # fmt: skip
        if None not in (retry.retry_limit, retry.age_limit) and not retry.first_limit_wins:
            yield Finding(
                WARNING, f"queue {row.name}", "has both retry limits: a task is given up only when both are exceeded; "
                "`deferlib: first_limit_wins: true` gives it up at the first"
            )  # fmt: skip
        if target and targets.get(target) is None:
            yield Finding(
                PROBLEM, f"queue {row.name}", f"its target {target!r} is unknown, so nothing of it is pushed; set "
                f"DEFERLIB_TARGETS={target}=http://HOST:PORT"
            )  # fmt: skip
        if row.paused:
            yield Finding(NOTE, f"queue {row.name}", f"is paused; `deferlib queues resume {row.name}`")
    for each in case.stats:
        if each.dead:
            yield Finding(
                NOTE,
                f"queue {each.queue}",
                f"has {count(each.dead, 'dead letter')}; `deferlib tasks list {each.queue} --state dead`",
            )


def _failing(case: Case, store: Store) -> Iterator[Finding]:
    """Tell of tasks that wait because their attempts fail; whatever is wrong, the last error says most of it."""
    with store.read() as tx:
        rows = [
            row
            for queue in case.queues
            for row in tx.tasks(queue.name, Page(limit=_SAMPLE))
            if row.reason and (row.attempts or row.reason.startswith("target"))
        ]
    if rows:
        last = max(rows, key=lambda row: row.eta)
        yield Finding(
            WARNING, "tasks", f"waiting for another attempt: {count(len(rows), 'task')}; the last error: {last.reason} "
            f"(`deferlib tasks show {last.public_name}`)"
        )  # fmt: skip


def _engine(case: Case) -> Iterator[Finding]:
    if case.served:
        yield Finding(OK, "engine", "one serves this store")
        return
    assert case.store is not None
    with case.store.read() as tx:
        due = oldest_due(tx, case.now)
    if due is not None and case.now - due > MINUTE:
        waited = rough(case.now - due)
        text = f"none serves this store, and tasks have been due for {waited}: `deferlib engine`, or `deferlib dev` at work"
        yield Finding(PROBLEM, "engine", text)
    else:
        yield Finding(WARNING, "engine", "none serves this store now: `deferlib engine`, or `deferlib dev` while you work")


# --- apps -----------------------------------------------------------------------------------------------------------


def _apps(case: Case) -> Iterator[Finding]:
    assert case.ring is not None
    default = case.settings.all["app"]
    named = {row.config.target for row in case.queues} - {""}  # what a template stands for isn't known otherwise
    urls = {name: case.runtime.targets.get(name) for name in sorted({*case.runtime.targets.names, *named})}
    for name, url in {"app": default.value, **urls}.items():
        if url is None:  # told with its queue
            continue
        subject = name if name == "app" else f"target {name}"
        answer = ask(url, case.ring, case.runtime.clock)
        if answer.report is not None:
            yield Finding(
                OK, subject, f"{url} answers in {answer.milliseconds:.0f} ms, has the handler, and has the same key"
            )
            yield from _server(case, subject, answer.report)
        else:
            yield _unwell(subject, url, answer, chosen=name != "app" or default.source != "default")


def _unwell(subject: str, url: str, answer: Answer, *, chosen: bool) -> Finding:
    if answer.unreachable and not chosen:
        text = (
            f"{url} {answer.problem}; that is fine if an engine calls the app itself (--app). Else start the app, or say "
            "with DEFERLIB_APP where it is served"
        )
        return Finding(WARNING, subject, text)
    return Finding(PROBLEM, subject, f"{url} {answer.problem}")


def _server(case: Case, subject: str, report: dict[str, Any]) -> Iterator[Finding]:
    """Judge what an app says of its process."""
    here = case.runtime.store_name
    if report.get("store") != here:
        yield Finding(
            PROBLEM, subject, f"it works on another store, {report.get('store')} (in {report.get('folder')}); here it is "
            f"{here}. Set DEFERLIB_STORE to the same for both"
        )  # fmt: skip
    gunicorn = report.get("gunicorn")
    if gunicorn is not None:
        yield from _gunicorn(case, subject, gunicorn)
    elif report.get("threads") is False and report.get("processes") is False:
        yield Finding(WARNING, subject, _WAITS_FOR_ITSELF.format(report.get("server") or "its server", "more threads"))


_WAITS_FOR_ITSELF = (
    "{} serves one request at a time: while it runs a call nobody else is served, and a call that requests the app's own "
    "pages waits for itself; give it {}"
)


def _gunicorn(case: Case, subject: str, settings: object) -> Iterator[Finding]:
    match settings:
        case {"kind": "sync", "threads": 1, "workers": int(workers), "timeout": int() | float() as timeout}:
            pass
        case _:  # with threads, gunicorn takes gthread; what another version says may be anything
            return
    if workers == 1:
        yield Finding(WARNING, subject, _WAITS_FOR_ITSELF.format("gunicorn with one sync worker", "--threads 8"))
    pushed = [row.config for row in case.queues if row.config.mode is Mode.PUSH] or [QueueConfig(name="default")]
    here = "" if subject == "app" else subject.removeprefix("target ")
    deadlines = {queue.name: queue.deadline / SECOND for queue in pushed if queue.target == here}
    longer = [name for name, deadline in deadlines.items() if 0 < timeout < deadline]
    if longer:
        longest = max(deadlines[name] for name in longer)
        yield Finding(
            WARNING, subject, f"gunicorn kills a sync worker after {timeout:g} s, but calls of {listed(longer)} may take "
            f"{longest:g} s: give it --timeout {longest + 60:g}, or --threads 8 (whose timeout isn't a request's)"
        )  # fmt: skip
    concurrency = case.settings["concurrency"] or 32
    if concurrency >= workers > 1:
        yield Finding(
            NOTE, subject, f"an engine pushes up to {concurrency} calls at once to {workers} sync workers, which then "
            f"serve nobody else; set DEFERLIB_CONCURRENCY={workers - 1}, or give gunicorn --threads"
        )  # fmt: skip
