"""Every way that we know to say a header, for a server to misunderstand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.system.wire import ENGINES, TASK_ADDRESS, request

FORGED = b"forged"
_HARMLESS = b"X-Harmless: yes"


class Said(NamedTuple):
    """Bytes that forge a header, and what they are."""

    what: str
    data: bytes


def _mixed(name: str, marks: str) -> str:
    """Return *name* with the dashes and underscores of *marks* in turn."""
    parts = name.split("-")
    return "".join(
        part + mark for part, mark in zip(parts, (marks * len(parts))[: len(parts) - 1] + " ", strict=True)
    ).strip()


def _waves(name: str) -> str:
    return "".join(char.upper() if index % 2 else char.lower() for index, char in enumerate(name))


# Each makes the lines of a name: what a server that reads it at all reads as this header.
LINES: dict[str, Callable[[str], list[bytes]]] = {
    "dash": lambda name: [f"{name}: forged".encode()],
    "underscore": lambda name: [f"{name.replace('-', '_')}: forged".encode()],
    "underscore, dash": lambda name: [f"{_mixed(name, '_-')}: forged".encode()],
    "dash, underscore": lambda name: [f"{_mixed(name, '-_')}: forged".encode()],
    "lower case": lambda name: [f"{name.lower()}: forged".encode()],
    "upper case": lambda name: [f"{name.upper()}: forged".encode()],
    "changing case": lambda name: [f"{_waves(name)}: forged".encode()],
    "changing case, underscore": lambda name: [f"{_waves(name).replace('-', '_')}: forged".encode()],
    "as a CGI key": lambda name: [f"HTTP_{name.upper().replace('-', '_')}: forged".encode()],
    "twice": lambda name: [f"{name}: forged".encode()] * 2,
    "with a dash, then an underscore": lambda name: [
        f"{name}: forged".encode(),
        f"{name.replace('-', '_')}: forged".encode(),
    ],
    "thirty times": lambda name: [f"{name}: forged".encode()] * 30,
    "no space": lambda name: [f"{name}:forged".encode()],
    "many spaces": lambda name: [f"{name}:    forged   ".encode()],
    "tab before the value": lambda name: [f"{name}:\tforged".encode()],
    "comma at the end": lambda name: [f"{name}: forged,".encode()],
    "commas": lambda name: [f"{name}: ,forged,,".encode()],
    "quoted": lambda name: [f'{name}: "forged"'.encode()],
    "empty, then again": lambda name: [f"{name}:".encode(), f"{name}: forged".encode()],
    "space before the colon": lambda name: [f"{name} : forged".encode()],
    "tab before the colon": lambda name: [f"{name}\t: forged".encode()],
    "space inside": lambda name: [f"{name.replace('-', ' ')}: forged".encode()],
    "space before the name": lambda name: [f" {name}: forged".encode()],
    "tab before the name": lambda name: [f"\t{name}: forged".encode()],
    "folded into a harmless one": lambda name: [_HARMLESS, f" {name}: forged".encode()],
    "folded before its value": lambda name: [f"{name}:".encode(), b" forged"],
    "folded by a tab": lambda name: [f"{name}:".encode(), b"\tforged"],
    "folded after its name": lambda name: [name.encode(), b" : forged"],
    "after an empty folded line": lambda name: [_HARMLESS, b" ", f"{name}: forged".encode()],
    "NUL before": lambda name: [b"\0" + f"{name}: forged".encode()],
    "NUL inside": lambda name: [f"{name[:5]}\0{name[5:]}: forged".encode()],
    "NUL after": lambda name: [f"{name}\0: forged".encode()],
    "NUL in the value": lambda name: [f"{name}: for\0ged".encode()],
    "NUL, then the header": lambda name: [f"X-Harmless: yes\0{name}: forged".encode()],
    "CR, then the header": lambda name: [f"X-Harmless: yes\r{name}: forged".encode()],
    "CR CR LF, then the header": lambda name: [f"X-Harmless: yes\r\r\n{name}: forged".encode()],
    "LF, then the header": lambda name: [f"X-Harmless: yes\n{name}: forged".encode()],
    "LF CR, then the header": lambda name: [f"X-Harmless: yes\n\r{name}: forged".encode()],
    "vertical tab, then the header": lambda name: [f"X-Harmless: yes\v{name}: forged".encode()],
    "next line, then the header": lambda name: [f"X-Harmless: yes\x85{name}: forged".encode("latin-1")],
    "line separator, then the header": lambda name: [f"X-Harmless: yes\u2028{name}: forged".encode()],
    "CR inside": lambda name: [f"{name[:5]}\r{name[5:]}: forged".encode()],
    "no-break space before": lambda name: [f"\xa0{name}: forged".encode("latin-1")],
    "no-break space after": lambda name: [f"{name}\xa0: forged".encode("latin-1")],
    "soft hyphens": lambda name: [f"{name.replace('-', chr(0xAD))}: forged".encode("latin-1")],
    "non-breaking hyphens": lambda name: [f"{name.replace('-', chr(0x2011))}: forged".encode()],
    "minus signs": lambda name: [f"{name.replace('-', chr(0x2212))}: forged".encode()],
    "wide letters": lambda name: ["".join(chr(ord(char) + 0xFEE0) for char in name).encode() + b": forged"],
    "a Cyrillic letter": lambda name: [f"{name.replace('e', chr(0x435))}: forged".encode()],
    "a long s": lambda name: [f"{name.replace('s', chr(0x17F))}: forged".encode()],
    "a dotless i": lambda name: [f"{name.replace('i', chr(0x131))}: forged".encode()],
    "a byte order mark": lambda name: [f"\ufeff{name}: forged".encode()],
    "percent-encoded": lambda name: [f"{name.replace('-', '%2D')}: forged".encode()],
    "without a colon": lambda name: [f"{name} forged".encode()],
    "two colons": lambda name: [f"{name}:: forged".encode()],
    "as a hop's header": lambda name: [f"Connection: {name}".encode(), f"{name}: forged".encode()],
}
# No server may refuse these: they are well-formed.
PLAIN = ("dash", "lower case", "upper case", "changing case", "no space", "many spaces", "tab before the value", "commas")


def every_line() -> Iterator[Said]:
    """Return each spelling of each header that only an engine may set, in a GET."""
    for what, lines in LINES.items():
        for name in ENGINES:
            yield Said(f"{name}: {what}", request([_HARMLESS, *lines(name)]))
        yield Said(
            f"first: {what}",
            request([])[: -len(b"\r\n\r\n")].replace(b"Host:", b"\r\n".join([*lines(ENGINES[0]), b"Host:"])) + b"\r\n\r\n",
        )


def every_request() -> Iterator[Said]:
    """Return forged headers in requests of every kind."""
    for name in ENGINES:
        line = f"{name}: forged".encode()
        under = f"{name.replace('-', '_')}: forged".encode()
        for header in (line, under):
            yield Said(f"HTTP/1.0: {header!r}", request([header], version="1.0"))
            yield Said(f"absolute target: {header!r}", request([header], target="http://localhost/look"))
            yield Said(f"another host's target: {header!r}", request([header], target="http://evil.test/look"))
            yield Said(f"doubled slash: {header!r}", request([header], target="//look"))
            yield Said(f"POST: {header!r}", request([header], method="POST", body=b"data"))
            yield Said(f"an unknown method: {header!r}", request([header], method="FETCH"))
            yield Said(f"a second request: {header!r}", request([_HARMLESS], last=False) + request([header]))
            yield Said(f"a first request: {header!r}", request([header], last=False) + request([_HARMLESS]))
            yield Said(f"the body's a request: {header!r}", request([], method="POST", body=request([header])))
            yield Said(f"trailer: {header!r}", chunked(header))
            yield Said(f"announced trailer: {header!r}", chunked(header, b"Trailer: " + name.encode()))
            yield Said(f"TE trailers: {header!r}", chunked(header, b"TE: trailers", b"Connection: TE"))
            yield Said(f"both lengths: {header!r}", chunked(b"", b"Content-Length: 4") + request([header]))
            yield Said(
                f"an upgrade: {header!r}", request([header, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c"])
            )


def chunked(trailer: bytes, *lines: bytes) -> bytes:
    """Return a POST with the body `data` in chunks, *trailer* after it."""
    end = trailer + b"\r\n" if trailer else b""
    head = b"\r\n".join(
        [b"POST /look HTTP/1.1", b"Host: localhost", b"Transfer-Encoding: chunked", b"Connection: close", *lines]
    )
    return head + b"\r\n\r\n4\r\ndata\r\n0\r\n" + end + b"\r\n"


def every_address() -> Iterator[Said]:
    """Return claims to come from where App Engine's tasks come from."""
    for name in (
        "X-Forwarded-For",
        "X_Forwarded_For",
        "X-Real-IP",
        "Client-IP",
        "True-Client-IP",
        "CF-Connecting-IP",
        "Via",
    ):
        for value in (
            TASK_ADDRESS,
            f"{TASK_ADDRESS}:80",
            f"{TASK_ADDRESS}, {TASK_ADDRESS}",
            f'"{TASK_ADDRESS}"',
            f"[::ffff:{TASK_ADDRESS}]:80",
        ):
            yield Said(f"{name}: {value}", request([f"{name}: {value}".encode()]))
        yield Said(f"{name} twice", request([f"{name}: {TASK_ADDRESS}".encode()] * 2))
    for value in (TASK_ADDRESS, f'"{TASK_ADDRESS}:80"', f"{TASK_ADDRESS};proto=https"):
        yield Said(f"Forwarded: {value}", request([f"Forwarded: for={value}".encode()]))
    yield Said("Remote-Addr", request([b"Remote-Addr: 0.1.0.2", b"REMOTE_ADDR: 0.1.0.2"]))
