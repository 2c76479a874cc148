"""Functions that have moved, and functions that have changed: what becomes of the calls that wait for them."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

import deferlib
from deferlib import attempt, config, context, moved, payload
from deferlib.context import Dispatch, TaskContext
from deferlib.core.model import MINUTE
from deferlib.errors import PayloadUndecodableError
from deferlib.keys import Keyring

RING = Keyring([b"a key for the tests of moves"])
CALLS: list[Any] = []


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    CALLS.clear()
    monkeypatch.setattr(moved, "_moved", {})
    former = config.install(None)
    deferlib.configure(store="sqlite:///:memory:", key="a key for the tests of moves")
    yield
    config.install(former)


@pytest.fixture
def old() -> Iterator[types.ModuleType]:
    """A module `old_shop`, gone at the end (or before, by `forget`)."""
    module = types.ModuleType("old_shop")
    sys.modules["old_shop"] = module
    source = (
        "class Cart:\n"
        "    def __init__(self, items=()): self.items = list(items)\n"
        "    def pay(self, *by): return ('old', self.items, by)\n"
        "    @classmethod\n"
        "    def clear(cls): return ('old', cls.__name__)\n"
        "def send(to, subject='hi'): return ('old', to, subject)\n"
    )
    exec(source, module.__dict__)
    yield module
    sys.modules.pop("old_shop", None)


def forget() -> None:
    del sys.modules["old_shop"]


def sealed(fn: Any, *args: Any, **kwargs: Any) -> payload.Envelope:
    data = payload.seal(payload.dump_call(fn, args, kwargs), RING.signing, None)
    return payload.verify(data, RING, None)


def run(envelope: payload.Envelope) -> Any:
    fn, args, kwargs = payload.load_call(envelope)
    return fn(*args, **kwargs)


# --- where the new ones are -------------------------------------------------------------------------------------------


class Basket:
    def __init__(self, items: tuple[str, ...] = ()) -> None:
        self.items = list(items)

    def pay(self, *by: str) -> Any:
        return ("new", self.items, by)

    @classmethod
    def clear(cls) -> Any:
        return ("new", cls.__name__)


def send_mail(to: int, subject: str = "hi") -> Any:
    return ("new", to, subject)


def test_renamed_function_is_found_where_it_is_now(old: types.ModuleType) -> None:
    call = sealed(old.send, 7, subject="hello")
    deferlib.formerly("old_shop.send")(send_mail)
    forget()

    assert run(call) == ("new", 7, "hello")


def test_new_place_is_asked_first(old: types.ModuleType) -> None:
    """Another function may have the name by now."""
    call = sealed(old.send, 7)
    deferlib.formerly("old_shop.send")(send_mail)

    assert run(call) == ("new", 7, "hi")


def test_without_it_the_error_says_how(old: types.ModuleType) -> None:
    call = sealed(old.send, 7)
    forget()

    with pytest.raises(PayloadUndecodableError, match=r"old_shop\.send can't be loaded.*@deferlib\.formerly"):
        run(call)


def test_methods_and_objects_follow_their_class(old: types.ModuleType) -> None:
    calls = [
        sealed(old.Cart.pay, old.Cart(["a"]), "card"),
        sealed(old.Cart(["b"]).pay),
        sealed(old.Cart.clear),
        sealed(old.Cart),
    ]
    deferlib.formerly("old_shop.Cart")(Basket)
    forget()

    results = [run(call) for call in calls]

    assert results[:3] == [("new", ["a"], ("card",)), ("new", ["b"], ()), ("new", "Basket")]
    assert isinstance(results[3], Basket)


def test_arguments_of_a_moved_class_are_found_too(old: types.ModuleType) -> None:
    call = sealed(type, old.Cart(["a"]))
    deferlib.formerly("old_shop.Cart")(Basket)
    forget()

    assert run(call) is Basket


def test_what_has_not_moved_is_found_as_ever(old: types.ModuleType) -> None:
    deferlib.formerly("old_shop.other")(send_mail)

    assert run(sealed(old.send, 7)) == ("old", 7, "hi")
    assert payload.find_global("old_shop", "Cart.pay") is old.Cart.pay
    with pytest.raises(AttributeError):
        payload.find_global("old_shop", "Cart.gone")
    with pytest.raises(ModuleNotFoundError):
        payload.find_global("gone_shop", "send")


def test_function_may_have_had_several_names_and_stays_what_it_is() -> None:
    def moved_twice() -> None: ...

    assert deferlib.formerly("a.b")(deferlib.formerly("a.c")(moved_twice)) is moved_twice
    assert payload.find_global("a", "b") is payload.find_global("a", "c") is moved_twice


def test_module_that_is_loaded_again_says_the_same_again() -> None:
    def again() -> Any:
        def same() -> None: ...

        return deferlib.formerly("a.same")(same)

    again()
    assert payload.find_global("a", "same") is not again
    assert payload.find_global("a", "same") is moved.find("a", "same")


def test_name_that_two_claim_is_refused() -> None:
    deferlib.formerly("a.b")(send_mail)

    with pytest.raises(ValueError, match=r"two places, .*send_mail and .*Basket"):
        deferlib.formerly("a.b")(Basket)


@pytest.mark.parametrize("name", ["", "send", "old shop.send", "old.", ".send", "old.1st", 7, None, "os:system"])
def test_name_that_can_be_none_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="dotted name"):
        deferlib.formerly(name)


def test_only_what_can_be_called_can_move() -> None:
    with pytest.raises(ValueError, match="a function or a class, not int"):
        deferlib.formerly("a.b")(7)


# --- arguments that don't fit any more ----------------------------------------------------------------------------------


def perform(fn: Any, *args: Any, **kwargs: Any) -> attempt.Answer:
    now = context.SYSTEM_CLOCK.now()
    task = TaskContext(1, "", "default", 1, 0, now, now + MINUTE, 1, "", "/_ah/queue/deferred", context.SYSTEM_CLOCK)
    data = payload.seal(payload.dump_call(fn, args, kwargs), RING.signing, None)
    return attempt.perform(Dispatch(task, {}), data)


def note(number: int) -> None:
    CALLS.append(number)


async def note_later(number: int) -> None:
    CALLS.append(number)


class Noted:
    def __init__(self, number: int) -> None:
        CALLS.append(number)


def note_badly(number: int) -> None:
    CALLS.append(number)
    note()  # type: ignore[call-arg]


@pytest.mark.parametrize("fn", [note, note_later, Noted])
@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2), {}), ((1,), {"removed": 2})])
def test_call_with_arguments_that_are_no_more_is_kept_like_one_that_is_gone(
    fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    answer = perform(fn, *args, **kwargs)

    assert (answer.status, answer.outcome) == (500, "undecodable")
    assert f"{fn.__name__} doesn't take the arguments that were deferred: " in answer.body
    assert CALLS == []
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.parametrize(("fn", "args"), [(note_badly, (1,)), (len, (5,)), (int, ("x", "y", "z"))])
def test_type_error_from_inside_is_a_failure_like_any_other(fn: Any, args: tuple[Any, ...]) -> None:
    answer = perform(fn, *args)

    assert answer.outcome == "retry"
    assert answer.body.startswith("TypeError: ")
