"""Settings, and the process-wide runtime made of them: store, keys, clock.

A setting comes from, in this order: an argument (of `configure` or a command's flag), the environment (`DEFERLIB_…`),
`[tool.deferlib]` in the project's pyproject.toml, the default.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from deferlib import keys, queue_yaml
from deferlib.clock import Clock
from deferlib.context import SYSTEM_CLOCK
from deferlib.core.model import QueueConfig, QueueSource
from deferlib.errors import ConfigError, KeyringError
from deferlib.store import Store

DEFAULT_STORE = "sqlite:///.deferlib/tasks.db"
DEFAULT_APP = "http://127.0.0.1:8080"
_MEMORY = "sqlite:///:memory:"
_SECRET = "***"


# --- what a setting may be: each parser raises ValueError for what isn't allowed --------------------------------------


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or re.search(r"[\x00-\x1f\x7f]", value):
        raise ValueError
    return value


def _path(value: object) -> str:
    return _text(os.fspath(value) if isinstance(value, os.PathLike) else value)


def _keys(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _whole(least: int, most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, str | int) or not least <= int(value) <= most:
            raise ValueError
        return int(value)

    return parse


def _seconds(least: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not least <= float(value) <= 86_400:
            raise ValueError
        return float(value)

    return parse


def _store(value: object) -> str:
    text = _text(value)
    if not text.startswith(("sqlite:///", "postgresql://", "postgres://")):
        raise ValueError
    return text


def _url(value: object) -> str:
    text = _text(value)
    if not re.match(r"https?://[^/\s?#@]+(/[^\s?#]*)?\Z", text):
        raise ValueError
    parts = urlsplit(text)
    if not parts.hostname or parts.port == 0:  # a port that is none raises ValueError by itself
        raise ValueError
    return text.rstrip("/")


def _targets(value: object) -> dict[str, str]:
    if isinstance(value, str):
        pairs = [tuple(part.strip() for part in pair.partition("=")[::2]) for pair in value.split(",") if pair.strip()]
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        raise ValueError
    targets: dict[str, str] = {}
    for name, url in pairs:
        if not isinstance(name, str) or not queue_yaml.TARGET.match(name) or name in targets:
            raise ValueError
        targets[name] = _url(url)
    return targets


def _prefix(value: object) -> str:
    if value == "":
        return ""
    text = _text(value)
    if not re.match(r"/[^\s?#]*[^\s?#/]\Z", text):
        raise ValueError
    return text


class _Kind(NamedTuple):
    parse: Callable[[object], Any]
    default: Any
    allowed: str
    secret: bool = False


SETTINGS: Mapping[str, _Kind] = {
    "store": _Kind(_store, DEFAULT_STORE, "sqlite:///PATH, sqlite:///:memory: or postgresql://…"),
    "key": _Kind(_keys, None, "signing keys of at least 16 bytes, separated by commas", secret=True),
    "queues": _Kind(_path, None, "the path of a queue.yaml"),
    "concurrency": _Kind(_whole(1, 10_000), None, "a whole number from 1 to 10000"),
    "app": _Kind(_url, DEFAULT_APP, "http://HOST[:PORT][/PATH]"),
    "targets": _Kind(_targets, {}, "NAME=http://HOST[:PORT], separated by commas, or a table of names and URLs"),
    "prefix": _Kind(_prefix, "", "the path prefix that a proxy strips, like /tasks"),
    "lease": _Kind(_seconds(0.001), 30.0, "seconds from 0.001 to 86400"),
    "grace": _Kind(_seconds(0), 25.0, "seconds from 0 to 86400"),
    "port": _Kind(_whole(1, 65_535), None, "a port from 1 to 65535"),
}


# --- collecting them --------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A setting's value, and where it came from. Its repr shows no secret."""

    name: str
    value: Any
    source: str

    @property
    def shown(self) -> Any:
        """The value for people: keys and passwords masked."""
        if self.value is None:
            return None
        if SETTINGS[self.name].secret:
            return _SECRET
        return mask(self.value) if isinstance(self.value, str) else self.value

    def __repr__(self) -> str:
        return f"<Setting {self.name}={self.shown!r} from {self.source}>"


class Settings:
    """All settings with their sources; `settings["lease"]` is the value."""

    __slots__ = ("all", "root")

    def __init__(self, root: Path, all: Mapping[str, Setting]) -> None:
        self.root = root
        self.all = all

    def __getitem__(self, name: str) -> Any:
        return self.all[name].value

    def shown(self) -> list[Setting]:
        """Return every setting with its secrets masked, for people."""
        return [Setting(name=s.name, value=s.shown, source=s.source) for s in self.all.values()]


def mask(text: str) -> str:
    """Return *text* without the passwords of the URLs in it; rather too much is masked than too little."""
    text = re.sub(r"(?s)(\w*)://(.*)@", _mask_login, text)
    return re.sub(r"(?i)(password\s*=\s*)('[^']*'|[^&\s]*)", rf"\1{_SECRET}", text)


