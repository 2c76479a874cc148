"""Named targets: from a name to the base URL to push to, and from the Host of a request back to the name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from urllib.parse import urlsplit

NAME = re.compile(r"[a-z0-9][a-z0-9.-]*\Z")
SLOT = "{target}"
_PORTS = {"http": 80, "https": 443}


_ADDRESS = re.compile(r"[0-9.]+\Z|0x")


class Targets:
    """Names with their base URLs, and perhaps a template, `http://{target}.example.com`, for every other name.

    A name is a service, `version.service` or `instance.version.service`: text, of which nothing is taken apart.
    """

    def __init__(self, names: Mapping[str, str] | None = None, template: str = "") -> None:
        self.names = dict(names or {})
        self.template = template

    def get(self, name: str) -> str | None:
        """Return the base URL of *name*; None if there is no such target."""
        url = self.names.get(name)
        if url is None and self.template and NAME.match(name):
            return self.template.replace(SLOT, name)
        return url

    def name_of(self, host: str, *, by_template: bool = False) -> str | None:
        """Return the name of the target at *host*, the Host header of a request; None if no target is there.

        The header only chooses among what is configured. With a template it would choose freely, so that is looked at only
        *by_template*: where something before the app lets known hosts through only. It never makes an address a target.
        """
        host = host.lower()
        name = self._hosts.get(host)
        if name is None and by_template and self._pattern is not None:
            match = self._pattern.fullmatch(host)
            if match is not None and not _ADDRESS.match(match["target"]):
                return match["target"]
        return name

    def __bool__(self) -> bool:
        return bool(self.names or self.template)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Targets):
            return (self.names, self.template) == (other.names, other.template)
        return self.names == other if isinstance(other, Mapping) and not self.template else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # by what it holds

    def __str__(self) -> str:
        """Return the setting's text that means these targets."""
        pairs = [f"{name}={url}" for name, url in self.names.items()]
        return ",".join([*pairs, self.template] if self.template else pairs)

    @cached_property
    def _hosts(self) -> dict[str, str]:
        hosts: dict[str, str] = {}
        for name, url in self.names.items():
            parts = urlsplit(url)
            spellings = [parts.netloc.lower()]
            if parts.port == _PORTS[parts.scheme]:
                spellings.append(parts.netloc.rpartition(":")[0].lower())
            elif parts.port is None:
                spellings.append(f"{parts.netloc.lower()}:{_PORTS[parts.scheme]}")
            for host in spellings:
                hosts.setdefault(host, name)
        return hosts

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        netloc = urlsplit(self.template).netloc
        if SLOT not in netloc:
            return None
        before, _, after = netloc.lower().partition(SLOT)
        return re.compile(rf"{re.escape(before)}(?P<target>[a-z0-9][a-z0-9.-]*){re.escape(after)}")
