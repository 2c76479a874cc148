"""The process-wide runtime, made of the settings: store, keys, queues, clock."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from deferlib import keys, queue_fields, queue_rows, queue_yaml
from deferlib.clock import Clock
from deferlib.context import SYSTEM_CLOCK
from deferlib.core.model import QueueConfig, QueueSource, TaskState
from deferlib.errors import ConfigError, InvalidQueueError, KeyringError
from deferlib.limits import Limits
from deferlib.queue_fields import Place
from deferlib.queue_rows import Applied
from deferlib.queue_yaml import QueueFile
from deferlib.settings import MEMORY_STORE, SETTINGS, Settings, find_root, load_settings, mask, working_directory
from deferlib.store import Store, Tx
from deferlib.targets import Targets

log = logging.getLogger("deferlib.queues")

_ARGUMENTS = Place("configure()")


def sqlite_path(dsn: str, root: Path) -> str | None:
    """Return the file of an SQLite *dsn*, resolved; None for any other store and for one in memory.

    A relative path is relative to *root*, the project root, so that every process finds the same file.
    """
    if not dsn.startswith("sqlite:///") or dsn == MEMORY_STORE:
        return None
    path = dsn.removeprefix("sqlite:///")
    if not path:
        raise ConfigError(f"store {dsn!r} names no file; use sqlite:///PATH or sqlite:///:memory:")
    return os.path.realpath(root / path)


def connect(dsn: str, root: Path | None = None) -> Store:
    """Return the store that *dsn* names; a relative SQLite path is relative to *root*, the project root."""
    if dsn.startswith("sqlite:///"):
        from deferlib.store.sqlite import MEMORY, SqliteStore

        return SqliteStore(sqlite_path(dsn, root or find_root(working_directory())) or MEMORY)
    if dsn.startswith(("postgresql://", "postgres://")):
        raise ConfigError("the PostgreSQL store isn't available in this version; use sqlite:///PATH")
    raise ConfigError(f"a store is {SETTINGS['store'].allowed}")


class Runtime:
    """What one process works with: settings, clock, and, opened on first use, store and keys."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock = SYSTEM_CLOCK,
        given_queues: list[QueueConfig] | None = None,
        given_store: Store | None = None,
    ) -> None:
        self.settings = settings
        self.limits: Limits = settings["limits"]
        self.deadline_margin: float | None = settings["deadline_margin"]
        self.targets: Targets = settings["targets"]
        self.clock = clock
        self.statistics: dict[tuple[str, ...], Any] = {}  # what was last read of which queues; `taskqueue.statistics`' own
        self.given_queues = given_queues
        self.given_store = given_store
        self.look_at = 0.0  # when an adder asks again whether an engine serves the store, by the monotonic clock
        self._store: Store | None = None
        self._ring: keys.Keyring | None = None
        self._lock = threading.Lock()

    @property
    def opened(self) -> bool:
        """Whether its store or its keys have been used."""
        return self._store is not None or self._ring is not None

    @property
    def store(self) -> Store:
        """The store, opened, migrated and with every configured queue in it."""
        if self._store is None:
            with self._lock:
                if self._store is None:
                    self._store = self._open()
        return self._store

    @property
    def ring(self) -> keys.Keyring:
        """The signing keys; those of a file follow it."""
        if self._ring is None:
            self._refuse_new_key()
            with self._lock:
                if self._ring is None:
                    self._ring = self._keys()
        return self._ring

    @property
    def store_name(self) -> str:
        """Which store this is, the same in every process of the machine that works on it; passwords masked."""
        path = self.store_path
        return str(self.settings.all["store"].shown) if path is None else f"sqlite:///{path}"

    @property
    def store_path(self) -> str | None:
        """The file of an SQLite store, resolved; None for a store in memory and for any other."""
        if self.given_store is None:
            return sqlite_path(self.settings["store"], self.settings.root)
        path = getattr(self.given_store, "path", None)  # a store of another kind than ours may have none
        return None if path == ":memory:" else path

    def queues(self) -> list[QueueConfig]:
        """Return the configured queues: given ones, else queue.yaml's, else `default` alone; `default` is always there."""
        return list(self.read_queues().queues)

    def read_queues(self) -> QueueFile:
        """Return the configured queues as a file has them, with `default` first if it isn't among them."""
        if self.given_queues is not None:
            queues = self.given_queues
            entries = [queue_fields.to_mapping(queue) for queue in queues]
            file = QueueFile(queues, entries, [_ARGUMENTS] * len(queues))
        else:
            path = self.queue_file()
            file = QueueFile() if path is None else queue_yaml.read(path)
        for queue, place in zip(file.queues, file.places, strict=True):
            queue_fields.check(queue, self.limits, place)
        if all(queue.name != "default" for queue in file.queues):
            default = QueueConfig(name="default")
            file = file._replace(queues=[default, *file.queues], entries=[{"name": "default"}, *file.entries])
        return file

    def apply_queues(self) -> Applied:
        """Read the configured queues, as an engine does it, and make the store's rows what they say.

        Those that have left queue.yaml (or `configure`) are disabled; without either, nobody says what has left.
        """
        whole = self.given_queues is not None or self.queue_file() is not None
        file = self.read_queues()
        applied = self.store.run(lambda tx: queue_rows.apply(tx, file, whole=whole))
        for note in file.notes:
            log.warning("%s", note)
        if applied.disabled:
            log.warning("these queues have left the configuration, and are disabled: %s", ", ".join(applied.disabled))
        return applied

    def queue_file(self) -> Path | None:
        """Return the queue.yaml in use, if there is one."""
        named = self.settings["queues"]
        if named is None:
            path = self.settings.root / "queue.yaml"
            return path if os.path.isfile(path) else None
        path = self.settings.root / str(named)
        if not os.path.isfile(path):
            raise ConfigError(
                f"setting 'queues' from {self.settings.all['queues'].source}: {mask(str(path))} is not a file"
            )
        return path

    def key_file(self) -> str | None:
        """Return the file that the keys come from; None if they are a setting, or made up for a store in memory."""
        if self.settings["key"] is not None:
            return None
        path = self.store_path
        return None if path is None else f"{path}.key"

    def prefer(self, settings: Settings, names: Collection[str]) -> None:
        """Take the settings *names* from *settings* over what `configure` said: a command's flags come first."""
        self.settings = Settings(settings.root, {**self.settings.all, **{name: settings.all[name] for name in names}})
        self.limits, self.targets = self.settings["limits"], self.settings["targets"]
        self.deadline_margin = self.settings["deadline_margin"]
        if "queues" in names:
            self.given_queues = None
        if "store" in names:
            self.close()
            self.given_store = self._store = self._ring = None
            self.statistics.clear()

    def close(self) -> None:
        """Close the connections of the store that this runtime opened; it opens them again if it is used again.

        A store that `configure` was given belongs to whoever made it.
        """
        if self._store is not None and self._store is not self.given_store:
            self._store.close()

    def _open(self) -> Store:
        problem: InvalidQueueError | None = None
        try:
            queues = self.queues()  # first: a mistake in queue.yaml shall not leave a new store behind
        except InvalidQueueError as error:
            path = self.store_path
            if path is None or not os.path.exists(path):
                raise
            queues, problem = [], error
        store = self.given_store or connect(self.settings["store"], self.settings.root)
        try:
            store.migrate()
            with store.read() as tx:
                known = {row.name for row in tx.queues()}
            if problem is not None:
                if not known:
                    raise problem
                log.error("queue.yaml isn't applied, and the queues are as they were: %s", problem)
            missing = [config for config in queues if config.name not in known]
            if missing:
                store.run(lambda tx: tx.put_queues(missing, QueueSource.LIBRARY))
        except BaseException:
            if store is not self.given_store:
                store.close()
            raise
        return store

    def _refuse_new_key(self) -> None:
        """Raise `KeyringError` if the key file is gone with whose key tasks in the store were signed.

        A new one would be taken up by every process that runs, and none of them could run those tasks any more.
        """
        file, path = self.key_file(), self.store_path
        if file is None or os.path.exists(file) or path is None or not os.path.exists(path):
            return
        with self.store.read() as tx:
            signed = any(_signed(tx, state) for state in TaskState)
        if signed:
            raise KeyringError(
                f"{file} is gone, and tasks in the store were signed with its key: bring it back, or set DEFERLIB_KEY. If "
                f"it is lost for good, `(umask 077; deferlib keys new > {file})` makes another one, and those tasks become "
                "dead letters"
            )

    def _keys(self) -> keys.Keyring:
        setting = self.settings.all["key"]
        if setting.value is not None:
            try:
                return keys.parse(setting.value)
            except KeyringError as error:
                raise KeyringError(f"setting 'key' from {setting.source}: {error}") from None
        path = self.key_file()
        if path is not None:
            return keys.from_file(path)
        if self.given_store is not None or self.settings["store"] == MEMORY_STORE:
            return keys.parse(keys.generate())
        raise KeyringError(
            "a store on PostgreSQL needs DEFERLIB_KEY, the same for every process; `deferlib keys new` makes one"
        )


