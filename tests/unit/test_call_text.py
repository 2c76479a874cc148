"""A call as people read it, from its payload, with nothing of it run."""

from __future__ import annotations

import collections
import enum
import functools
import pickle
import time
from datetime import UTC, date, datetime, timedelta, timezone
from datetime import time as clock
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deferlib import keys, payload
from deferlib.call_text import CallText, call_text, read_call
from deferlib.payload import Binding
from deferlib.secret_names import is_secret
from tests.unit.test_disassembly import REAL, mutants, shown

RING = keys.parse("a-key-of-sixteen-bytes-or-more")
OTHER = keys.parse("another-key-of-sixteen-bytes")
UNKNOWN = f"unknown key {RING.signing.id.hex()}"
PLACE = __name__
ran: list[str] = []


def call(*args: Any, **kwargs: Any) -> None:
    """The call that is described."""


class Colour(enum.Enum):
    RED = 1


class User:
    def __init__(self) -> None:
        ran.append("init")

    def __setstate__(self, state: object) -> None:
        ran.append("setstate")

    def __getstate__(self) -> object:
        return {"secret": "hunter2"}

    def mail(self) -> None: ...

    @classmethod
    def all(cls) -> None: ...


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return trapped, ("x",)


def trapped(text: str) -> str:
    ran.append(text)
    return text


class Names(list[str]):
    pass


def sealed(*args: Any, **kwargs: Any) -> bytes:
    return payload.seal(payload.dump_call(call, args, kwargs), RING.signing, None)


def of_pickles(callable_pickle: bytes, arguments: bytes, label: str = "app.f") -> bytes:
    body = len(callable_pickle).to_bytes(4, "big") + callable_pickle + arguments
    return payload.seal(payload.Call(body, label, 0), RING.signing, None)


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, ""),
        (("Hello, world!", 42, True), {}, "'Hello, world!', 42, True"),
        ((None, 1.5, b"x", bytearray(b"y")), {}, "None, 1.5, b'x', bytearray(b'y')"),
        ((None,), {"subject": "Welcome", "to": ["a", "b"]}, "None, subject='Welcome', to=['a', 'b']"),
        ((7,), {"user_id": 42, "when": datetime(2026, 1, 2, 3, 4)}, # noqa: DTZ001
         "7, user_id=42, when=datetime.datetime(2026, 1, 2, 3, 4)"),
        ((datetime(2026, 1, 2, tzinfo=UTC), Decimal("1.5"), {1}), {},
         "datetime.datetime(2026, 1, 2, 0, 0, tzinfo=datetime.timezone.utc), decimal.Decimal('1.5'), {1}"),
        ((datetime(2026, 1, 2, fold=1, tzinfo=ZoneInfo("Europe/Vienna")),), {},
         "datetime.datetime(2026, 1, 2, 0, 0, fold=1, tzinfo=zoneinfo.ZoneInfo('Europe/Vienna'))"),
        ((clock(3, 4, 5, 6, fold=1), clock(3, tzinfo=timezone(timedelta(hours=1)))), {},
         "datetime.time(3, 4, 5, 6, fold=1), "
         "datetime.time(3, 0, tzinfo=datetime.timezone(datetime.timedelta(seconds=3600)))"),
        ((date(2026, 1, 2), timedelta(1, 2)), {}, "datetime.date(2026, 1, 2), datetime.timedelta(days=1, seconds=2)"),
        ((UUID(int=5),), {}, "uuid.UUID('00000000-0000-0000-0000-000000000005')"),
        ((range(3), slice(1, 2), 1j), {}, "range(0, 3, 1), slice(1, 2, None), complex(0.0, 1.0)"),
        ((set(), frozenset(), frozenset({1}), (), (1,)), {}, "set(), frozenset(), frozenset({1}), (), (1,)"),
        ((1 << 256,), {}, "<a number of 257 bits>"),
        ((Colour.RED,), {}, f"{PLACE}.Colour(1)"),
        ((PurePosixPath("/tmp/x"),), {}, "pathlib.PurePosixPath('/', 'tmp', 'x')"),
        ((Names(["a"]), collections.OrderedDict(a=1)), {}, f"<{PLACE}.Names>, <collections.OrderedDict>"),
        ((User.all, len), {}, f"{PLACE}.User.all, len"),
        ((functools.partial(call, 1, pin=2),), {}, f"functools.partial({PLACE}.call, 1, pin='***')"),
        (("x" * 1000,), {}, f"'{'x' * 59}…'"),
        ((b"x" * 1000,), {}, f"b'{'x' * 57}…'"),
        ((list(range(1000)),), {}, "[0, 1, 2, 3, 4, …]"),
        (({str(n): n for n in range(9)},), {}, "{'0': 0, '1': 1, '2': 2, '3': 3, '4': 4, …}"),
        (([[[[[[1]]]]]],), {}, "[[[[[…]]]]]"),
        ((lambda: 1,), {}, "<lambda>"),
    ],
)  # fmt: skip
def test_arguments_are_shown_as_python(args: tuple[Any, ...], kwargs: dict[str, Any], text: str) -> None:
    assert read_call(sealed(*args, **kwargs), RING) == CallText(f"{PLACE}.call({text})", True)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_shown_the_same(protocol: int) -> None:
    args = (datetime(2026, 1, 2, tzinfo=UTC), b"\xff", Decimal(1), UUID(int=5), [None, 1.5])
    data = of_pickles(pickle.dumps(call, protocol), pickle.dumps((args, {}), protocol))

    assert call_text(data, RING) == (
        "app.f(datetime.datetime(2026, 1, 2, 0, 0, tzinfo=datetime.timezone.utc), b'\\xff', decimal.Decimal('1'), "
        "uuid.UUID('00000000-0000-0000-0000-000000000005'), [None, 1.5])"
    )


