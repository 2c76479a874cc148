"""Absolute URLs of tasks: how they may be spelled, which hosts are allowed, and which addresses may be connected to.

One parser decides what is connected to: the text that libcurl gets is put together from the parts that were checked here,
so that no second parser can read another host out of it. A name says nothing of its address, so every address is judged
again at the moment it is connected to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple, TypeAlias

from deferlib.errors import ConfigError, InvalidUrlError

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

PORTS = {"http": 80, "https": 443}
_USUAL = frozenset(PORTS.values())
ENTRIES = (  # what a list may hold
    "host names (hooks.example.com), *.example.com for its subdomains, * for any host with a public address, addresses and "
    "networks (10.1.2.0/24, [fd00::]/8), each perhaps with :PORT, and without scheme and path"
)

# What may stand in a URL (RFC 3986), but for '#': no spaces, backslashes, control characters, and nothing beyond ASCII.
_PLAIN = re.compile(r"[A-Za-z0-9._~:/?\[\]@!$&'()*+,;=%-]*\Z")
_FORM = re.compile(
    r"(?P<scheme>[Hh][Tt][Tt][Pp][Ss]?)://(?P<host>\[[^\]/?]*\]|[^:/?\[\]@]*)(?::(?P<port>[0-9]*))?"
    r"(?P<path>/[^?]*)?(?P<query>\?.*)?\Z"
)
_PORT = re.compile(r"[1-9][0-9]{0,4}\Z")
_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*\Z")
_NUMBER = re.compile(r"([0-9]+|0x[0-9a-f]*)\Z")  # a last label like this makes resolvers read the name as an IPv4 address
_IPV4 = re.compile(r"(0|[1-9][0-9]{0,2})(\.(0|[1-9][0-9]{0,2})){3}\Z")
_ENTRY = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[^:/\[\]]+)(?P<length>/[0-9]{1,3})?(?::(?P<port>[^:]*))?\Z")


# --- the spelling of a URL --------------------------------------------------------------------------------------------


class AbsoluteUrl(NamedTuple):
    """A URL in its checked parts."""

    scheme: str  # http or https
    host: str  # a name in lower case, or an address
    port: int
    path: str  # with the query, percent-encoded
    address: Address | None  # None for a name

    @property
    def place(self) -> str:
        """The host as an entry of the allow-list, with its port where that isn't a usual one."""
        return _place(self.host, self.port, _USUAL)

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"{self.scheme}://{_place(self.host, self.port, (PORTS[self.scheme],))}"

    @property
    def url(self) -> str:
        """The URL to connect to."""
        return self.origin + self.path


@lru_cache(maxsize=256)  # checked when it is added, planned and sent: 6 µs each
def parse(url: str) -> AbsoluteUrl:
    """Return the parts of an absolute *url*; `InvalidUrlError` says what in its spelling isn't allowed."""
    if not _PLAIN.match(url):
        raise _bad(url, "percent-encode what isn't ASCII, spaces, backslashes and '#', and leave out a fragment")
    form = _FORM.match(url)
    if form is None:
        what = "leave out the user name and password" if "@" in _authority(url) else "http://HOST[:PORT]/PATH is needed"
        raise _bad(url, what)
    scheme, host = form["scheme"].lower(), form["host"].lower()
    address = _literal(host)
    if address is None and (not _NAME.match(host) or _NUMBER.match(host.rpartition(".")[2])):
        raise _bad(url, "a host name of letters, digits, hyphens and dots is needed, or an address like 192.0.2.7 or [::1]")
    port = PORTS[scheme]
    if form["port"] is not None:
        if not _PORT.match(form["port"]) or int(form["port"]) > 65_535:
            raise _bad(url, "a port from 1 to 65535 is needed, or none")
        port = int(form["port"])
    path = form["path"] or "/"
    if re.search(r"%(?![0-9A-Fa-f]{2})", path + (form["query"] or "")):
        raise _bad(url, "a '%' that begins no percent-encoding is written as %25")
    if not {".", ".."}.isdisjoint(path.lower().replace("%2e", ".").split("/")):  # libcurl would resolve them
        raise _bad(url, "a path without '.' and '..' is needed")
    return AbsoluteUrl(scheme, host if address is None else str(address), port, path + (form["query"] or ""), address)


def _literal(host: str) -> Address | None:
    """Return the address that *host* is; None if it is none, or isn't spelled as everybody reads it."""
    try:
        if host.startswith("["):
            return IPv6Address(host[1:-1]) if "%" not in host else None
        return IPv4Address(host) if _IPV4.match(host) else None
    except ValueError:
        return None


def _place(host: str, port: int, usual: Iterable[int]) -> str:
    host = f"[{host}]" if ":" in host else host
    return host if port in usual else f"{host}:{port}"


def _bad(url: str, what: str) -> InvalidUrlError:
    return InvalidUrlError(f"url {shown(url)}: {what}")


def shown(url: str) -> str:
    """Return *url* for people up to its path: what follows, and a password before it, may be a secret."""
    masked = re.sub(r"(?s)\A([^/]*//)?.*@", r"\1***@", url)
    head = re.split(r"(?<!/)/(?!/)|[?#]", masked, maxsplit=1)[0][:100]
    return repr(head if head == url else f"{head}…")


def _authority(url: str) -> str:
    found = re.search(r"//([^/?#]*)", url)
    return found[1] if found else ""


# --- what an address is -----------------------------------------------------------------------------------------------

