"""Behind nginx: every true task passes, and no forged one, whatever the proxy makes of headers and paths."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

import deferlib
from deferlib import config, namespaces, taskqueue
from deferlib.deferred import DEFAULT_URL
from tests.system.nginx import CONFIGURATIONS, proxy
from tests.system.processes import TIMEOUT, wait_until
from tests.system.serving import PARSERS
from tests.system.spellings import LINES, PLAIN, Said, every_address, every_line, every_request
from tests.system.wire import KEY, PREFIX, TASK_ADDRESS, Wire, believed, reports, request, serving, statuses, talk

URLS = (
    "/work/here",
    "/work/a%20b",
    "/work/a b",
    "/work/caf\u00e9",
    "/work/caf%C3%A9",
    "/work/%E2%82%AC;v=1",
    "/work/100%25",
    "/work/a+b",
    "/work/~user!$&'()*,=:@",
    "/work/%7Euser",
    "/work/(%5B%5D)",
    "/work/a%3Fb%23c",
    "/work/%22quoted%22",
    "/work/?",
    "/work/trailing/",
)
QUERIES = (
    "a=1",
    "a=1&a=2&b",
    "a=%20+%2B%25&b=%26",
    "q=caf%C3%A9&empty=",
    "next=/path?x=1/..//",
    "q=%2F%3F%23",
    "x=" + "y" * 700,
)
NAMES = ("a", "A-b_c", "_", "-", "0" * 400)
NAMESPACES = ("", "tenant-1", "a.b_c-D", "0", ".", "_" * 100)


class Front:
    """A server, and nginx before it."""

    def __init__(self, wire: Wire, ports: dict[str, int]) -> None:
        self.wire = wire
        self.ports = ports

    def targets(self) -> str:
        """Return the setting `targets`: each way through nginx, under its own name."""
        paths = {"stripped": PREFIX}
        return ",".join(f"{name}=http://127.0.0.1:{port}{paths.get(name, '')}" for name, port in self.ports.items())


@pytest.fixture(scope="module", params=PARSERS)
def front(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("front")
    with serving(request.param, folder) as wire, proxy(folder, wire.port) as ports:
        yield Front(wire, ports)


@pytest.fixture
def runtime(front: Front, monkeypatch: pytest.MonkeyPatch) -> Iterator[config.Runtime]:
    monkeypatch.syspath_prepend(str(front.wire.site.folder))
    made = deferlib.configure(
        store=front.wire.site.environ["DEFERLIB_STORE"],
        queues=front.wire.site.folder / "queue.yaml",
        key=KEY,
        targets=front.targets(),
        limits="deferlib",
    )
    yield made
    made.close()
    config.install(None)


def lines_believed(port: int, said: Said) -> list[str]:
    path = b" " + PREFIX.encode() + b"/look "
    answers = talk(port, said.data), talk(port, said.data.replace(b" /look ", path))
    return [f"{said.what}: {what}" for answer in answers for report in reports(answer) for what in believed(report)]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_no_forged_header_passes(front: Front, configuration: str) -> None:
    port = front.ports[configuration]

    with ThreadPoolExecutor(8) as clients:
        everything = [*every_line(), *every_request(), *every_address()]
        found = [what for some in clients.map(lambda said: lines_believed(port, said), everything) for what in some]

    assert not found, f"{len(found)}: {found[:20]}"


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_well_formed_requests_do_pass(front: Front, configuration: str) -> None:
    """Or the test above would say nothing."""
    path = f"{PREFIX}/look" if configuration == "stripped" else "/look"
    for what in PLAIN:
        said = request([b"X-Harmless: yes", *LINES[what]("X-AppEngine-QueueName")], target=path)

        (report,) = reports(talk(front.ports[configuration], said, TIMEOUT))

        assert "yes" in report["keys"].values(), what


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_no_forged_call_runs(front: Front, configuration: str) -> None:
    path = f"{PREFIX}{DEFAULT_URL}" if configuration == "stripped" else DEFAULT_URL
    for name in LINES:
        said = request(LINES[name]("X-AppEngine-QueueName"), method="POST", target=path, body=b"dfr")

        assert set(statuses(talk(front.ports[configuration], said))) <= {400, 403}, name


def test_every_true_task_passes(front: Front, runtime: config.Runtime) -> None:
    added: dict[str, taskqueue.Task] = {}
    calls: list[taskqueue.Task] = []
    import systemapp  # type: ignore[import-not-found]  # the site writes it

    for target in CONFIGURATIONS:
        tasks = [taskqueue.Task(url=url, method="GET", target=target) for url in URLS]
        tasks += [taskqueue.Task(url=url, payload=b"data", target=target) for url in URLS]
        tasks += [taskqueue.Task(url=f"/work/here?{query}", method="GET", target=target) for query in QUERIES]
        tasks += [taskqueue.Task(url="/work/big", payload=bytes(2_000_000), target=target)]
        for name in NAMES:
            tasks.append(taskqueue.Task(url="/work/named", name=f"{target}{name}"[:500], method="PUT", target=target))
        for task in tasks:
            taskqueue.Queue("default").add(task)
            added[str(task.name)] = task
        for number, namespace in enumerate(NAMESPACES):
            with namespaces.namespace(namespace):
                task = taskqueue.Task(url="/work/tenant", params={"n": namespace}, target=target)
                taskqueue.Queue("patient").add(task)
                added[str(task.name)] = task
                calls.append(deferlib.defer(systemapp.note, f"{target}{number}", _target=target))

    with front.wire.site.engine(DEFERLIB_TARGETS=front.targets(), DEFERLIB_LIMITS="deferlib"), suppress(AssertionError):
        wait_until(lambda: not front.wire.site.waiting(), "every task is done", 30)

    missing = set(added) - {seen["task"][0] for seen in front.wire.tasks_seen()}
    refused = re.findall("refused: (.*)", front.wire.site.log())
    assert not missing, (
        f"{sorted({(added[name].target, (added[name].url or '')[:60]) for name in missing})}: {set(refused)}"
    )
    assert len(front.wire.site.finished()) == len(calls)
    for seen in front.wire.tasks_seen():
        name, queue, namespace, url, attempt = seen["task"]
        task = added[name]
        assert attempt <= 2, url  # nginx may use a connection that the server closes just then
        assert seen["client"] == TASK_ADDRESS
        assert seen["found"]["X-AppEngine-TaskName"] == name
        assert seen["found"]["X-AppEngine-QueueName"] == queue
        assert "X-Deferlib-Signature" not in seen["found"]
        assert namespace == (parameter(task, "n") or "")


def parameter(task: taskqueue.Task, name: str) -> str:
    return dict(urllib.parse.parse_qsl((task.payload or b"").decode("latin-1"), keep_blank_values=True)).get(name, "")