def test_nothing_of_the_call_is_run_or_shown_of_foreign_objects() -> None:
    user = User()
    body = sealed(user, Trap(), User, user.mail)
    ran.clear()

    shown = call_text(body, RING)

    assert shown == f"{PLACE}.call(<{PLACE}.User>, {PLACE}.trapped('x'), {PLACE}.User, <{PLACE}.User>.mail)"
    assert ran == []
    assert "hunter2" not in shown


def test_line_is_cut_at_its_end() -> None:
    shown = call_text(sealed(*range(1000)), RING)

    assert len(shown) == 200
    assert shown.endswith("…")


# --- who signed it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ring", "reason"), [(None, "no key at hand"), (OTHER, UNKNOWN)])
def test_call_that_is_not_verified_is_marked(ring: keys.Keyring | None, reason: str) -> None:
    assert read_call(sealed(7), ring) == CallText(f"{PLACE}.call(7)  # not verified: {reason}", False)


def test_mark_stays_where_the_line_is_cut() -> None:
    shown = call_text(sealed(*["x" * 50] * 20), OTHER)

    assert len(shown) == 200
    assert shown.endswith(f"…  # not verified: {UNKNOWN}")


def test_forged_call_is_shown_by_what_its_pickle_names_not_by_its_label() -> None:
    data = of_pickles(pickle.dumps(trapped), pickle.dumps((("rm -rf",), {})), "app.harmless")
    assert call_text(data, RING) == "app.harmless('rm -rf')"
    forged = data.replace(b"rm -rf", b"rm -rF")

    assert call_text(forged, RING) == f"{PLACE}.trapped('rm -rF')  # not verified: wrong signature"
    assert call_text(data, OTHER) == f"{PLACE}.trapped('rm -rf')  # not verified: {UNKNOWN}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (User.all, f"{PLACE}.User.all"), (functools.partial(call, 1), f"functools.partial({PLACE}.call, 1)"),
        (7, "…"), ([1], "…"),
    ],
    ids=shown,
)  # fmt: skip
def test_callable_of_any_form_is_shown_unverified(value: object, text: str) -> None:
    data = of_pickles(pickle.dumps(value), pickle.dumps(((), {})))

    assert call_text(data, None) == f"{text}()  # not verified: no key at hand"


