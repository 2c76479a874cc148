"""The settings: what each may be, and where its value comes from.

A setting comes from, in this order: an argument (of `configure` or a command's flag), the environment (`DEFERLIB_…`),
`[tool.deferlib]` in the project's pyproject.toml, the default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from deferlib import limits, owners
from deferlib.errors import ConfigError
from deferlib.targets import NAME, SLOT, Targets

DEFAULT_STORE = "sqlite:///.deferlib/tasks.db"
DEFAULT_APP = "http://127.0.0.1:8080"
MEMORY_STORE = "sqlite:///:memory:"
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


def _targets(value: object) -> Targets:
    if isinstance(value, Targets):
        return value
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        # A part without a name before its URL is the template.
        pairs = [part.split("=", 1) if re.match(r"[^:/{]*=", part) else ["*", part] for part in parts]
    elif isinstance(value, Mapping):
        pairs = [list(pair) for pair in value.items()]
    else:
        raise ValueError
    names: dict[str, str] = {}
    for name, url in pairs:
        if not isinstance(name, str) or name.strip() in names:
            raise ValueError
        names[name.strip()] = url
    template = names.pop("*", None)
    if template is not None and (not isinstance(template, str) or template.count(SLOT) != 1):
        raise ValueError
    for name, url in names.items():
        if not NAME.match(name):
            raise ValueError
        names[name] = _url(url)
    if template is None:
        return Targets(names)
    _url(template.replace(SLOT, "x"))
    return Targets(names, template.rstrip("/"))


def _allow_urls(value: object) -> object:
    from deferlib.outbound import parse_list  # a millisecond that few need

    return parse_list(value)


def _margin(value: object) -> float | None:
    return None if value == "off" else _seconds(0)(value)


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if value not in ("true", "false"):
        raise ValueError
    return value == "true"


def _listen_at(value: object) -> int | str:
    """Return a port as a number, HOST:PORT as text."""
    if isinstance(value, str) and ":" in value:
        host, _, port = value.rpartition(":")
        if not re.match(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,252})|\[[0-9A-Fa-f:.]+\])\Z", host):
            raise ValueError
        return f"{host}:{_PORT(port)}"
    return _PORT(value)


def _prefix(value: object) -> str:
    if value == "":
        return ""
    text = _text(value)
    if not re.match(r"/[^\s?#]*[^\s?#/]\Z", text):
        raise ValueError
    return text


_PORT = _whole(1, 65_535)


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
    "batch": _Kind(_whole(1, 1_000), 32, "a whole number from 1 to 1000"),
    "app": _Kind(_url, DEFAULT_APP, "http://HOST[:PORT][/PATH]"),
    "targets": _Kind(
        _targets,
        Targets(),
        "NAME=http://HOST[:PORT], separated by commas, a template like http://{target}.example.com for all other names, or "
        "a table of names and URLs, with the template at *",
    ),
    "allow_urls": _Kind(
        _allow_urls,
        None,
        "hosts of absolute URLs: NAME, *.NAME, * for any public one, ADDRESS or NETWORK, each perhaps with :PORT, "
        "separated by commas",
    ),
    "prefix": _Kind(_prefix, "", "the path prefix that a proxy strips, like /tasks"),
    "lease": _Kind(_seconds(0.001), 30.0, "seconds from 0.001 to 86400"),
    "deadline_margin": _Kind(_margin, 1.0, "seconds from 0 to 86400, or off"),
    "limits": _Kind(limits.parse, limits.DEFAULT, "appengine or deferlib, then NAME=NUMBER, separated by commas"),
    "trust_host": _Kind(_flag, False, "true or false"),
    "accept_unbound": _Kind(_flag, True, "true or false"),
    "quarantine_after": _Kind(_seconds(0), 600.0, "seconds from 0 to 86400"),
    "grace": _Kind(_seconds(0), 25.0, "seconds from 0 to 86400"),
    "port": _Kind(_listen_at, None, "a port from 1 to 65535, or HOST:PORT"),
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
            return None if self.source == "default" else "off"
        if SETTINGS[self.name].secret:
            return _SECRET
        if isinstance(self.value, limits.Limits) or self.name == "allow_urls":
            return str(self.value)
        if isinstance(self.value, Targets):
            return {**self.value.names, **({"*": self.value.template} if self.value.template else {})}
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
    text = re.sub(r"(?s)(\w{0,40})://(.*)@", _mask_login, text)  # bounded: long words would take quadratic time
    text = re.sub(r"[^\s'\"/@]{1,200}:(?!//|\*{3}@)[^\s@]{1,200}@", f"{_SECRET}@", text)  # without a scheme
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
    root = find_root(working_directory())
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
        except ConfigError as error:
            raise ConfigError(f"setting {name!r} from {source}: {error}") from None
        except (ValueError, OverflowError):
            shown = _SECRET if kind.secret else mask(repr(value)[:200])
            raise ConfigError(f"setting {name!r} from {source}: {shown} is not {kind.allowed}") from None
    return Settings(root, found)


def find_root(folder: Path) -> Path:
    """Return the project root: the nearest folder with queue.yaml or pyproject.toml, else *folder*."""
    for candidate in (folder, *folder.parents):
        # os.path: a folder above that may not be looked into is no error
        if os.path.isfile(candidate / "queue.yaml") or os.path.isfile(candidate / "pyproject.toml"):
            return candidate
    return folder


def working_directory() -> Path:
    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError(f"the working directory can't be read: {error.strerror}; change to one that exists") from None


def _owner_of_here() -> int:
    """Return whose the folder is in which this process was started: they decide there anyway."""
    try:
        return os.stat(os.curdir).st_uid
    except OSError:
        return -1


def _pyproject(root: Path) -> Mapping[str, Any]:
    """Return [tool.deferlib] of the root's pyproject.toml; unknown settings are refused: they are misspelled ones.

    So are those of a file that is another user's: it may lie in any folder above, and they say where code is run.
    """
    path = root / "pyproject.toml"
    if not os.path.isfile(path):
        return {}
    import tomllib

    try:
        with path.open("rb") as file:
            owner = os.fstat(file.fileno()).st_uid
            raw: Any = tomllib.loads(file.read().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8
        raise ConfigError(f"{path}: is not TOML: {error}") from None
    for key in ("tool", "deferlib"):
        raw = raw.get(key, {}) if isinstance(raw, Mapping) else raw
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path}: [tool.deferlib] is a table of settings")
    if raw and not owners.is_trusted(owner) and owner != _owner_of_here():
        whose, me = owners.name(owner), owners.myself()
        raise ConfigError(
            f"{path}: [tool.deferlib] is {whose}'s, to whom the file belongs, and this process runs as {me}; run it as "
            f"{whose}, `chown {me} {path}` if you agree with what it sets, or take it out and set DEFERLIB_… variables"
        )
    for name in raw:
        if name not in SETTINGS:
            raise ConfigError(f"{path}: [tool.deferlib]: unknown setting {name!r}; known are {', '.join(SETTINGS)}")
    return raw
