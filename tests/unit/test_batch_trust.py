"""Who may have several calls run by one request, and which handlers say that they take such requests."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from deferlib import batch, deferred, inbound, token
from deferlib.context import Dispatch
from deferlib.core.model import MINUTE, Delivery, Micros
from deferlib.deferred import DEFAULT_URL
from deferlib.engine.transport import Request
from deferlib.keys import Keyring
from deferlib.server.wsgi import wrap_wsgi_app
from tests.unit.batch_senders import ASGI_APP, BOTH, CLOCK, EARLY, Post, app_runtime, run, wsgi
from tests.unit.batches import (
    DEADLINE,
    NOW,
    RING,
    call_of,
    claim_of,
    delivery,
    headers_text,
    request_of,
    token_of,
)

CALLS: list[Any] = []


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    CALLS.clear()
    with app_runtime():
        yield


def note(value: Any = "ran") -> None:
    CALLS.append(value)


class Canary:
    """A pickle of one tells when it is read."""

    def __reduce__(self) -> Any:
        return note, ("canary",)


# --- who may send one -------------------------------------------------------------------------------------------------


def forged(ring: Keyring = RING, *, now: Micros = NOW) -> Request:
    canary = Delivery(claim_of(1, body=pickle.dumps(Canary())), "http://app", DEADLINE)
    return request_of([canary, delivery(2, note)], ring=ring, now=now)


@BOTH
def test_batch_that_no_engine_has_made_is_refused_and_nothing_of_it_runs(send: Post) -> None:
    genuine, other = forged(), Keyring([b"another key of sufficient length"])
    text = token_of(genuine)
    mismatched = [genuine.body + b"!", genuine.body[:-1], b"", request_of([delivery(5, note)] * 2).body]

    for signature in ("b1.", "b1.x.y.z", text[:-1], "v1" + text[2:], f"{text},{text}", token_of(forged(other))):
        answer = send(genuine.body, signature)
        assert (answer.status, answer.outcome) == (403, "untrusted"), signature
    for late in (forged(now=NOW - EARLY - DEADLINE - 11 * MINUTE), forged(now=NOW + 11 * MINUTE)):
        assert send(late.body, token_of(late)).outcome == "untrusted"
    for body in mismatched:
        answer = send(body, text)
        assert (answer.status, answer.outcome) == (403, "mismatched")
    assert CALLS == []


@BOTH
def test_body_of_a_batch_with_an_invalid_token_is_not_read(send: Post) -> None:
    request = forged()
    options = {"wsgi.input": None} if send is wsgi else {}

    answer = send(request.body, token_of(forged(Keyring([b"another key of sufficient length"]))), **options)

    assert answer.outcome == "untrusted"


@BOTH
def test_token_of_one_kind_with_the_body_of_the_other_is_refused(send: Post) -> None:
    several = request_of([delivery(1, note), delivery(2, note)])
    single = call_of(claim_of(1), note)
    (part, _) = batch.unpack(several.body)
    dispatch = part.dispatch(DEFAULT_URL, NOW, CLOCK)
    one = Dispatch(dispatch.context, dict(dispatch.headers))
    as_one = token.sign(RING, NOW, one, method="POST", body=several.body, deadline=DEADLINE)
    as_batch = token.sign_batch(RING, NOW, url=DEFAULT_URL, body=single, deadline=DEADLINE)

    assert send(several.body, as_one).outcome == "unverified"
    assert send(single, as_batch).outcome == "mismatched"
    assert CALLS == []


@BOTH
def test_no_flipped_bit_of_a_call_among_others_runs(send: Post) -> None:
    """Of what a store may hold; an engine vouches for the whole request."""
    genuine = call_of(claim_of(1), note, "forged")
    for first in range(3 if send is wsgi else 0, 8 * len(genuine), 31):
        altered = bytearray(genuine)
        altered[first // 8] ^= 1 << first % 8
        forged_call = Delivery(claim_of(1, body=bytes(altered)), "http://app", DEADLINE)

        answer = run(send, [delivery(2, note), forged_call, delivery(3, note)])

        before, outcome, after = answer.outcomes(3)
        assert (before, after) == ("ok", "ok")
        assert outcome in ("unverified", "key-unknown", "newer"), first

    assert set(CALLS) == {"ran"}


@BOTH
def test_batch_at_another_url_is_refused(send: Post) -> None:
    request = request_of([delivery(1, note), delivery(2, note)])
    app = wrap_wsgi_app(unreachable) if send is wsgi else ASGI_APP
    elsewhere: dict[str, Any] = {"PATH_INFO": "/_ah/queue/mail"} if send is wsgi else {"path": "/_ah/queue/mail"}

    answer = send(request.body, token_of(request), app=app, **elsewhere)

    assert (answer.status, answer.outcome) == (403, "untrusted")
    assert CALLS == []


def unreachable(environ: Any, start_response: Any) -> Any:
    CALLS.append("a view")
    start_response("200 OK", [])
    return []


def test_batch_comes_by_post_only() -> None:
    request = request_of([delivery(1, note), delivery(2, note)])

    for method in ("GET", "PUT", "HEAD", "post"):
        assert wsgi(request.body, token_of(request), REQUEST_METHOD=method).status in (403, 405)
    assert CALLS == []


@BOTH
def test_batch_runs_in_an_app_with_a_handler_mounted_and_under_a_prefix(send: Post) -> None:
    request = request_of([delivery(id, note, id, base="http://app/tasks") for id in (1, 2)])
    options: dict[str, Any] = {"SCRIPT_NAME": "/tasks"} if send is wsgi else {"root": "/tasks"}

    answer = send(request.body, token_of(request), app=wrap_wsgi_app(unreachable) if send is wsgi else ASGI_APP, **options)

    assert answer.outcomes(2) == ["ok", "ok"]
    assert CALLS == [1, 2]


SMALL = "appengine,push_task_bytes=1024,call_bytes=1024"


@BOTH
def test_batch_passes_a_handler_with_small_limits(send: Post) -> None:
    """The engine doesn't know them."""
    headers = headers_text(*((f"X-{number}", "x" * 90) for number in range(9)))
    large = [delivery(id, note, "x" * 1_500, headers=headers) for id in range(1, 33)]

    with app_runtime(limits=SMALL):
        assert len(request_of(large).body) > inbound.max_body()
        assert run(send, large).outcomes(32) == ["ok"] * 32


