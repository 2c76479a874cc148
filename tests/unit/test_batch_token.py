"""The token of a batch: what it vouches for can't be altered, moved, kept or guessed, nor stand for one attempt's."""

from __future__ import annotations

import base64
import hmac
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferlib import batch, token
from deferlib.batch import Told
from deferlib.core.model import MINUTE, Delivery, Micros
from deferlib.deferred import DEFAULT_URL
from deferlib.engine import batching
from deferlib.engine.dispatch import batch_signer
from deferlib.errors import TokenError, TokenMismatchError
from deferlib.keys import Keyring
from tests.unit.batches import DEADLINE, NOW, RING, claim_of, headers_text, token_of
from tests.unit.test_token import FORMATS, At, b64, claims_of, dispatch, documented
from tests.unit.test_token import NOW as NOW_THERE
from tests.unit.test_token import RING as DOCUMENTED

BODY = b"several calls"
REQUEST: dict[str, Any] = {"path": DEFAULT_URL, "query": "", "body": BODY}


def signed(url: str = DEFAULT_URL, *, base_path: str = "", body: bytes = BODY) -> str:
    return token.sign_batch(RING, NOW, url=url, body=body, deadline=DEADLINE, base_path=base_path)


def read(text: str, ring: Keyring = RING, now: Micros = NOW, **request: Any) -> tuple[str, Micros]:
    return token.verify_batch(ring, At(now), text).request(**{**REQUEST, **request})


def with_claims(text: str, claims: dict[str, Any]) -> str:
    version, key, _, signature = text.split(".")
    return ".".join((version, key, b64(json.dumps(claims, separators=(",", ":")).encode()), signature))


def test_what_was_signed_comes_back() -> None:
    assert read(signed()) == (DEFAULT_URL, NOW)
    assert read(signed(DEFAULT_URL + "?a=1"), query="a=1") == (DEFAULT_URL + "?a=1", NOW)
    assert set(claims_of(signed())) == set("mouqrbtl")


@pytest.mark.parametrize("claim", [*"mouqrbtl"])
def test_altered_claim_is_refused(claim: str) -> None:
    claims = claims_of(signed())
    old = claims[claim]

    for other in (old + 1, old - 1, 0) if isinstance(old, int) else (old + "1", " " + old):
        with pytest.raises(TokenError, match="signature is wrong"):
            read(with_claims(signed(), {**claims, claim: other}))
    with pytest.raises(TokenError, match="signature is wrong"):
        read(with_claims(signed(), {key: value for key, value in claims.items() if key != claim}))
    assert with_claims(signed(), claims) == signed()


def test_every_flipped_bit_of_a_token_is_refused() -> None:
    text = signed()

    for index, char in enumerate(text):
        for bit in range(7):
            with pytest.raises(TokenError):
                read(text[:index] + chr(ord(char) ^ 1 << bit) + text[index + 1 :])


def test_every_other_end_is_refused() -> None:
    text = signed()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_="

    for end in [*alphabet.replace(text[-1], ""), text[-1] + "=", text[-1] + "A"]:
        with pytest.raises(TokenError):
            read(text[:-1] + end)
    for length in range(len(text)):
        with pytest.raises(TokenError):
            read(text[:length])


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"path": "/_ah/queue/other"}, "for the path"),
        ({"path": "/"}, "for the path"),
        ({"path": "/tasks/_ah/queue/deferred"}, "for the path"),
        ({"path": "/tasks/_ah/queue/deferred", "prefix": "/tasks"}, "for the path"),
        ({"query": "a=1"}, "another query"),
        ({"query": "a" * 300}, "another query"),
        ({"body": BODY + b"!"}, "another body"),
        ({"body": b""}, "another body"),
    ],
)
def test_token_of_another_request_is_a_mismatch(request_: dict[str, Any], why: str) -> None:
    with pytest.raises(TokenMismatchError, match=why):
        read(signed(), **request_)


def test_token_is_for_a_post() -> None:
    assert claims_of(signed())["m"] == "POST"


def test_path_of_the_base_url_is_bound_and_a_stripped_prefix_is_put_back() -> None:
    text = signed(base_path="/tasks")

    assert read(text, path="/tasks" + DEFAULT_URL)
    assert read(text, prefix="/tasks")
    assert read(text, path="/root/tasks" + DEFAULT_URL, inner="/tasks" + DEFAULT_URL)
    for request in ({}, {"prefix": "/other"}):
        with pytest.raises(TokenMismatchError):
            read(text, **request)


@pytest.mark.parametrize("edge", [-10 * MINUTE, DEADLINE + 10 * MINUTE])
def test_token_holds_from_ten_minutes_before_to_ten_after_the_deadline(edge: Micros) -> None:
    inside, outside = (edge + 1, edge - 1) if edge < 0 else (edge - 1, edge + 1)

    assert read(signed(), now=NOW + edge)
    assert read(signed(), now=NOW + inside)
    with pytest.raises(TokenError, match="expired, or the clocks differ"):
        read(signed(), now=NOW + outside)


def test_token_of_an_unknown_key_is_refused_by_the_keys_id() -> None:
    with pytest.raises(TokenError, match=RING.signing.id.hex()):
        read(signed(), ring=Keyring([b"another key of sufficient length"]))


