"""What stands between the engine of `deferlib dev` and the app, which comes and goes."""

from __future__ import annotations

from collections.abc import Sequence

from deferlib.core.model import Delivery, Kind, Micros, Result
from deferlib.engine.transport import Transport


class Gate:
    """A transport that delivers to *base* only while the app is there, and tells a reload from a failure.

    Shut, it has no room: what is due waits in the store, uncharged. Calls that a reload cuts off are reported as
    interrupted, so that they run again at once: those whose connection breaks, and those that fail because the process
    around them ends, or meet the page in the app's place.
    """

    def __init__(self, transport: Transport, base: str) -> None:
        self._transport = transport
        self._base = base
        self._open = False
        self._reloading = False
        self._sent: set[tuple[int, int]] = set()  # to the app, not yet ended

    def open(self) -> None:
        """The app is there. From any thread."""
        self._reloading = False
        self._open = True
        self._transport.wake()

    def shut(self, *, reloading: bool) -> None:
        """The app is going away, perhaps only to come back changed. From any thread, before its connections break."""
        self._reloading = reloading
        self._open = False

    def room(self, base: str) -> int:
        return self._transport.room(base) if self._open or base != self._base else 0

    def passes(self, base: str, queue: str) -> bool:
        return (self._open or base != self._base) and self._transport.passes(base, queue)

    def send(self, delivery: Delivery) -> None:
        self._transport.send(delivery)
        if delivery.base == self._base:
            self._sent.add(delivery.claim[:2])

    def results(self) -> Sequence[Result]:
        return [self._told(result) for result in self._transport.results()]

    def cancel(self, id: int, claims: int) -> None:
        self._sent.discard((id, claims))
        self._transport.cancel(id, claims)

    def withdraw(self) -> Sequence[Result]:
        return [self._told(result) for result in self._transport.withdraw()]

    def wait(self, until: Micros) -> None:
        self._transport.wait(until)

    def wake(self) -> None:
        self._transport.wake()

    def close(self) -> None:
        self._transport.close()

    def _says_nothing(self, result: Result) -> bool:
        """Tell whether *result* says more of an app that goes, or of the page in its place, than of the call."""
        match result.kind:
            case Kind.UNKNOWN:
                return self._reloading
            case Kind.ANSWERED:
                return result.outcome in ("retry", "untrusted") or not (result.outcome or 200 <= result.status <= 299)
        return result.kind in (Kind.MALFORMED, Kind.TIMEOUT)

    def _told(self, result: Result) -> Result:
        """Return *result*, as interrupted if it is of a call that the reload cut off."""
        fence = (result.id, result.claims)
        cut_off = not self._open and fence in self._sent and self._says_nothing(result)
        self._sent.discard(fence)
        return result._replace(kind=Kind.INTERRUPTED) if cut_off else result
