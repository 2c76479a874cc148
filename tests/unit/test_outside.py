"""What a server is called with by the app runs in the server's own context."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

import pytest

from deferlib.contrib.outside import outside

NAME: ContextVar[str] = ContextVar("name", default="server")


def test_callable_sees_the_context_of_its_server_at_every_step() -> None:
    seen: list[str] = []

    async def receive(*args: int, **kwargs: int) -> Any:
        seen.append(NAME.get())
        await asyncio.sleep(0)
        seen.append(NAME.get())
        NAME.set("changed by the server")
        return args, kwargs

    async def app() -> Any:
        (wrapped,) = outside(receive)
        NAME.set("app")
        result = await wrapped(1, two=2)
        return result, NAME.get()

    assert asyncio.run(app()) == (((1,), {"two": 2}), "app")
    assert seen == ["server", "server"]


@pytest.mark.parametrize("late", [False, True])
def test_error_comes_through(late: bool) -> None:
    async def send() -> None:
        if late:
            await asyncio.sleep(0)
        raise OSError("gone")

    async def app() -> None:
        await outside(send)[0]()

    with pytest.raises(OSError, match="gone"):
        asyncio.run(app())


def test_cancelling_reaches_what_is_waited_for() -> None:
    ended: list[str] = []

    async def receive() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(NAME.get())
            raise

    async def app() -> None:
        (wrapped,) = outside(receive)
        NAME.set("app")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wrapped(), 0.01)
        waiting = asyncio.ensure_future(wrapped())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(app())
    assert ended == ["server", "server"]


def test_two_may_wait_at_once() -> None:
    async def receive(number: int) -> int:
        await asyncio.sleep(0.001)
        return number

    async def app() -> list[int]:
        (wrapped,) = outside(receive)
        return await asyncio.gather(*(wrapped(number) for number in range(20)))

    assert asyncio.run(app()) == list(range(20))
