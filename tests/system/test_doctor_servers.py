"""What `deferlib doctor` says of the app under a real gunicorn, which only its own workers know the settings of."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.system.processes import TIMEOUT, Site, free_port
from tests.system.serving import Server, Web, defer_many

GUNICORN = "-m gunicorn --bind 127.0.0.1:{port} --log-level error --timeout 30"
WAITS = "gunicorn with one sync worker serves one request at a time"
KILLS = "gunicorn kills a sync worker after 30 s, but calls of default, patient may take 600 s"
CROWDS = "an engine pushes up to 32 calls at once to 2 sync workers"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--workers 1", {"warning": [WAITS, KILLS]}),
        ("--workers 1 --threads 4", {}),
        ("--workers 2", {"warning": [KILLS], "note": [CROWDS]}),
        ("--workers 2 --worker-class gthread --threads 4", {}),
    ],
)
def test_doctor_knows_what_gunicorn_does_to_calls(site: Site, options: str, found: dict[str, list[str]]) -> None:
    web = Web(site, Server([*GUNICORN.split(), *options.split(), "served:wsgi"]), free_port())

    defer_many(1)  # which makes the store, its queues and its key
    with web.serving():
        command = [sys.executable, "-m", "deferlib.cli", "doctor", "--json", "--app-url", web.url]
        run = subprocess.run(
            command, cwd=site.folder, env=site.environ, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )

    assert run.returncode == 0, run.stdout + run.stderr
    said = [(each["level"], each["text"]) for each in json.loads(run.stdout)["findings"] if each["subject"] == "app"]
    assert said.pop(0)[0] == "ok"
    expected = [(level, text) for level, texts in found.items() for text in texts]
    assert [level for level, _ in said] == [level for level, _ in expected]
    assert all(text.startswith(start) for (_, text), (_, start) in zip(said, expected, strict=True))
