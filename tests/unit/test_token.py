"""The dispatch token: what it vouches for can't be altered, moved, kept or guessed."""

from __future__ import annotations

import base64
import hmac
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferlib import token
from deferlib.context import Dispatch, TaskContext
from deferlib.core.model import MINUTE, SECOND, Micros
from deferlib.errors import TokenError
from deferlib.keys import Keyring

FORMATS = Path(__file__).parent.parent.parent / "docs" / "reference" / "formats.md"
SECRET = b"example-key-0123456789abcdefghij"
RING = Keyring([SECRET])
NOW: Micros = 1_763_700_000_250_000
DEADLINE: Micros = 600 * SECOND
HEADERS = {
    "X-AppEngine-QueueName": "mail",
    "X-AppEngine-TaskName": "welcome-7",
    "X-AppEngine-TaskRetryCount": "1",
    "X-AppEngine-TaskExecutionCount": "1",
    "X-AppEngine-TaskETA": "1763700000.000000",
    "X-AppEngine-Current-Namespace": "tenant-1",
    "X-AppEngine-TaskPreviousResponse": "500",
}


class At:
    """A clock that stands."""

    def __init__(self, now: Micros = NOW) -> None:
        self._now = now

    def now(self) -> Micros:
        return self._now


def dispatch(url: str = "/_ah/queue/deferred") -> Dispatch:
    context = TaskContext(
        id=7397463212345678901,
        user_name="welcome-7",
        queue="mail",
        attempt=2,
        execution_count=1,
        eta_micros=1_763_700_000_000_000,
        deadline_micros=NOW + DEADLINE,
        fence=NOW,
        namespace="tenant-1",
        url=url,
        clock=At(),
    )
    return Dispatch(context, HEADERS)


def signed(url: str = "/_ah/queue/deferred", *, base_path: str = "", body: bytes = b"hello", method: str = "POST") -> str:
    return token.sign(RING, NOW, dispatch(url), method=method, body=body, deadline=DEADLINE, base_path=base_path)


REQUEST: dict[str, Any] = {"method": "POST", "path": "/_ah/queue/deferred", "query": "", "body": b"hello"}


def read(text: str, ring: Keyring = RING, now: Micros = NOW, **request: Any) -> Dispatch:
    return token.verify(ring, At(now), text).dispatch(**{**REQUEST, **request})


def claims_of(text: str) -> dict[str, Any]:
    part = text.split(".")[2]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def test_what_was_signed_comes_back() -> None:
    task, headers = read(signed())

    expected = dispatch()
    assert headers == HEADERS
    for field in ("id", "user_name", "queue", "attempt", "execution_count", "eta_micros", "fence", "namespace", "url"):
        assert getattr(task, field) == getattr(expected.context, field)
    assert task.deadline_micros == NOW + DEADLINE


@pytest.mark.parametrize("claim", [*"mouqrbindsaxefthl"])
def test_altered_claim_is_refused(claim: str) -> None:
    version, key, _, signature = signed().split(".")
    claims = claims_of(signed())
    old = claims[claim]
    claims[claim] = {} if isinstance(old, dict) else old + 1 if isinstance(old, int) else old + "1"

    altered = b64(json.dumps(claims, separators=(",", ":")).encode())

    with pytest.raises(TokenError, match="signature is wrong"):
        read(".".join((version, key, altered, signature)))


def test_changed_retry_count_is_refused() -> None:
    version, key, _, signature = signed().split(".")
    claims = claims_of(signed())
    claims["h"]["X-AppEngine-TaskRetryCount"] = "0"

    with pytest.raises(TokenError):
        read(".".join((version, key, b64(json.dumps(claims, separators=(",", ":")).encode()), signature)))


def test_every_flipped_bit_of_a_token_is_refused() -> None:
    text = signed()

    for index, char in enumerate(text):
        for bit in range(7):
            altered = text[:index] + chr(ord(char) ^ 1 << bit) + text[index + 1 :]
            with pytest.raises(TokenError):
                read(altered)


def test_every_other_last_character_is_refused() -> None:
    text = signed()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_="

    for end in [*alphabet.replace(text[-1], ""), text[-1] + "=", text[-1] + "A", ""]:
        with pytest.raises(TokenError):
            read(text[:-1] + end)


def test_every_truncation_is_refused() -> None:
    text = signed()

    for length in range(len(text)):
        with pytest.raises(TokenError):
            read(text[:length])


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"method": "GET"}, "for a POST request"),
        ({"path": "/_ah/queue/other"}, "for the path"),
        ({"path": "/tasks/_ah/queue/deferred"}, "for the path"),
        ({"query": "a=1"}, "another query"),
        ({"body": b"hello!"}, "another body"),
        ({"body": b""}, "another body"),
    ],
)
def test_token_of_another_request_is_refused(request_: dict[str, Any], why: str) -> None:
    with pytest.raises(TokenError, match=why):
        read(signed(), **request_)


@pytest.mark.parametrize("edge", [-10 * MINUTE, DEADLINE + 10 * MINUTE])
def test_token_holds_from_ten_minutes_before_to_ten_after_the_deadline(edge: Micros) -> None:
    inside, outside = (edge + 1, edge - 1) if edge < 0 else (edge - 1, edge + 1)

    assert read(signed(), now=NOW + edge)
    assert read(signed(), now=NOW + inside)
    with pytest.raises(TokenError, match="expired, or the clocks differ"):
        read(signed(), now=NOW + outside)