def _signed(tx: Tx, state: TaskState) -> bool:
    """Tell whether any task of *state* was signed."""
    last: int | None = -1
    while last is not None:
        counts, last = tx.signed(last, 1_000, state)
        if counts:
            return True
    return False


_runtime: Runtime | None = None
_runtime_lock = threading.Lock()


def runtime() -> Runtime:
    """Return the process's runtime, made from the settings on first use."""
    if _runtime is None:
        with _runtime_lock:
            if _runtime is None:
                install(Runtime(settings=load_settings()))
    assert _runtime is not None
    return _runtime


def is_current(runtime: Runtime) -> bool:
    """Tell whether *runtime* is still the process's."""
    return runtime is _runtime


def install(new: Runtime | None) -> Runtime | None:
    """Make *new* the process's runtime (None: from the settings again, on next use); return the former one."""
    global _runtime
    former, _runtime = _runtime, new
    return former


def configure(
    *,
    store: str | Store | None = None,
    key: str | None = None,
    queues: str | os.PathLike[str] | Iterable[QueueConfig | Mapping[str, Any]] | None = None,
    app: str | None = None,
    clock: Clock = SYSTEM_CLOCK,
    **settings: Any,
) -> Runtime:
    """Set the process's runtime explicitly; what isn't given still comes from the environment and the project.

    *store* is a DSN (`sqlite:///PATH`) or a `Store`, *key* as `DEFERLIB_KEY`, *app* the base URL where the app is served,
    *queues* a queue.yaml's path, or queues as `QueueConfig` or as the mappings a queue.yaml holds; *clock* is for tests,
    and other *settings* go by their names. `ConfigError` for an unknown setting or a bad value.
    """
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; known are {', '.join(SETTINGS)}")
    given = {"key": key, "app": app, **settings}
    given_store = None
    if store is None or isinstance(store, str) or not hasattr(store, "begin"):
        given["store"] = store
    else:
        given_store = store
    given_queues = None
    if isinstance(queues, Iterable) and not isinstance(queues, str | Mapping):
        given_queues = [q if isinstance(q, QueueConfig) else queue_fields.from_mapping(q, _ARGUMENTS) for q in queues]
        queue_fields.refuse_twins(given_queues, [_ARGUMENTS] * len(given_queues))
    else:
        given["queues"] = queues
    new = Runtime(settings=load_settings(given), clock=clock, given_queues=given_queues, given_store=given_store)
    with _runtime_lock:
        former = install(new)
    if former is not None:
        former.close()
    return new


def _after_fork() -> None:
    """Replace the locks: another thread may have held one, and in the child nobody would ever release it."""
    global _runtime_lock
    _runtime_lock = threading.Lock()
    if _runtime is not None:
        _runtime._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