def test_call_that_was_moved_to_another_task_is_not_verified() -> None:
    own = Binding(7, "", "default", "/_ah/queue/deferred", "")
    body = payload.seal(payload.dump_call(call, (), {}), RING.signing, own)

    assert read_call(body, RING, own).verified
    assert read_call(body, RING).verified
    assert read_call(body, RING, own._replace(queue="mail")) == CallText(
        f"{PLACE}.call()  # not verified: signed for another task", False
    )
    assert read_call(sealed(), RING, own).verified, "one that is bound to no task may be moved"


def test_what_is_no_deferred_call_has_no_text() -> None:
    assert read_call(b"a=1&b=2", RING) == CallText("", None)
    assert read_call(b"dfr, too short", RING) == CallText("", None)


def test_call_of_a_newer_format_is_said_to_be_one() -> None:
    body = bytearray(sealed())
    body[3] = 9

    assert read_call(bytes(body), RING) == CallText("…(…)  # not verified: a newer format", False)


# --- secrets --------------------------------------------------------------------------------------------------------


SECRETS = """
    password PASSWORD password2 db_password passwd pwd dbPassword Password passphrase smtp_pass secret client_secret
    clientSecret secrets api_key apiKey APIKey apikey X-Api-Key x_api_key access_token accessToken token tokens
    Authorization Proxy-Authorization auth session_id sessionid sessionId cookie Set-Cookie cookies card_number
    cardNumber creditCard cvv cvc iban IBAN ssn private_key privateKey pin pin_code PIN otp jwt credentials csrf_token
    aws_secret_access_key AWS_SECRET_ACCESS_KEY AccountNumber
"""
NO_SECRETS = """
    author authors tokenize tokenizer pinned pinning secretary key keys sessions id compass passenger passage
    cardinal cards number spinner ascii cookiecutter authority keyboard monkey sort_key api account
"""


@pytest.mark.parametrize("name", SECRETS.split())
def test_values_by_the_names_of_secrets_are_masked(name: str) -> None:
    for body in (
        sealed(**{name: "hunter2"}),
        sealed({name: "hunter2"}),
        sealed(headers=[{"a": {name: ["hunter2"]}}]),
        sealed({name.encode(): "hunter2"}),
        sealed([(name, "hunter2")]),
        sealed(f"https://example.com/?{name}=hunter2&b=1"),
        sealed(functools.partial(call, **{name: "hunter2"})),
    ):
        shown = call_text(body, RING)

        assert name in shown
        assert "***" in shown
        assert "hunter2" not in shown


@pytest.mark.parametrize("name", NO_SECRETS.split())
def test_values_by_other_names_are_shown(name: str) -> None:
    assert call_text(sealed(**{name: "shown"}), RING) == f"{PLACE}.call({name}='shown')"
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("postgresql://shop:hunter2@db/shop", "'postgresql://shop:***@db/shop'"),
        (b"redis://u:hunter2@h", "b'redis://u:***@h'"),
        (["see https://hunter2@example.com/x"], "['see https://***@example.com/x']"),
        ("x://u:" + "hunter2" * 100 + "@host", "'x://u:***@…'"),
        (b"x://u:" + b"hunter2" * 100 + b"@host", "b'x://u:***@…'"),
        ("no secret: a@b.c", "'no secret: a@b.c'"),
        ("https://example.com/a", "'https://example.com/a'"),
    ],
)  # fmt: skip
def test_passwords_in_urls_are_masked_wherever_they_stand(value: object, text: str) -> None:
    assert call_text(sealed(value), RING) == f"{PLACE}.call({text})"


# --- whatever it is made of -----------------------------------------------------------------------------------------


def test_arguments_with_line_ends_stay_on_one_line() -> None:
    assert call_text(sealed("a\nb\x1b[31m"), RING) == f"{PLACE}.call('a\\nb\\x1b[31m')"


