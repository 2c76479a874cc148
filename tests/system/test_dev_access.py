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
