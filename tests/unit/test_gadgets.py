"""Pickles made to run somebody's code, through every door: none of them runs, and each answer says what is wrong."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import pytest

import deferlib
from deferlib import config, context, deferred, payload, token
from deferlib.cli import main
from deferlib.cli.narrate import Narrator, Paper
from deferlib.context import Dispatch, TaskContext
from deferlib.contrib.asgi import wrap_asgi_app
from deferlib.core.model import MINUTE, Action, Page, TaskState
from deferlib.errors import PayloadError
from deferlib.keys import Keyring
from deferlib.taskqueue import Queue, Task
from deferlib.testing import VirtualClock
from deferlib.testing.harness import Harness
from tests.unit.gadgets import CANNOT, Gadget, Traps, spring
from tests.unit.test_narrate import claimed, outcome, result

KEY = "the key of the tests of gadgets"
OURS, OTHERS = Keyring([KEY.encode()]), Keyring([b"a key that nobody here has"])
URL = deferred.DEFAULT_URL
FORMS: dict[str, Callable[[bytes, payload.Binding], bytes]] = {}
_LONGEST = 400  # characters of an answer
_LAST = 2**62  # a moment that never comes


class Response(NamedTuple):
    status: int
    outcome: str
    body: str


def greet(*names: str) -> None:
    """What is deferred beside the gadgets; never run."""


# --- what a gadget may come as ----------------------------------------------------------------------------------------


def form(make: Callable[[bytes, payload.Binding], bytes]) -> Callable[[bytes, payload.Binding], bytes]:
    FORMS[make.__name__] = make
    return make


def body_of(gadget: bytes) -> bytes:
    """Return what stands behind an envelope's signature: the gadget for the callable and for the arguments."""
    return len(gadget).to_bytes(4, "big") + gadget + gadget


def sealed(gadget: bytes, ring: Keyring, binding: payload.Binding | None) -> bytes:
    return payload.seal(payload.Call(body_of(gadget), "tests.greet", 0), ring.signing, binding)


@form
def as_it_is(gadget: bytes, binding: payload.Binding) -> bytes:
    return gadget


@form
def behind_a_true_head(gadget: bytes, binding: payload.Binding) -> bytes:
    genuine = payload.seal(payload.dump_call(greet, ("Ada",), {}), OURS.signing, binding)
    return genuine[: -len(payload.parse(genuine).body)] + body_of(gadget)


@form
def behind_a_true_call(gadget: bytes, binding: payload.Binding) -> bytes:
    return payload.seal(payload.dump_call(greet, ("Ada",), {}), OURS.signing, binding) + gadget


@form
def with_a_flipped_bit(gadget: bytes, binding: payload.Binding) -> bytes:
    data = bytearray(sealed(gadget, OURS, binding))
    data[data.index(payload.parse(bytes(data)).signature)] ^= 1
    return bytes(data)


@form
def without_a_signature(gadget: bytes, binding: payload.Binding) -> bytes:
    envelope = payload.parse(sealed(gadget, OURS, binding))
    return envelope.signed + bytes(len(envelope.signature)) + envelope.body


@form
def signed_by_another_key(gadget: bytes, binding: payload.Binding) -> bytes:
    return sealed(gadget, OTHERS, binding)


@form
def signed_by_another_key_in_our_name(gadget: bytes, binding: payload.Binding) -> bytes:
    ours, others = OURS.signing, OTHERS.signing
    envelope = payload.parse(sealed(gadget, OTHERS, binding))
    return envelope.signed.replace(others.id, ours.id) + envelope.signature + envelope.body


@form
def signed_for_another_task(gadget: bytes, binding: payload.Binding) -> bytes:
    return sealed(gadget, OURS, binding._replace(id=binding.id + 1))