@BOTH
def test_batch_beyond_any_engines_is_refused_unread(send: Post) -> None:
    huge = request_of([delivery(id, note, "x" * 100_000) for id in range(1, 4)])

    with app_runtime(limits=SMALL):
        answer = send(huge.body, token_of(huge))

    assert (answer.status, answer.outcome) == (413, "retry")
    assert CALLS == []


# --- who takes batches, and says so -----------------------------------------------------------------------------------


def single(id: int = 1) -> tuple[bytes, str]:
    claim = claim_of(id)
    body = call_of(claim, note)
    (part,) = batch.unpack(request_of([Delivery(claim, "http://app", DEADLINE)]).body)
    dispatch = part.dispatch(DEFAULT_URL, NOW, CLOCK)
    whole = Dispatch(dispatch.context, dict(dispatch.headers))
    return body, token.sign(RING, NOW, whole, method="POST", body=body, deadline=DEADLINE)


@BOTH
def test_handler_tells_how_long_a_call_took_to_an_engine_only(send: Post) -> None:
    body, signature = single()

    assert send(body, signature).headers["x-deferlib-took"].isdecimal()
    for answer in (send(body, ""), send(body, signature[:-1]), send(body + b"!", signature)):
        assert answer.status == 403
        assert "x-deferlib-took" not in answer.headers


def test_failed_call_and_a_batch_tell_no_more_than_they_know() -> None:
    request = request_of([delivery(1, note), delivery(2, note)])

    assert "x-deferlib-took" not in wsgi(request.body, token_of(request)).headers


class OwnPost(deferred.Handler):
    def post(self, environ: dict[str, Any]) -> Any:
        CALLS.append("own post")
        return super().post(environ)


def own_view(environ: Any, start_response: Any) -> Any:
    return deferred.application(environ, start_response)


@pytest.mark.parametrize("app", [OwnPost(), wrap_wsgi_app(own_view, use_deferred=False)], ids=["override", "view"])
def test_where_something_stands_around_each_call_it_comes_alone(app: Any) -> None:
    body, signature = single()
    request = request_of([delivery(1, note), delivery(2, note)])

    alone = wsgi(body, signature, app=app)
    together = wsgi(request.body, token_of(request), app=app)

    assert (alone.outcome, "x-deferlib-took" in alone.headers) == ("ok", False)
    assert (together.status, together.outcome) == (403, "untrusted")
    assert [each for each in CALLS if each != "own post"] == ["ran"]


def test_visitors_can_send_no_such_header() -> None:
    seen: list[Any] = []

    def view(environ: Any, start_response: Any) -> Any:
        seen.append(environ)
        start_response("200 OK", [])
        return []

    wsgi(b"", "", app=wrap_wsgi_app(view), PATH_INFO="/", HTTP_X_DEFERLIB_TOOK="5", HTTP_X_DEFERLIB_OUTCOME="batch")

    assert not [key for key in seen[0] if "DEFERLIB" in key]
