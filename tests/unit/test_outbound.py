"""Absolute URLs and the allow-list: which spellings, which hosts, which addresses."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_address
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferlib.errors import ConfigError, Error, InvalidUrlError
from deferlib.outbound import NOWHERE, AllowList, inner, is_public, parse, parse_list, shown

ALL = parse_list("*,0.0.0.0/0,[::]/0")  # whatever is spelled as it should be


# --- spelling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("http://a.example/x", "http://a.example/x"),
        ("HTTPS://A.Example/X?Y=Z", "https://a.example/X?Y=Z"),
        ("http://a.example", "http://a.example/"),
        ("http://a.example?x=1&y=/@:", "http://a.example/?x=1&y=/@:"),
        ("http://a.example:80/", "http://a.example/"),
        ("https://a.example:443/", "https://a.example/"),
        ("http://a.example:443/", "http://a.example:443/"),
        ("https://a.example:8443/%C3%A9/%2F;p=1,2?q=%20+", "https://a.example:8443/%C3%A9/%2F;p=1,2?q=%20+"),
        ("http://xn--bcher-kva.example/", "http://xn--bcher-kva.example/"),
        ("http://under_score.example/", "http://under_score.example/"),
        ("http://3com.example/@me", "http://3com.example/@me"),
        ("http://192.0.2.7/", "http://192.0.2.7/"),
        ("http://[2001:DB8:0::1]:8080/", "http://[2001:db8::1]:8080/"),
        ("http://[::ffff:192.0.2.7]/", "http://[::ffff:c000:207]/"),
        ("http://localhost/", "http://localhost/"),
    ],
)
def test_url_is_put_together_from_its_parts(url: str, same: str) -> None:
    assert urlsplit(parse(url).url) == urlsplit(same)  # Python writes mapped addresses in two ways
    assert parse(parse(url).url) == parse(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://user@host/", "user name and password"),
        ("http://user:secret@host/", "user name and password"),
        ("http://host/#x", "fragment"),
        ("http://h\\@evil/", "backslashes"),
        ("http://host/\u00e9", "percent-encode"),
        ("http://ho\u3002st/", "percent-encode"),
        ("http://host/a b", "spaces"),
        ("http://host:0/", "port from 1 to 65535"),
        ("http://host:080/", "port from 1 to 65535"),
        ("http://host:65536/", "port from 1 to 65535"),
        ("http://host:/", "port from 1 to 65535"),
        ("http://host./", "host name"),
        ("http://a..b/", "host name"),
        ("http://-a/", "host name"),
        ("http://%68ost/", "host name"),
        ("http://127.1/", "host name"),
        ("http://a.example.1/", "host name"),
        ("http://0x7f000001/", "host name"),
        ("http://256.1.1.1/", "host name"),
        ("http://[fe80::1%25eth0]/", "host name"),
        ("http://[::1.2.3]/", "host name"),
        ("http://[v1.x]/", "host name"),
        ("http://host/%zz", "%25"),
        ("http://host/?%", "%25"),
        ("http://host/a/../b", "without '.' and '..'"),
        ("http://host/%2E%2e/b", "without '.' and '..'"),
        ("http:/host/", "http://HOST"),
        ("http:host", "http://HOST"),
        ("ftp://host/", "http://HOST"),
        ("//host/", "http://HOST"),
        ("http://[::1/", "http://HOST"),
        ("http://::1/", "http://HOST"),
        ("http:///path", "host name"),
        (f"http://{'a' * 64}.example/", "host name"),
        (f"http://{'a.' * 127}aa/", "host name"),
    ],
)
def test_other_spellings_are_refused(url: str, why: str) -> None:
    with pytest.raises(InvalidUrlError, match=r"^url ") as raised:
        parse(url)

    assert why in str(raised.value)
    assert "secret" not in str(raised.value)


@given(st.one_of(st.text(), st.text(alphabet="htps:/@.#?[]%\\019xa").map("http://".__add__)))
def test_whatever_is_accepted_is_read_alike_by_another_parser(url: str) -> None:
    try:
        parts = parse(url)
    except InvalidUrlError:
        return

    other = urlsplit(parts.url)
    assert (other.scheme, other.hostname, other.username) == (parts.scheme, parts.host, None)
    assert (other.port or {"http": 80, "https": 443}[parts.scheme]) == parts.port
    assert parts.url.isascii()
    assert parts.url.isprintable()
    assert " " not in parts.url


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://host", "'http://host'"),
        ("http://host/secret?secret#secret", "'http://host…'"),
        ("http://user:secret@host/secret", "'http://***@host…'"),
        ("http://user:sec/ret@host/secret", "'http://***@host…'"),
        ("@host/", "'***@host…'"),
        (":secret@host/", "'***@host…'"),
        ("http:\x1b[31m", r"'http:\x1b[31m'"),
        ("http://" + "a" * 500, f"'http://{'a' * 93}…'"),
        ("", "''"),
    ],
)
def test_url_is_shown_up_to_its_path_and_without_a_password(url: str, text: str) -> None:
    assert shown(url) == text


# --- addresses --------------------------------------------------------------------------------------------------------

_NOT_PUBLIC = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24",
    "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
]  # fmt: skip
_NOT_PUBLIC_6 = [
    "::/128", "::1/128", "100::/64", "64:ff9b:1::/48", "2001:2::/48", "2001:10::/28", "2001:db8::/32", "3fff::/20",
    "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8", "4000::/3",
]  # fmt: skip


@pytest.mark.parametrize("network", _NOT_PUBLIC)
def test_network_is_not_public_to_its_edges_in_any_disguise(network: str) -> None:
    block = IPv4Network(network)
    for address in (block[0], block[-1]):
        number = f"{int(address) >> 16:x}:{int(address) & 0xFFFF:x}"
        # The last two are Teredo: the server's address as it is, the client's inverted.
        inverted = f"{(int(address) ^ 0xFFFFFFFF) >> 16:x}:{(int(address) ^ 0xFFFFFFFF) & 0xFFFF:x}"
        disguises = [f"::ffff:{number}", f"64:ff9b::{number}", f"2002:{number}::1", f"2001:0:{number}::f7f7:f7f7"]
        disguises.append(f"2001:0:808:808::{inverted}")
        if int(address) > 1:  # :: and ::1 are other things, and no more public
            disguises.append(f"::{number}")
        assert not is_public(address)
        for text in (str(address), *disguises):
            assert not parse_list("*").covers(text, 80), text


@pytest.mark.parametrize(
    "address",
    [
        "1.0.0.0", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
        "168.63.129.15", "168.63.129.17", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0",
        "192.0.1.0", "192.88.98.255", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255",
        "8.8.8.8", "2606:4700::1111", "2001:200::", "2003::1", "2a00::1",
        "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1", "2001:0:808:808::f7f7:f7f7",
    ],
)  # fmt: skip
def test_other_addresses_are_public(address: str) -> None:
    assert parse_list("*").covers(address, 80)


@pytest.mark.parametrize("network", _NOT_PUBLIC_6)
def test_ipv6_network_is_not_public_to_its_edges(network: str) -> None:
    block = IPv6Network(network)

    assert not parse_list("*").covers(str(block[0]), 80)
    assert not parse_list("*").covers(str(block[-1]), 80)


@pytest.mark.parametrize(
    ("address", "stands_for"),
    [
        ("8.8.8.8", "8.8.8.8"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("::7f00:1", "127.0.0.1"),
        ("64:ff9b::7f00:1", "127.0.0.1"),
        ("2002:7f00:1::", "127.0.0.1"),
        ("::1", "::1"),
        ("::", "::"),
        ("2a00::1", "2a00::1"),
    ],
)
def test_address_that_stands_for_another_is_taken_for_that(address: str, stands_for: str) -> None:
    assert inner(ip_address(address)) == (ip_address(stands_for),)


@pytest.mark.parametrize("text", ["", "localhost", "127.1", "fe80::1%eth0", "8.8.8.8.", "0x8.8.8.8"])
def test_what_is_no_public_address_is_not_covered(text: str) -> None:
    assert not parse_list("*").covers(text, 80)


# --- the list ---------------------------------------------------------------------------------------------------------


def allows(entries: str, url: str) -> bool:
    try:
        return parse_list(entries).origin(url) == parse(url).origin
    except InvalidUrlError:
        return False


@pytest.mark.parametrize(
    ("entries", "url", "allowed"),
    [
        ("hooks.example.com", "http://hooks.example.com/", True),
        ("hooks.example.com", "https://HOOKS.example.com/", True),
        ("HOOKS.example.com", "https://hooks.example.com/", True),
        ("hooks.example.com", "http://hooks.example.com:443/", True),
        ("hooks.example.com", "http://hooks.example.com:8080/", False),
        ("hooks.example.com", "http://a.hooks.example.com/", False),
        ("hooks.example.com", "http://hooks.example.com.evil.test/", False),
        ("hooks.example.com", "http://xhooks.example.com/", False),
        ("hooks.example.com:8443", "https://hooks.example.com:8443/", True),
        ("hooks.example.com:8443", "https://hooks.example.com/", False),
        ("*.example.com", "http://a.example.com/", True),
        ("*.example.com", "http://a.b.example.com/", True),
        ("*.example.com", "http://example.com/", False),
        ("*.example.com", "http://aexample.com/", False),
        ("*.example.com:81", "http://a.example.com:81/", True),
        ("*", "http://anything.test/", True),
        ("*", "http://8.8.8.8/", True),
        ("*", "http://[2a00::1]/", True),
        ("*", "http://10.0.0.1/", False),
        ("*", "http://[::1]/", False),
        ("*", "http://[::ffff:10.0.0.1]/", False),
        ("*", "http://anything.test:81/", False),
        ("*:81", "http://anything.test:81/", True),
        ("*,10.0.0.0/8", "http://10.0.0.1/", True),
        ("*,10.0.0.0/8:81", "http://10.0.0.1/", False),
        ("10.1.2.0/24", "http://10.1.2.255/", True),
        ("10.1.2.0/24", "http://10.1.3.0/", False),
        ("10.1.2.0/24", "http://8.8.8.8/", False),
        ("10.1.2.0/24", "http://anything.test/", False),
        ("10.1.2.0/24", "http://[::ffff:10.1.2.3]/", True),
        ("10.1.2.3", "http://10.1.2.3/", True),
        ("10.1.2.3:81", "http://10.1.2.3/", False),
        ("[fd00::]/8", "http://[fdff::1]/", True),
        ("[fd00::]/8", "http://[fe80::1]/", False),
        ("[::1]:8443", "https://[::1]:8443/", True),
        ("[::1]:8443", "https://[::1]/", False),
        ("[::]/0", "http://[::ffff:127.0.0.1]/", False),
        ("127.0.0.0/8", "http://[::1]/", False),
        ("a.test, ,b.test,", "http://b.test/", True),
        ("", "http://a.test/", False),
    ],
)
def test_url_is_allowed_by_host_and_port(entries: str, url: str, allowed: bool) -> None:
    assert allows(entries, url) is allowed


def test_refusal_names_the_entry_that_is_missing() -> None:
    with pytest.raises(InvalidUrlError, match=r"^https://a\.test:81 is not in allow_urls; add a\.test:81 to that setting"):
        parse_list("b.test").origin("https://a.test:81/secret")
    with pytest.raises(InvalidUrlError, match=r"add \[::1\] to that setting"):
        NOWHERE.origin("https://[::1]/")


@pytest.mark.parametrize("url", ["", "/x", "//evil.test/x", "@evil.test/", ".evil.test/", "x", "ftp://x/", "\thttp://x/"])
def test_url_that_is_not_absolute_has_no_origin(url: str) -> None:
    with pytest.raises(InvalidUrlError, match="a path that starts with one '/' is needed"):
        ALL.origin(url)


def test_address_is_covered_if_it_is_public_or_in_a_network_of_the_list() -> None:
    allowed = parse_list("a.test,10.1.2.0/24,[fd00::]/8:81")

    assert allowed.covers("8.8.8.8", 12345)  # the host and its port were looked at in the URL
    assert allowed.covers("10.1.2.3", 443)
    assert allowed.covers("::ffff:10.1.2.3", 80)
    assert allowed.covers("fd00::1", 81)
    assert not allowed.covers("10.1.2.3", 81)
    assert not allowed.covers("10.1.3.3", 80)
    assert not allowed.covers("fd00::1", 80)


@pytest.mark.parametrize(
    "entry",
    [
        "http://a.test", "a.test/x", "user:secret@a.test", "http://user:secret@a.test/", "a b", "a..b", "a.test.", "-a",
        "*a.test", "a.*", "**", "*.", "*.*.a", ".a.test", "a:0", "a:65536", "a:x", "a:", "*:", "a:80:80", "127.1", "0x7f.1",
        "2130706433", "10.1.2.3/24", "10.0.0.0/33", "10.0.0.0/-1", "[::1", "::1", "fd00::/8", "[fd00::/8]", "[fd00::1]/8",
        "[::ffff:10.0.0.1]", "[::ffff:0:0]/96", "[64:ff9b::]/96", "[2002:a00:1::]", "[fe80::1%eth0]", "h\u00e9.test",
        "a\u3002test", "\u212aelvin.test", "localhost/8", "a\x00", "a.test\nb.test",
    ],
)  # fmt: skip
def test_bad_entry_is_named_with_what_is_allowed(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"is no entry of an allow-list.*hooks\.example\.com") as raised:
        parse_list(f"good.test,{entry}")

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("value", [5, None, {"a": 1}, ["a.test", 5], {"a.test"}, b"a.test"])
def test_list_is_text_or_a_list_of_texts(value: object) -> None:
    with pytest.raises(ConfigError, match="isn't a list of entries"):
        parse_list(value)


def test_text_of_a_list_means_the_list() -> None:
    allowed = parse_list(["A.test", "*.b.test:81", "*", "10.0.0.0/8", "[fd00::]/8:81"])

    assert str(allowed) == "a.test,*.b.test:81,*,10.0.0.0/8,[fd00::]/8:81"
    assert parse_list(str(allowed)) == allowed == parse_list(allowed)
    assert hash(parse_list(str(allowed))) == hash(allowed)
    assert (bool(allowed), bool(NOWHERE), bool(parse_list(""))) == (True, False, False)
    assert allowed != NOWHERE == AllowList()


@given(st.text())
def test_any_text_is_a_list_or_an_error_of_ours(text: str) -> None:
    try:
        allowed = parse_list(text)
    except Error:
        return

    assert parse_list(str(allowed)) == allowed