def test_key_of_another_purpose_signs_no_tokens() -> None:
    text = signed().rpartition(".")[0]

    with pytest.raises(TokenError):
        read(f"{text}.{b64(hmac.digest(RING.signing.payload, text.encode(), 'sha256'))}")


# --- the two kinds ----------------------------------------------------------------------------------------------------


def one(body: bytes = BODY) -> str:
    """Return the token of one attempt, for the same request."""
    return token.sign(RING, NOW, dispatch(), method="POST", body=body, deadline=DEADLINE)


def test_token_of_one_attempt_is_no_batchs_and_the_reverse() -> None:
    """Each is refused as what it isn't, before its claims are looked at: a batch's has no task."""
    assert (token.is_batch(one()), token.is_batch(signed())) == (False, True)
    with pytest.raises(TokenError, match="unknown format"):
        token.verify_batch(RING, At(), one())
    with pytest.raises(TokenError, match="unknown format"):
        token.verify(RING, At(), signed())


def test_renamed_token_is_refused() -> None:
    """The kind is signed, too."""
    with pytest.raises(TokenError, match="signature is wrong"):
        token.verify_batch(RING, At(), "b" + one()[1:])
    with pytest.raises(TokenError, match="signature is wrong"):
        token.verify(RING, At(), "v" + signed()[1:])


@pytest.mark.parametrize("version", ["b2", "B1", "b", "b1x", "", " b1", "b1 ", "xb1", "v1"])
def test_other_versions_are_refused(version: str) -> None:
    for text in (version + signed()[2:], one().replace("v1", version, 1)):
        if text != one():
            with pytest.raises(TokenError):
                token.verify(RING, At(), text)
        with pytest.raises(TokenError):
            token.verify_batch(RING, At(), text)


def test_two_tokens_are_none() -> None:
    """As servers join two headers of a name."""
    for text in (f"{signed()},{signed()}", f"{signed()}, {one()}", f"{one()},{signed()}"):
        with pytest.raises(TokenError):
            read(text)
        with pytest.raises(TokenError):
            token.verify(RING, At(), text)


def test_error_repeats_no_control_characters() -> None:
    for text in ["b1.00\n00\t00 00 00 00 00 00.e30.x", "b1.\x1b[2J.e30.x", "b1\r\n.a.b.c"]:
        with pytest.raises(TokenError) as caught:
            read(text)
        assert str(caught.value).isprintable()


@given(st.text(max_size=300) | st.text("b1.abcdef0123456789-_=", max_size=300).map("b1.".__add__) | st.just("b" * 20_000))
def test_garbage_raises_token_errors_only(text: str) -> None:
    with pytest.raises(TokenError):
        read(text)


def test_token_fits_into_a_header_whatever_its_batch() -> None:
    long = "/" + "p" * 2_082 + "?" + "q" * 1_900

    assert len(token.HEADER) + len(signed(long, body=bytes(10**6))) + 4 < 8_190  # gunicorn's limit for one header
    assert len(signed(body=bytes(10**6))) == len(signed())


def test_same_signature_vouches_for_the_true_claims_only() -> None:
    """What is signed is the text as it stands, not what it decodes to."""
    version, key, claims, signature = signed().split(".")
    spaced = b64(json.dumps(json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))).encode())

    with pytest.raises(TokenError, match="signature is wrong"):
        read(".".join((version, key, spaced, signature)))


# --- the format doesn't drift -----------------------------------------------------------------------------------------


def test_document_shows_the_batch_that_is_made() -> None:
    common = {"queue": "mail", "eta": NOW_THERE - 250_000, "claims": NOW_THERE - 50}
    first = claim_of(7397463212345678901, name="welcome-7", namespace="tenant-1", body=b"hello", **common)
    second = claim_of(7397463212345678902, body=b"world!", **common)
    parts = [(first, headers_text(("X-Tenant", "7"))), (second, "")]
    deliveries = [Delivery(claim._replace(headers=text), "http://app", DEADLINE) for claim, text in parts]

    request = batch_signer(DOCUMENTED)(deliveries, NOW_THERE)

    assert request.body == bytes.fromhex("000000d6") + documented("batch").replace("\n", "").encode()
    assert token_of(request) == documented("batch-token").replace("\n", "")


def test_document_shows_the_answer_that_is_made() -> None:
    answers = [Told(200, "ok", 180, "Success"), Told(500, "retry", 95, "ValueError: no")]

    assert documented("batch-answer").strip() == batch.tell(answers)


def test_numbers_of_the_document_are_those_of_the_code() -> None:
    page = " ".join(FORMATS.read_text(encoding="utf-8").split())

    assert f"When {batch.PATIENCE // 1000} milliseconds have passed" in page
    assert f"at most {batch.TEXT} characters" in page
    assert f"reads {batch.ANSWER_BYTES // 1024} KiB for each call" in page
    assert f"less than {batch.MOST_BYTES // 1024} KiB" in page
    assert (
        f"about {batching.LONGEST // 1000} milliseconds of work as far as is known, and {batching.BYTES // 1024} KiB"
        in page
    )