def test_names_can_do_nothing_to_a_terminal() -> None:
    data = of_pickles(b"", pickle.dumps(((), {"a\n\u202eb\ud800": 1}), 4), "app.\u200bf")

    assert call_text(data, RING) == "app.\\u200bf(a\\n\\u202eb\\ud800=1)"


def test_many_arguments_are_not_read() -> None:
    assert call_text(sealed(b"x" * 40_000), RING) == f"{PLACE}.call(…)"
    assert call_text(sealed(list(range(5_000))), RING) == f"{PLACE}.call(…)"


def test_broken_call_with_a_right_signature_is_shown_by_its_name() -> None:
    for body in (b"", b"\0\0\0\1", b"\0\0\0\0" + pickle.dumps(7), b"\0\0\0\0" + b"garbage", b"\xff\xff\xff\xff12"):
        data = payload.seal(payload.Call(body, "app.f", 0), RING.signing, None)

        assert call_text(data, RING) == "app.f(…)"


PAIR = b"\x86}\x86."  # (…, …) as arguments, with no keywords
BOMBS = {
    "laughs": b"\x80\4)" + b"2\x86" * 3000 + PAIR,
    "cycle": b"\x80\4]\x94h\0a0h\0h\0" + PAIR,
    "calls that were made by calls": b"\x80\4cos\npath\n" + b")R" * 1500 + b"N" + PAIR,
    "a zone that has a zone": b"\x80\4cdatetime\ndatetime\nq\1" + b"C\n\7\xea\1\1\0\0\0\0\0\0q\0N\x86Rq\2" + (
        b"0h\1h\0h\2\x86Rq\2" * 200
    ) + b"N" + PAIR,
    "a zone that is itself": (
        b"\x80\4cdatetime\ndatetime\n](C\n\7\xea\1\1\0\0\0\0\0\0eq\0R\x94h\0h\1a0h\1N" + PAIR
    ),
    "a date of no month": b"\x80\4cdatetime\ndate\nC\4\0\0\0\0\x85RN" + PAIR,
    "a number of megabytes": b"\x80\4\x8b\0\0\x70\0" + b"\x7f" * 0x700000 + b"N" + PAIR,
    "a number of 10,000 digits": b"I" + b"9" * 10_000 + b"\nN" + PAIR,
    "a number of 4,000 digits": b"I" + b"9" * 4_000 + b"\nN" + PAIR,
    "10 MB of lists": b"\x80\4" + b"]" * (10 << 20) + b".",
    "words for a pattern": pickle.dumps((("a" * 10_000 + "://" + "a" * 10_000,) * 60, {"b" * 9000: "c=" * 9000})),
    "letters for a pattern": pickle.dumps((("://" + "w" * 10_000 + "@",) * 60, {})),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_at_once(name: str) -> None:
    data = of_pickles(BOMBS[name], BOMBS[name])

    before = time.process_time()
    shown = [call_text(data, ring) for ring in (RING, OTHER)]

    assert time.process_time() - before < 1.0  # milliseconds; what grows without an end takes hours
    for text in shown:
        assert len(text) <= 200
        assert text.isprintable()


@given(
    st.binary(max_size=200) | mutants(),
    st.binary(max_size=200) | mutants() | st.sampled_from(list(BOMBS.values())),
    st.text(max_size=30),
    st.sampled_from([RING, OTHER, None]),
)
@settings(max_examples=600, deadline=None)
def test_any_payload_is_one_printable_line(
    reference: bytes, arguments: bytes, label: str, ring: keys.Keyring | None
) -> None:
    label = label.encode("utf-8", "replace").decode()
    shown = read_call(of_pickles(reference, arguments, label), ring)

    assert len(shown.text) <= 200
    assert shown.text.isprintable()
    assert shown.verified is (ring is RING)


@given(st.binary(max_size=300) | st.sampled_from(REAL).map(lambda data: b"dfr\1" + data))
def test_any_bytes_are_a_line_or_nothing(data: bytes) -> None:
    assert call_text(data, RING).isprintable()