def test_query_of_any_length_is_bound() -> None:
    for query in ("a=1", "x" * 200, "x" * 201, "x" * 3_000):
        text = signed(f"/hook?{query}")

        found = read(text, path="/hook", query=query)

        assert found.context.url == f"/hook?{query}"
        for other in (query[:-1], query + "x", query[:-1] + "y", ""):
            with pytest.raises(TokenError, match="another query"):
                read(text, path="/hook", query=other)


def test_digest_of_a_long_query_cannot_stand_for_it() -> None:
    text = signed("/hook?" + "x" * 300)

    with pytest.raises(TokenError, match="another query"):
        read(text, path="/hook", query=claims_of(text)["r"])


def test_url_with_an_empty_query_stays_what_it_is() -> None:
    assert read(signed("/hook?"), path="/hook").context.url == "/hook?"
    assert read(signed("/hook"), path="/hook").context.url == "/hook"


def test_path_is_compared_decoded() -> None:
    assert read(signed("/caf%C3%A9/a%20b"), path="/café/a b").context.url == "/caf%C3%A9/a%20b"


@pytest.mark.parametrize("path", ["/work/a/b", "/work/a%2Fb", "/work/a%2fb"])
def test_encoded_slash_may_be_left_as_it_is(path: str) -> None:
    text = signed("/work/a%2Fb")

    assert read(text, path=path).context.url == "/work/a%2Fb"
    with pytest.raises(TokenError, match="path"):
        read(text, path="/work/a%252Fb")


def test_path_of_the_base_url_is_bound_and_a_stripped_prefix_is_put_back() -> None:
    text = signed("/hook", base_path="/tasks")

    assert read(text, path="/tasks/hook")
    assert read(text, path="/hook", prefix="/tasks")
    with pytest.raises(TokenError):
        read(text, path="/hook")
    with pytest.raises(TokenError):
        read(text, path="/hook", prefix="/other")


def test_longest_urls_names_and_namespaces_fit() -> None:
    context = TaskContext(
        id=2**63 - 1, user_name="n" * 500, queue="q" * 100, attempt=10**6, execution_count=10**6, eta_micros=2**53,
        deadline_micros=NOW, fence=2**53, namespace="s" * 100, url="/" + "p" * 2_082 + "?" + "q" * 1_900, clock=At(),
    )  # fmt: skip
    headers = {**HEADERS, "X-AppEngine-TaskName": "n" * 500, "X-AppEngine-QueueName": "q" * 100}

    text = token.sign(RING, NOW, Dispatch(context, headers), method="POST", body=b"", deadline=DEADLINE)

    assert len(token.HEADER) + len(text) + 4 < 8_190  # gunicorn's limit for one header


def test_token_of_an_unknown_key_is_refused_by_the_keys_id() -> None:
    other = Keyring([b"another key of sufficient length"])

    with pytest.raises(TokenError, match=RING.signing.id.hex()):
        read(signed(), ring=other)
    assert read(signed(), ring=Keyring([b"another key of sufficient length", SECRET]))


def test_key_of_another_purpose_signs_no_tokens() -> None:
    text = signed().rpartition(".")[0]

    with pytest.raises(TokenError):
        read(f"{text}.{b64(hmac.digest(RING.signing.payload, text.encode(), 'sha256'))}")


def test_error_repeats_no_control_characters() -> None:
    hostile = ["v1.00\n00\t00 00 00 00 00 00.e30.x", "v1.\x1b[2J.e30.x", "v1\r\n.a.b.c"]

    for text in hostile:
        with pytest.raises(TokenError) as caught:
            read(text)
        assert str(caught.value).isprintable()


@given(st.text(max_size=300) | st.text("v1.abcdef0123456789-_=", max_size=300).map("v1.".__add__) | st.just("x" * 20_000))
def test_garbage_raises_token_errors_only(text: str) -> None:
    with pytest.raises(TokenError):
        read(text)


# --- the format doesn't drift ---------------------------------------------------------------------------------------


def documented(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)```", FORMATS.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def test_document_shows_the_token_that_is_made() -> None:
    assert signed() == documented("token").replace("\n", "")
    assert claims_of(signed()) == json.loads(documented("claims"))


def test_table_of_the_document_has_every_claim_in_order() -> None:
    table = re.findall(r"^\| `(\w)` \|", FORMATS.read_text(encoding="utf-8"), re.MULTILINE)

    assert table == list(claims_of(signed()))


def test_program_of_the_document_verifies_what_the_engine_signs() -> None:
    program: dict[str, Any] = {}
    exec(documented("verify"), program)
    verify = program["verify"]
    tokens = {"": signed("/a%20b?x=1", base_path="/app"), "y": signed("/a%20b?" + "y" * 300, base_path="/app")}

    for query, text in (("x=1", tokens[""]), ("y" * 300, tokens["y"])):
        assert verify(SECRET, text, NOW, "POST", "/app/a b", query, b"hello") == claims_of(text)
        assert verify(SECRET, text[:-1] + "?", NOW, "POST", "/app/a b", query, b"hello") is None
        assert verify(b"another key", text, NOW, "POST", "/app/a b", query, b"hello") is None
        assert verify(SECRET, text, NOW + 2 * DEADLINE + 1, "POST", "/app/a b", query, b"hello") is None
        assert verify(SECRET, text, NOW, "GET", "/app/a b", query, b"hello") is None
        assert verify(SECRET, text, NOW, "POST", "/app/a", query, b"hello") is None
        assert verify(SECRET, text, NOW, "POST", "/app/a b", query + "z", b"hello") is None
        assert verify(SECRET, text, NOW, "POST", "/app/a b", query, b"other") is None
