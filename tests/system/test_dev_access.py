"""Whoever sits at the machine of `deferlib dev` may try a task's view out by hand; nobody else's page may."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from tests.system.desk import Desk

WSGI = """
import deferlib

def view(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ.get("HTTP_X_APPENGINE_QUEUENAME", "nobody").encode()]

app = deferlib.task_only(deferlib.wrap_wsgi_app(view), "/tasks")
"""
ASGI = """
from deferlib.contrib import asgi

async def view(scope, receive, send):
    found = dict(scope["headers"]).get(b"x-appengine-queuename", b"nobody")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": found})

app = asgi.task_only(view, "/tasks")
"""


@pytest.mark.parametrize("source", [WSGI, ASGI], ids=["wsgi", "asgi"])
def test_developer_opens_a_tasks_view_and_sets_its_headers_by_hand(tmp_path: Path, source: str) -> None:
    desk = Desk(tmp_path, source, "accessapp")
    by_hand = {"X-AppEngine-QueueName": "mail"}
    with desk.dev():
        desk.sees(rf"http://127\.0\.0\.1:{desk.port}")
        url = f"http://127.0.0.1:{desk.port}"

        def get(path: str, **headers: str) -> tuple[int, str]:
            answer = requests.get(
                url + path, headers={name.replace("_", "-"): value for name, value in headers.items()}, timeout=30
            )
            return answer.status_code, answer.text

        assert get("/tasks/mail") == (200, "nobody")
        assert get("/tasks/mail", **by_hand) == (200, "mail")
        assert get("/", **by_hand) == (200, "mail")
        for theirs in ({"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"X-Forwarded-For": "198.51.100.7"}):
            assert get("/tasks/mail", **theirs, **by_hand)[0] == 403
            assert get("/", **theirs, **by_hand) == (200, "nobody")
        call = requests.post(f"{url}/_ah/queue/deferred", headers=by_hand, data=b"x", timeout=30)
        assert call.status_code == 403


def test_what_is_wrong_with_the_app_is_told_to_the_developer_alone(tmp_path: Path) -> None:
    """And no password of it to anybody."""
    broken = 'app = None\nraise RuntimeError("can\'t connect: postgresql://shop:canary@db/shop; main.py is broken")\n'
    desk = Desk(tmp_path, broken, "brokenapp")
    with desk.dev():
        desk.sees("can't be imported")
        url = f"http://127.0.0.1:{desk.port}/"
        theirs = ({"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"X-Forwarded-For": "198.51.100.7"})
        ours, *others = [requests.get(url, headers=headers, timeout=30) for headers in ({}, *theirs)]

    assert "RuntimeError: can't connect: postgresql://shop:***@db/shop; main.py is broken" in ours.text
    assert f'File "{tmp_path}/brokenapp.py", line 2' in ours.text
    for answer in (ours, *others):
        assert answer.status_code == 500
        assert "canary" not in answer.text
        assert answer.headers["X-Deferlib-Outcome"] == "untrusted"
    assert {answer.text for answer in others} == {
        "The app can't be served; it is tried again when a file changes.\n\n"
        "What is wrong is told in the terminal of `deferlib dev`.\n"
    }
