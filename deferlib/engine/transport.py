"""The seam between the engine and whatever carries a delivery to its target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from deferlib.core.model import Delivery, Micros, Result, repr_without

ERROR_LENGTH = 500  # characters of an answer kept for people


class Request(NamedTuple):
    """A delivery as it goes over the wire, made and signed at the moment it is sent."""

    method: str
    url: str
    headers: list[str]  # "Name: value"; "Name;" where the value is empty
    body: bytes

    def __repr__(self) -> str:
        return repr_without(self, "headers", "body")


class Transport(Protocol):
    """Carries deliveries. The engine's thread calls everything but `wake`; nothing here touches a database."""

    def room(self, base: str) -> int:
        """Return how many more deliveries to *base* would start at once (or within milliseconds)."""

    def passes(self, base: str, queue: str) -> bool:
        """Tell whether one of *queue*, if it has nothing there, would start before what waits, at once or almost."""

    def send(self, delivery: Delivery) -> None:
        """Take a delivery; its `Result` comes with `results`. Never blocks."""

    def results(self) -> Sequence[Result]:
        """Return and forget the results that have come since the last call. Never blocks."""

    def cancel(self, id: int, claims: int) -> None:
        """The delivery's lease is lost: stop it if that can be done, and don't report it."""

    def withdraw(self) -> Sequence[Result]:
        """Take back every delivery that hasn't started: results of kind UNSENT."""

    def wait(self, until: Micros) -> None:
        """Work until there is a result, a `wake`, or the clock reaches *until*."""

    def wake(self) -> None:
        """End the present or next `wait` now. From any thread or signal handler."""

    def close(self) -> None:
        """Drop what is still on its way, without a result."""