# Written out, since what `ipaddress` calls global differs between patch versions of Python.
_NOT_PUBLIC_4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # "this network"; Linux connects 0.0.0.0 to itself
        "10.0.0.0/8",
        "100.64.0.0/10",  # behind a provider's NAT
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's own services, seen from its machines
        "169.254.0.0/16",  # link-local: where clouds keep credentials
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
_PUBLIC_6 = IPv6Network("2000::/3")  # all that was ever given out: loopback, fc00::/7, fe80::/10 and multicast are outside
_NOT_PUBLIC_6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocols' own: Teredo, benchmarks, ORCHID
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
    )
)
_COMPATIBLE = IPv6Network("::/96")
_NAT64 = IPv6Network("64:ff9b::/96")


def inner(address: Address) -> tuple[Address, ...]:
    """Return the IPv4 addresses that *address* stands for, which a gateway or the kernel would connect to; else itself."""
    if isinstance(address, IPv4Address):
        return (address,)
    if address.ipv4_mapped is not None:
        return (address.ipv4_mapped,)
    if address.sixtofour is not None:
        return (address.sixtofour,)
    if address.teredo is not None:
        return address.teredo
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):  # not the unspecified one and loopback
        return (IPv4Address(int(address) & 0xFFFF_FFFF),)
    return (address,)


def is_public(address: Address) -> bool:
    """Tell whether *address* is of a host on the internet, as far as anybody can say; one that stands for another isn't."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    return address in _PUBLIC_6 and not any(address in network for network in _NOT_PUBLIC_6)


# --- the allow-list ---------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One entry of the allow-list: names, or addresses."""

    name: str  # '*' for any, '.example.com' for subdomains; '' if it is a network
    network: Network | None
    ports: frozenset[int]
    text: str

    def allows(self, host: str) -> bool:
        """Tell whether it is an entry for the name *host*."""
        return self.name == "*" or self.name == host or (self.name.startswith(".") and host.endswith(self.name))


class AllowList:
    """Where tasks with an absolute URL may go; an empty one, the default, means that there are none."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = tuple(entries)

    def origin(self, url: str) -> str:
        """Return scheme, host and port of *url*; `InvalidUrlError` if it is none, or may not be pushed to."""
        if not url.lower().startswith(("http:", "https:")):
            raise _bad(url, "a path that starts with one '/' is needed")
        parts = parse(url)
        self.check(parts)
        return parts.origin

    def check(self, url: AbsoluteUrl) -> None:
        """Raise `InvalidUrlError` unless *url* may be pushed to, as far as its text says."""
        if url.address is None:
            allowed = any(url.port in entry.ports and entry.allows(url.host) for entry in self._entries)
        elif any(url.port in entry.ports and entry.name == "*" for entry in self._entries):
            allowed = self.covers(url.host, url.port)
        else:
            allowed = all(self._lists(each, url.port) for each in inner(url.address))
        if not allowed:
            raise InvalidUrlError(f"{url.origin} is not in allow_urls; add {url.place} to that setting if it is meant")

    def covers(self, address: str, port: int) -> bool:
        """Tell whether a connection to *address* may be opened: it is public, or in a network of the list."""
        try:
            parts = inner(ip_address(address.partition("%")[0]))
        except ValueError:
            return False
        return all(is_public(each) or self._lists(each, port) for each in parts)

    def _lists(self, address: Address, port: int) -> bool:
        return any(
            entry.network is not None and address in entry.network and port in entry.ports for entry in self._entries
        )

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __eq__(self, other: object) -> bool:
        return self._entries == other._entries if isinstance(other, AllowList) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._entries)

    def __str__(self) -> str:
        """Return the setting's text that means this list."""
        return ",".join(entry.text for entry in self._entries)

    def __repr__(self) -> str:
        return f"AllowList({str(self)!r})"


NOWHERE = AllowList()


def parse_list(value: object) -> AllowList:
    """Return the list that a setting's *value* means: text with commas, or a list; `ConfigError` names a bad entry."""
    if isinstance(value, AllowList):
        return value
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"a {type(value).__name__} isn't a list of entries; allowed are {ENTRIES}")
    return AllowList(_entry(each.strip()) for each in value if each.strip())


def _entry(text: str) -> Entry:
    form = _ENTRY.match(text.lower()) if text.isascii() else None  # beyond ASCII, some capitals become ASCII letters
    if form is None:
        raise _bad_entry(text)
    host, length = form["host"], form["length"]
    ports = _USUAL
    if form["port"] is not None:
        if not _PORT.match(form["port"]) or int(form["port"]) > 65_535:
            raise _bad_entry(text, "its port isn't one from 1 to 65535")
        ports = frozenset({int(form["port"])})
    if host.startswith("[") or _IPV4.match(host):
        return Entry("", _network(text, host.strip("[]"), length or ""), ports, text.lower())
    name = host.removeprefix("*.")
    if length or (host != "*" and (not _NAME.match(name) or _NUMBER.match(name.rpartition(".")[2]))):
        raise _bad_entry(text)
    return Entry(host.removeprefix("*") or "*", None, ports, text.lower())


def _network(text: str, address: str, length: str) -> Network:
    try:
        network = ip_network(address + length)
    except ValueError as error:
        raise _bad_entry(text, str(error)) from None
    if isinstance(network, IPv6Network) and inner(network[0]) != (network[0],):
        raise _bad_entry(text, "it stands for IPv4 addresses: write those")
    return network


def _bad_entry(text: str, why: str = "") -> ConfigError:
    text = re.sub(r"(?s).*@", "***@", text)[:100]  # a whole URL, perhaps, with its password
    return ConfigError(f"{text!r} is no entry of an allow-list{f' ({why})' if why else ''}; allowed are {ENTRIES}")