# --- what is there ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> Traps:
    return Traps(tmp_path_factory.mktemp("traps"))


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[config.Runtime]:
    monkeypatch.setenv("DEFERLIB_STORE", f"sqlite:///{tmp_path}/tasks.db")
    monkeypatch.setenv("DEFERLIB_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    former = config.install(None)
    made = deferlib.configure(clock=VirtualClock())
    made.apply_queues()
    yield made
    made.close()
    config.install(former)


def forms(*, but: Callable[..., bytes] | None = None) -> pytest.MarkDecorator:
    """Run a test for each of the FORMS, *but* that one."""
    names = [name for name, make in FORMS.items() if make is not but]
    return pytest.mark.parametrize("shape", [FORMS[name] for name in names], ids=names)


def task(runtime: config.Runtime) -> TaskContext:
    now = runtime.clock.now()
    return TaskContext(77, "", "default", 1, 0, now, now + MINUTE, 9, "", URL, context.SYSTEM_CLOCK)


BINDING = payload.Binding(77, "", "default", URL, "")


def signature(runtime: config.Runtime, body: bytes) -> str:
    """Return a true engine's token for *body*."""
    return token.sign(OURS, runtime.clock.now(), Dispatch(task(runtime), {}), method="POST", body=body, deadline=MINUTE)


def wsgi(body: bytes, signature: str = "") -> Response:
    environ: dict[str, Any] = {
        "REQUEST_METHOD": "POST", "SCRIPT_NAME": "", "PATH_INFO": URL, "QUERY_STRING": "",
        "CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body),
    }  # fmt: skip
    if signature:
        environ["HTTP_X_DEFERLIB_SIGNATURE"] = signature
    started: list[Any] = []
    text = b"".join(deferlib.handler(environ, lambda *start: started.append(start))).decode()
    status, headers = started[0]
    return Response(int(status[:3]), dict(headers)["X-Deferlib-Outcome"], text)


def asgi(body: bytes, signature: str = "") -> Response:
    sent: list[Any] = []
    headers = [(b"x-deferlib-signature", signature.encode())] if signature else []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    async def no_app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    scope = {"type": "http", "method": "POST", "path": URL, "query_string": b"", "headers": headers}
    asyncio.run(wrap_asgi_app(no_app)(scope, receive, send))
    outcome = dict(sent[0]["headers"])[b"x-deferlib-outcome"].decode()
    return Response(sent[0]["status"], outcome, sent[1]["body"].decode())


def short(text: str) -> bool:
    return 0 < len(text) <= _LONGEST and text.isprintable()


# --- the doors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("post", [wsgi, asgi])
def test_stranger_runs_nothing(traps: Traps, runtime: config.Runtime, post: Callable[..., Response]) -> None:
    for gadget in traps.all:
        for make in FORMS.values():
            response = post(make(gadget.data, BINDING))

            assert (response.status, response.outcome) == (403, "untrusted"), gadget.name
            assert short(response.body)

    assert not traps.sprung()


@forms()
@pytest.mark.parametrize("post", [wsgi, asgi])
def test_true_delivery_of_a_forged_call_runs_nothing(
    traps: Traps, runtime: config.Runtime, post: Callable[..., Response], shape: Callable[..., bytes]
) -> None:
    expected = "key-unknown" if shape is signed_by_another_key else "unverified"
    for gadget in traps.all:
        body = shape(gadget.data, BINDING)

        response = post(body, signature(runtime, body))

        assert (response.status, response.outcome) == (500, expected), gadget.name
        assert short(response.body)
        assert "Error: " in response.body

    assert not traps.sprung()


@forms(but=signed_for_another_task)  # it runs what our own key signed, whatever task it was for
def test_run_refuses_them_all(traps: Traps, runtime: config.Runtime, shape: Callable[..., bytes]) -> None:
    for gadget in traps.all:
        with pytest.raises(PayloadError) as caught:
            deferred.run(shape(gadget.data, BINDING))

        assert short(str(caught.value))

    assert not traps.sprung()


def write_rows(runtime: config.Runtime, column: str, contents: list[Any]) -> list[str]:
    """Add a genuine call for each of *contents*, and put those in place of its *column*, as somebody may."""
    assert runtime.store_path is not None
    call = payload.dump_call(greet, ("Ada",), {})
    names = [f"gadget-{number}" for number in range(len(contents))]
    for first in range(0, len(names), 50):
        Queue("default").add([Task.of_call(call, url=URL, name=name) for name in names[first : first + 50]])
    connection = apsw.Connection(runtime.store_path)
    with connection:
        connection.executemany(f"update tasks set {column} = ? where name = ?", zip(contents, names, strict=True))  # noqa: S608  # ours
    connection.close()
    return names


def engine(runtime: config.Runtime) -> Harness:
    def no_view(environ: Any, start_response: Any) -> list[bytes]:
        raise AssertionError

    assert isinstance(runtime.clock, VirtualClock)
    return Harness(runtime.store, runtime.clock, deferlib.wrap_wsgi_app(no_view))


@forms(but=signed_by_another_key)  # which may be known in a moment: the next test
def test_rows_that_somebody_wrote_are_quarantined(
    traps: Traps, runtime: config.Runtime, shape: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    names = write_rows(runtime, "body", [shape(gadget.data, BINDING) for gadget in traps.all])

    engine(runtime).run_until_idle()

    with runtime.store.read() as tx:
        rows = tx.tasks("default", Page(len(names) + 1, state=TaskState.DEAD))
        waiting = tx.tasks("default", Page())
    assert len(rows) == len(names)
    assert not waiting
    assert all(row.reason.startswith("quarantine: unverified: Payload") for row in rows)
    assert main(["tasks", "show", names[0]]) == 0
    assert "unverified" in capsys.readouterr().out
    assert not traps.sprung()


def test_rows_of_an_unknown_key_wait(traps: Traps, runtime: config.Runtime) -> None:
    names = write_rows(runtime, "body", [signed_by_another_key(gadget.data, BINDING) for gadget in traps.all])

    attempts = engine(runtime).run_until_idle()

    assert {attempt.outcome for attempt in attempts} == {"key-unknown"}
    assert len(attempts) == len(names)
    assert not traps.sprung()


def every_text(gadget: Gadget) -> list[str]:
    """Return a gadget as texts, as a name or a header could hold it."""
    return [gadget.data.decode("latin-1"), repr(gadget.data), gadget.data.hex()]


@pytest.mark.parametrize(
    "column", ["name", "headers", "url", "namespace", "tag", "retry", "reason", "history", "target", "method"]
)
def test_gadget_in_any_column_is_text(
    traps: Traps, runtime: config.Runtime, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [text for gadget in traps.all[::6] for text in every_text(gadget)]
    write_rows(runtime, column, texts)

    engine(runtime).run_until_idle()
    for command in (["tasks", "list"], ["tasks", "list", "--json"], ["queues", "list"], ["doctor"]):
        main([*command])

    assert "Traceback" not in capsys.readouterr().err
    assert not traps.sprung()


@forms()
def test_looking_at_rows_runs_nothing(
    traps: Traps, runtime: config.Runtime, shape: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    names = write_rows(runtime, "body", [shape(gadget.data, BINDING) for gadget in traps.all])

    look(names, capsys)

    assert not traps.sprung()


def test_looking_at_our_own_calls_runs_nothing(
    traps: Traps, runtime: config.Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has the key can run code anyway, but in the app, and not in the shell of whoever looks."""
    names = write_rows(runtime, "body", [sealed(gadget.data, OURS, None) for gadget in traps.all])

    look(names, capsys)

    assert not traps.sprung()


def look(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "list", "--limit", "1000"]) == 0
    listed = capsys.readouterr().out
    assert all(line.isprintable() for line in listed.split("\n"))
    assert main(["tasks", "list", "--limit", "1000", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tasks"]) >= len(names)
    for name in names[::5]:
        assert main(["tasks", "show", name]) == 0
        assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))
        assert main(["tasks", "show", name, "--json"]) == 0
        json.loads(capsys.readouterr().out)
    main(["doctor"])
    capsys.readouterr()


def test_narrator_runs_nothing(traps: Traps, capsys: pytest.CaptureFixture[str]) -> None:
    narrator = Narrator(Paper(), OURS, 0)
    for gadget in traps.all:
        for make in (*FORMS.values(), lambda gadget, binding: sealed(gadget, OURS, None)):
            claim = claimed(body=make(gadget.data, BINDING))
            for action in (Action.DONE, Action.RETRY, Action.DEAD):
                narrator.ended(_LAST, claim, result(claim), outcome(claim, action, "no"))

    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))
    assert not traps.sprung()


def test_hand_made_task_of_a_gadget_runs_nothing(traps: Traps, runtime: config.Runtime) -> None:
    """App Engine's way to defer by hand; the payload must be one of serialize()."""
    for start in range(0, len(traps.all), 50):
        Queue("default").add([Task(url=URL, payload=gadget.data) for gadget in traps.all[start : start + 50]])

    attempts = engine(runtime).run_until_idle()

    assert [attempt.outcome for attempt in attempts] == ["unverified"] * len(traps.all)
    assert not traps.sprung()


# --- and what the zero means ------------------------------------------------------------------------------------------


def test_each_of_them_runs_where_it_is_unpickled(tmp_path: Path) -> None:
    traps = Traps(tmp_path)

    spring(traps)

    assert len(traps.all) > 100
    assert {gadget.name for gadget in traps.all} - set(traps.sprung()) == CANNOT


def test_genuine_call_of_a_gadget_runs(tmp_path: Path, runtime: config.Runtime) -> None:
    """With our key: so the doors above do lead to `pickle.loads`."""
    traps = Traps(tmp_path)
    (gadget,) = (gadget for gadget in traps.all if gadget.name == "os.mkdir")
    body = sealed(gadget.data, OURS, BINDING)

    response = wsgi(body, signature(runtime, body))

    assert response.status == 500  # nothing is no function
    assert traps.sprung() == ["os.mkdir"]