def _mask_login(match: re.Match[str]) -> str:
    scheme, (user, colon, _) = match[1], match[2].partition(":")
    if scheme.startswith("http"):  # where a user's name alone may be an access token
        return f"{scheme}://{_SECRET}@"
    return f"{scheme}://{user}:{_SECRET}@" if colon else match[0]


def load_settings(
    given: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    flags: Mapping[str, str] | None = None,
) -> Settings:
    """Collect the settings; `ConfigError` says which is wrong, where it came from and what is allowed.

    *flags* has the names by which people know what is *given*, where that isn't an argument of `configure`.
    """
    root = find_root(_working_directory())
    project = _pyproject(root)
    found = {}
    for name, kind in SETTINGS.items():
        variable = f"DEFERLIB_{name.upper()}"
        if given is not None and given.get(name) is not None:
            value, source = given[name], (flags or {}).get(name, "argument")
        elif environ.get(variable):
            value, source = environ[variable], variable
        elif name in project:
            value, source = project[name], "pyproject.toml [tool.deferlib]"
        else:
            found[name] = Setting(name=name, value=kind.default, source="default")
            continue
        try:
            found[name] = Setting(name=name, value=kind.parse(value), source=source)
        except (ValueError, OverflowError):
            shown = _SECRET if kind.secret else mask(repr(value))
            raise ConfigError(f"setting {name!r} from {source}: {shown} is not {kind.allowed}") from None
    return Settings(root, found)


def find_root(folder: Path) -> Path:
    """Return the project root: the nearest folder with queue.yaml or pyproject.toml, else *folder*."""
    for candidate in (folder, *folder.parents):
        # os.path: a folder above that may not be looked into is no error
        if os.path.isfile(candidate / "queue.yaml") or os.path.isfile(candidate / "pyproject.toml"):
            return candidate
    return folder


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError(f"the working directory can't be read: {error.strerror}; change to one that exists") from None


def _pyproject(root: Path) -> Mapping[str, Any]:
    """Return [tool.deferlib] of the root's pyproject.toml; unknown settings are refused: they are misspelled ones."""
    path = root / "pyproject.toml"
    if not os.path.isfile(path):
        return {}
    import tomllib

    try:
        raw: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8
        raise ConfigError(f"{path}: is not TOML: {error}") from None
    for key in ("tool", "deferlib"):
        raw = raw.get(key, {}) if isinstance(raw, Mapping) else raw
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path}: [tool.deferlib] is a table of settings")
    for name in raw:
        if name not in SETTINGS:
            raise ConfigError(f"{path}: [tool.deferlib]: unknown setting {name!r}; known are {', '.join(SETTINGS)}")
    return raw


# --- the runtime ------------------------------------------------------------------------------------------------------


def sqlite_path(dsn: str, root: Path) -> str | None:
    """Return the file of an SQLite *dsn*, resolved; None for any other store and for one in memory.

    A relative path is relative to *root*, the project root, so that every process finds the same file.
    """
    if not dsn.startswith("sqlite:///") or dsn == _MEMORY:
        return None
    path = dsn.removeprefix("sqlite:///")
    if not path:
        raise ConfigError(f"store {dsn!r} names no file; use sqlite:///PATH or sqlite:///:memory:")
    return os.path.realpath(root / path)


def connect(dsn: str, root: Path | None = None) -> Store:
    """Return the store that *dsn* names; a relative SQLite path is relative to *root*, the project root."""
    if dsn.startswith("sqlite:///"):
        from deferlib.store.sqlite import MEMORY, SqliteStore

        return SqliteStore(sqlite_path(dsn, root or find_root(_working_directory())) or MEMORY)
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
        self.clock = clock
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
        """The signing keys."""
        if self._ring is None:
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
        if named is None:
            path = self.settings.root / "queue.yaml"
            return path if os.path.isfile(path) else None
        path = self.settings.root / str(named)
        if not os.path.isfile(path):
            raise ConfigError(f"setting 'queues' from {self.settings.all['queues'].source}: {path} is not a file")
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
        if "queues" in names:
            self.given_queues = None
        if "store" in names:
            self.close()
            self.given_store = self._store = self._ring = None

    def close(self) -> None:
        """Close the connections of the store that this runtime opened; it opens them again if it is used again.

        A store that `configure` was given belongs to whoever made it.
        """
        if self._store is not None and self._store is not self.given_store:
            self._store.close()

    def _open(self) -> Store:
        queues = self.queues()  # first: a mistake in queue.yaml shall not leave a new store behind
        store = self.given_store or connect(self.settings["store"], self.settings.root)
        try:
            store.migrate()
            with store.read() as tx:
                known = {row.name for row in tx.queues()}
            missing = [config for config in queues if config.name not in known]
            if missing:
                store.run(lambda tx: tx.put_queues(missing, QueueSource.LIBRARY))
        except BaseException:
            if store is not self.given_store:
                store.close()
            raise
        return store

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
        if self.given_store is not None or self.settings["store"] == _MEMORY:
            return keys.parse(keys.generate())
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
        given_queues = [q if isinstance(q, QueueConfig) else queue_yaml.from_mapping(q, "configure()") for q in queues]
        queue_yaml.refuse_twins(given_queues, "configure()")
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
