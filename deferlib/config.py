"""Settings, and the process-wide runtime made of them: store, keys, clock.

A setting comes from, in this order: an argument (of `configure` or a command's flag), the environment (`DEFERLIB_…`),
`[tool.deferlib]` in the project's pyproject.toml, the default.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deferlib import keys, queue_yaml
from deferlib.clock import Clock
from deferlib.context import SYSTEM_CLOCK
from deferlib.core.model import QueueConfig, QueueSource
from deferlib.errors import ConfigError, KeyringError
from deferlib.store import Store

DEFAULT_STORE = "sqlite:///.deferlib/tasks.db"
DEFAULT_APP = "http://127.0.0.1:8080"
_SECRET = "***"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting's value as text or number, and where it came from."""

    name: str
    value: Any
    source: str


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.001 <= value <= 86_400:
        raise ValueError
    return value


def _grace(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86_400:
        raise ValueError
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 < value < 65_536:
        raise ValueError
    return value


def _url(text: str) -> str:
    if not re.match(r"https?://[^/\s?#@]+(/[^\s?#]*)?\Z", text):
        raise ValueError
    return text.rstrip("/")


def _store(text: str) -> str:
    if not text.startswith(("sqlite:///", "postgresql://", "postgres://")):
        raise ValueError
    return text


def _targets(text: str) -> dict[str, str]:
    pairs = [pair.strip() for pair in text.split(",") if pair.strip()]
    targets = {}
    for pair in pairs:
        name, separator, url = pair.partition("=")
        if not separator or not re.match(r"[a-z0-9][a-z0-9.-]*\Z", name):
            raise ValueError
        targets[name] = _url(url)
    return targets


@dataclass(frozen=True, slots=True)
class _Kind:
    parse: Callable[[str], Any]
    default: Any
    allowed: str
    secret: bool = False


SETTINGS: Mapping[str, _Kind] = {
    "store": _Kind(_store, DEFAULT_STORE, "sqlite:///PATH, sqlite:///:memory: or postgresql://…"),
    "key": _Kind(str, None, "signing keys of at least 16 bytes, separated by commas", secret=True),
    "queues": _Kind(str, None, "the path of a queue.yaml"),
    "concurrency": _Kind(_positive_int, None, "a whole number from 1"),
    "app": _Kind(_url, DEFAULT_APP, "http://HOST[:PORT][/PATH]"),
    "targets": _Kind(_targets, {}, "NAME=http://HOST[:PORT], separated by commas"),
    "prefix": _Kind(str, "", "the path prefix that a proxy strips, like /tasks"),
    "lease": _Kind(_seconds, 30.0, "seconds from 0.001 to 86400"),
    "grace": _Kind(_grace, 25.0, "seconds from 0 to 86400"),
    "port": _Kind(_port, None, "a port from 1 to 65535"),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings with their sources; `settings["lease"]` is the value."""

    root: Path
    all: Mapping[str, Setting]

    def __getitem__(self, name: str) -> Any:
        return self.all[name].value

    def shown(self) -> list[Setting]:
        """Return every setting with its secrets masked, for people."""
        return [Setting(name=s.name, value=_masked(s), source=s.source) for s in self.all.values()]


def _masked(setting: Setting) -> Any:
    if setting.value is None:
        return None
    if SETTINGS[setting.name].secret:
        return _SECRET
    if isinstance(setting.value, str):
        return re.sub(r"(://[^/:@]*):[^@/]*@", rf"\1:{_SECRET}@", setting.value)
    return setting.value


def load_settings(given: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Collect the settings; `ConfigError` says which is wrong, where it came from and what is allowed."""
    root = find_root(Path.cwd())
    project = _pyproject(root)
    found = {}
    for name, kind in SETTINGS.items():
        variable = f"DEFERLIB_{name.upper()}"
        if given is not None and given.get(name) is not None:
            value, source = given[name], "argument"
        elif environ.get(variable):
            value, source = environ[variable], variable
        elif name in project:
            value, source = project[name], "pyproject.toml [tool.deferlib]"
        else:
            value, source = kind.default, "default"
        if isinstance(value, str | int | float) and source != "default":
            try:
                value = kind.parse(str(value))
            except ValueError:
                shown = _SECRET if kind.secret else _masked(Setting(name=name, value=value, source=source))
                raise ConfigError(f"setting {name!r} from {source}: {shown!r} is not {kind.allowed}") from None
        found[name] = Setting(name=name, value=value, source=source)
    unknown = sorted(set(project) - set(SETTINGS))
    if unknown:
        raise ConfigError(
            f"pyproject.toml [tool.deferlib]: unknown setting {unknown[0]!r}; known are {', '.join(SETTINGS)}"
        )
    return Settings(root, found)


def find_root(folder: Path) -> Path:
    """Return the project root: the nearest folder with queue.yaml or pyproject.toml, else *folder*."""
    for candidate in (folder, *folder.parents):
        if (candidate / "queue.yaml").is_file() or (candidate / "pyproject.toml").is_file():
            return candidate
    return folder


def _pyproject(root: Path) -> dict[str, Any]:
    path = root / "pyproject.toml"
    if not path.is_file():
        return {}
    import tomllib

    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    table = raw.get("tool", {}).get("deferlib", {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: [tool.deferlib] is a table of settings")
    return table


def connect(dsn: str, root: Path | None = None) -> Store:
    """Return the store that *dsn* names; a relative SQLite path is relative to *root*, the project root."""
    if dsn.startswith("sqlite:///"):
        from deferlib.store.sqlite import MEMORY, SqliteStore

        path = dsn.removeprefix("sqlite:///")
        if not path:
            raise ConfigError(f"store {dsn!r} names no file; use sqlite:///PATH or sqlite:///:memory:")
        return SqliteStore(path if path == MEMORY else str((root or find_root(Path.cwd())) / path))
    if dsn.startswith(("postgresql://", "postgres://")):
        raise ConfigError("the PostgreSQL store isn't available in this version; use sqlite:///PATH")
    raise ConfigError(f"a store is {SETTINGS['store'].allowed}")


@dataclass(slots=True, kw_only=True)
class Runtime:
    """What one process works with: settings, clock, and, opened on first use, store and keys."""

    settings: Settings
    clock: Clock = SYSTEM_CLOCK
    given_queues: list[QueueConfig] | None = None
    given_store: Store | None = None
    _store: Store | None = None
    _ring: keys.Keyring | None = None
    _lock: Any = field(default_factory=threading.Lock)

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
        """The signing keys."""
        if self._ring is None:
            with self._lock:
                if self._ring is None:
                    self._ring = self._keys()
        return self._ring

    def queues(self) -> list[QueueConfig]:
        """Return the configured queues: given ones, else queue.yaml's, else `default` alone; `default` is always there."""
        configs = self.given_queues
        if configs is None:
            path = self.queue_file()
            configs = queue_yaml.read(path) if path is not None else []
        if all(config.name != "default" for config in configs):
            configs = [QueueConfig(name="default"), *configs]
        return configs

    def queue_file(self) -> Path | None:
        """Return the queue.yaml in use, if there is one."""
        named = self.settings["queues"]
        if isinstance(named, str):
            path = self.settings.root / named
            if not path.is_file():
                raise ConfigError(f"setting 'queues' from {self.settings.all['queues'].source}: {path} is not a file")
            return path
        path = self.settings.root / "queue.yaml"
        return path if path.is_file() else None

    def close(self) -> None:
        """Close the store's connections; the runtime opens them again if it is used again."""
        if self._store is not None:
            self._store.close()

    def _open(self) -> Store:
        store = self.given_store or connect(self.settings["store"], self.settings.root)
        store.migrate()
        queues = self.queues()
        with store.read() as tx:
            known = {row.name for row in tx.queues()}
        missing = [config for config in queues if config.name not in known]
        if missing:
            store.run(lambda tx: tx.put_queues(missing, QueueSource.LIBRARY))
        return store

    def _keys(self) -> keys.Keyring:
        setting = self.settings.all["key"]
        if setting.value is not None:
            try:
                return keys.parse(setting.value)
            except KeyringError as error:
                raise KeyringError(f"setting 'key' from {setting.source}: {error}") from None
        dsn = self.settings["store"]
        if dsn == "sqlite:///:memory:" or self.given_store is not None:
            return keys.parse(keys.generate())
        if dsn.startswith("sqlite:///"):
            path = os.path.realpath(self.settings.root / dsn.removeprefix("sqlite:///"))
            return keys.from_file(path + ".key")
        raise KeyringError(
            "a store on PostgreSQL needs DEFERLIB_KEY, the same for every process; "
            "`python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes one"
        )


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


def install(new: Runtime | None) -> Runtime | None:
    """Make *new* the process's runtime (None: from the settings again, on next use); return the former one."""
    global _runtime
    former, _runtime = _runtime, new
    return former


def configure(
    *,
    store: str | Store | None = None,
    key: str | None = None,
    queues: str | Iterable[QueueConfig | Mapping[str, Any]] | None = None,
    app: str | None = None,
    clock: Clock = SYSTEM_CLOCK,
    **settings: Any,
) -> Runtime:
    """Set the process's runtime explicitly; what isn't given still comes from the environment and the project.

    *queues* is a queue.yaml's path, or queues as `QueueConfig` or as the mappings a queue.yaml holds. `ConfigError` for
    an unknown setting or a bad value.
    """
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; known are {', '.join(SETTINGS)}")
    given = {"key": key, "app": app, **settings}
    if isinstance(store, str):
        given["store"] = store
    given_queues = None
    if isinstance(queues, str):
        given["queues"] = queues
    elif queues is not None:
        given_queues = [q if isinstance(q, QueueConfig) else queue_yaml.from_mapping(q, "configure()") for q in queues]
    new = Runtime(
        settings=load_settings(given),
        clock=clock,
        given_queues=given_queues,
        given_store=None if isinstance(store, str) else store,
    )
    with _runtime_lock:
        former = install(new)
    if former is not None:
        former.close()
    return new
