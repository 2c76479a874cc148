"""The service that people see: it takes photos in, and leaves the slow work to the worker."""

from collections import Counter

import photos
from flask import Flask, abort, request

import deferlib
from deferlib import taskqueue

photos.service = "web"

app = Flask(__name__)
app.wsgi_app = deferlib.wrap_wsgi_app(app.wsgi_app)


@app.before_request
def guard() -> None:
    if request.path.startswith("/tasks/") and "X-AppEngine-QueueName" not in request.headers:
        abort(403)  # only an engine can send this header: wrap_wsgi_app takes it from everybody else


@app.post("/photos")
def upload() -> tuple[dict[str, int], int]:
    """Add four tasks for each photo; the comments say which service each of them goes to."""
    names = request.form["names"].split()
    for name in names:
        params = {"photo": name}
        taskqueue.add(url="/tasks/thumbnail", params=params, queue_name="thumbnails")  # its queue's target: worker
        taskqueue.add(url="/tasks/labels", params=params, target="worker")  # its own target
        taskqueue.add(url="/tasks/activity", params=params)  # no target: it stays here
        deferlib.defer(photos.send_mail, name, _queue="mail")  # so does a deferred call
    return {"photos": len(names)}, 202


@app.post("/tasks/activity")
def activity() -> tuple[str, int]:
    photos.record("activity", request.form["photo"])
    return "", 204


@app.get("/photos")
def counts() -> dict[str, int]:
    return Counter(f"{each.step} by {each.service}" for each in photos.done())
