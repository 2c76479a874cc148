"""No client is taken for an engine, however it spells what it sends, whichever server reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from deferlib.deferred import DEFAULT_URL
from tests.system.processes import TIMEOUT
from tests.system.serving import PARSERS
from tests.system.spellings import LINES, PLAIN, Said, every_address, every_line, every_request
from tests.system.wire import Wire, believed, reports, request, serving, statuses, talk


@pytest.fixture(scope="module", params=PARSERS)
def wire(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    with serving(request.param, tmp_path_factory.mktemp("wire")) as wire:
        yield wire


def all_believed(port: int, all_said: Iterable[Said]) -> list[str]:
    """Return what views believed; several clients at once, since some servers wait for more of what is no request."""
    with ThreadPoolExecutor(8) as clients:
        return [what for found in clients.map(lambda said: _believed(port, said), all_said) for what in found]


def _believed(port: int, said: Said) -> list[str]:
    return [f"{said.what}: {what}" for report in reports(talk(port, said.data)) for what in believed(report)]


def test_no_spelling_of_an_engines_header_is_believed(wire: Wire) -> None:
    found = all_believed(wire.port, every_line())

    assert not found, f"{len(found)}: {found[:20]}"


def test_no_kind_of_request_is_believed(wire: Wire) -> None:
    found = all_believed(wire.port, every_request())

    assert not found, f"{len(found)}: {found[:20]}"


def test_nobody_comes_from_the_tasks_address(wire: Wire) -> None:
    found = all_believed(wire.port, every_address())

    assert not found, f"{len(found)}: {found[:20]}"


def test_well_formed_spellings_arrive_without_the_header(wire: Wire) -> None:
    """Or the tests above would say nothing."""
    for what in PLAIN:
        (report,) = reports(talk(wire.port, request([b"X-Harmless: yes", *LINES[what]("X-AppEngine-QueueName")]), TIMEOUT))

        assert "yes" in report["keys"].values(), what


def test_no_forged_request_runs_a_call(wire: Wire) -> None:
    for what, lines in LINES.items():
        answer = talk(wire.port, request(lines("X-AppEngine-QueueName"), method="POST", target=DEFAULT_URL, body=b"dfr"))

        assert set(statuses(answer)) <= {400, 403}, f"{what}: {answer[:300]!r}"


def test_nothing_that_a_client_says_breaks_the_library(wire: Wire) -> None:
    all_believed(wire.port, every_request())

    assert "/deferlib/inbound.py" not in wire.site.log()
    assert "/deferlib/contrib/asgi.py" not in wire.site.log()
