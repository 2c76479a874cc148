"""The current namespace, by App Engine's rules."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest

from deferlib import namespaces
from deferlib.namespaces import BadValueError, get_namespace, namespace, set_namespace, validate_namespace


@pytest.fixture(autouse=True)
def _none() -> Iterator[None]:
    set_namespace(None)
    yield
    set_namespace(None)


def test_namespace_is_empty_until_it_is_set() -> None:
    assert get_namespace() == ""
    set_namespace("tenant-1")
    assert get_namespace() == "tenant-1"
    set_namespace(None)
    assert get_namespace() == ""


def test_block_has_its_namespace_and_gives_the_former_back() -> None:
    set_namespace("outer")

    with namespace("inner"):
        assert get_namespace() == "inner"
    assert get_namespace() == "outer"

    with pytest.raises(ZeroDivisionError), namespace("inner"):
        raise ZeroDivisionError
    assert get_namespace() == "outer"

    with namespace(None):
        assert get_namespace() == ""


@pytest.mark.parametrize("value", ["", "a", "A.b_c-9", "x" * 100])
def test_letters_digits_and_three_signs_make_a_namespace(value: str) -> None:
    set_namespace(value)
    assert get_namespace() == value


@pytest.mark.parametrize("value", ["a b", "a/b", "é", "x" * 101, "a\n", "a\r\nX: y", "\x00"])
def test_other_values_are_refused_and_change_nothing(value: str) -> None:
    set_namespace("kept")

    with pytest.raises(BadValueError) as caught:
        set_namespace(value)

    assert "\n" not in str(caught.value)
    with pytest.raises(BadValueError), namespace(value):
        pass
    assert get_namespace() == "kept"


def test_callers_exception_is_raised() -> None:
    with pytest.raises(LookupError):
        validate_namespace("a b", LookupError)
    with pytest.raises(BadValueError, match="not int"):
        validate_namespace(5)  # type: ignore[arg-type]  # what is tested


def test_threads_and_contexts_have_their_own() -> None:
    set_namespace("mine")

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(get_namespace).result() == ""
        assert pool.submit(copy_context().run, get_namespace).result() == "mine"
        pool.submit(copy_context().run, set_namespace, "theirs").result()

    assert namespaces.get_namespace() == "mine"
