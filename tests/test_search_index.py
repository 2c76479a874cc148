"""The showcase example: its app on a virtual clock, and its demo for real, with an engine that is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from flask.testing import FlaskClient

from deferlib import testing
from examples.search_index import index
from examples.search_index.app import RETRIES, app

PROJECT = Path(__file__).parents[1]
TIMEOUT = 120


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the app may index; the index is beside it."""
    folder = tmp_path / "sources"
    folder.mkdir()
    monkeypatch.setenv("SEARCH_FOLDERS", str(folder))
    monkeypatch.setenv("SEARCH_INDEX", str(tmp_path / "index.db"))
    return folder


@pytest.fixture
def engine(folder: Path) -> Iterator[testing.Harness]:
    with testing.engine() as harness:
        yield harness


@pytest.fixture
def client(folder: Path) -> FlaskClient:
    return app.test_client()


def index_all(client: FlaskClient, folder: Path) -> None:
    answer = client.post("/index", data={"folder": str(folder)})
    assert answer.status_code == 303


# --- the app --------------------------------------------------------------------------------------------------------


def test_each_file_is_indexed_by_a_call_of_its_own(engine: testing.Harness, client: FlaskClient, folder: Path) -> None:
    (folder / "package").mkdir()
    (folder / "one.py").write_text("a walrus")
    (folder / "package" / "two.py").write_text("a carpenter")
    (folder / "other.txt").write_text("an oyster")
    index_all(client, folder)
    assert client.get("/progress").json == {"deferred": 2, "indexed": 0, "dead": 0}

    attempts = engine.run_until_idle(raise_errors=True)

    assert [attempt.call for attempt in attempts] == ["examples.search_index.app.index_file"] * 2
    assert client.get("/progress").json == {"deferred": 2, "indexed": 2, "dead": 0}
    assert [hit.path for hit in index.search("carpenter")[1]] == [str(folder / "package" / "two.py")]
    assert index.search("oyster") == (0, [])


def test_file_that_is_indexed_twice_is_stored_once(engine: testing.Harness, client: FlaskClient, folder: Path) -> None:
    (folder / "one.py").write_text("old words")
    index_all(client, folder)
    engine.run_until_idle(raise_errors=True)
    (folder / "one.py").write_text("new words")
    index_all(client, folder)

    engine.run_until_idle(raise_errors=True)

    assert index.starts().read_text().count("\n") == 2
    assert client.get("/progress").json == {"deferred": 1, "indexed": 1, "dead": 0}
    assert index.search("words")[0] == 1
    assert index.search("old")[0] == 0


def test_undecodable_file_becomes_a_dead_letter_and_comes_back_repaired(
    engine: testing.Harness, client: FlaskClient, folder: Path
) -> None:
    broken = folder / "broken.py"
    broken.write_bytes(b"\xff")
    index_all(client, folder)

    engine.run_until_idle()
    assert client.get("/progress").json == {"deferred": 1, "indexed": 0, "dead": 0}
    engine.advance(60)

    [letter] = engine.dead_letters()
    assert "UnicodeDecodeError" in letter.reason
    assert letter.attempts == RETRIES + 1
    assert client.get("/progress").json == {"deferred": 1, "indexed": 0, "dead": 1}
    assert "invalid start byte" in client.get("/").text
    broken.write_text("repaired")
    index_all(client, folder)
    engine.run_until_idle(raise_errors=True)
    assert client.get("/progress").json == {"deferred": 1, "indexed": 1, "dead": 0}


def test_file_that_breaks_later_is_dead_and_not_indexed_as_well(
    engine: testing.Harness, client: FlaskClient, folder: Path
) -> None:
    (folder / "one.py").write_text("whole")
    index_all(client, folder)
    engine.run_until_idle(raise_errors=True)
    (folder / "one.py").write_bytes(b"\xff")
    index_all(client, folder)

    engine.advance(60)

    assert client.get("/progress").json == {"deferred": 1, "indexed": 0, "dead": 1}


def test_search_page_escapes_what_is_in_files_and_queries(
    engine: testing.Harness, client: FlaskClient, folder: Path
) -> None:
    (folder / "one.py").write_text("needle = '<script>alert(1)</script>' & needle")
    index_all(client, folder)
    engine.run_until_idle(raise_errors=True)

    page = client.get("/search", query_string={"q": "needle"}).text

    assert "<mark>needle</mark> = &#39;&lt;script&gt;alert(1)&lt;/script&gt;&#39; &amp; <mark>needle</mark>" in page
    page = client.get("/search", query_string={"q": '"><script>'}).text
    assert "<script>" not in page
    assert 'value="&#34;&gt;&lt;script&gt;"' in page


@pytest.mark.parametrize("query", ["", " ", '"', "a AND", "path:", "NEAR(", "*", "\0", "ünï", '""', "-x"])
def test_any_query_is_answered(client: FlaskClient, query: str) -> None:
    answer = client.get("/search", query_string={"q": query})

    assert answer.status_code == 200


def test_only_allowed_folders_are_indexed(engine: testing.Harness, client: FlaskClient, folder: Path) -> None:
    (folder.parent / "secret.py").write_text("secret")

    answers = [client.post("/index", data=data) for data in ({"folder": str(folder.parent)}, {"folder": "/"}, {})]

    assert [answer.status_code for answer in answers] == [403, 403, 403]
    assert engine.tasks() == []


def test_limit_is_how_many_files_are_deferred(engine: testing.Harness, client: FlaskClient, folder: Path) -> None:
    for number in range(5):
        (folder / f"{number}.py").write_text("x")

    client.post("/index", data={"folder": str(folder), "limit": "3"})

    assert len(engine.tasks()) == 3


# --- the demo -------------------------------------------------------------------------------------------------------


@contextmanager
def running_demo(tmp_path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process; if the test fails it is told to end, which ends what it started."""
    demo = subprocess.Popen(
        [sys.executable, "-m", "examples.search_index.demo", *options],
        cwd=PROJECT,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with demo:
        try:
            yield demo
        finally:
            demo.terminate()


def output(demo: subprocess.Popen[str]) -> IO[str]:
    assert demo.stdout is not None
    return demo.stdout


def is_gone(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False


def test_demo_loses_nothing_though_its_engine_is_killed(tmp_path: Path) -> None:
    with running_demo(tmp_path, "--files", "150") as demo:
        printed, _ = demo.communicate(timeout=TIMEOUT)

    assert demo.returncode == 0, printed
    killed = re.search(r"engine (\d+) killed \(SIGKILL\) with (\d+) calls in flight", printed)
    assert killed is not None, printed
    assert int(killed[2]) > 0
    facts = dict(re.findall(r"^  ([a-z ]+?) +([\d,]+)(?:   .*)?$", printed, re.MULTILINE))
    wanted = {"files": "151", "indexed": "150", "lost": "0", "stored twice": "0", "dead letters": "1"}
    assert {name: facts[name] for name in wanted} == wanted
    assert int(facts["started twice"]) <= int(killed[2])
    assert "UnicodeDecodeError" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == []


def test_interrupted_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    with running_demo(tmp_path, "--files", "1000") as demo:
        printed = []
        for line in output(demo):
            printed.append(line)
            if line.strip().startswith("10 %"):
                demo.send_signal(signal.SIGINT)
    text = "".join(printed)

    assert demo.returncode == 130, text
    assert "Traceback" not in text
    pids = re.findall(r"(?:app|engine) (\d+) started", text)
    assert len(pids) >= 2
    assert all(is_gone(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []
