"""The service that does the slow work; what it adds without a target stays with it."""

import time
from contextlib import suppress

import photos
from flask import Flask, abort, request

import deferlib
from deferlib import taskqueue

SECONDS = 0.02  # stands for the work
# A task may run twice, and then adds its follow-up twice: a name keeps it from being there twice.
TAKEN = (taskqueue.TaskAlreadyExistsError, taskqueue.TombstonedTaskError)

photos.service = "worker"

app = Flask(__name__)
app.wsgi_app = deferlib.wrap_wsgi_app(app.wsgi_app)


@app.before_request
def guard() -> None:
    if request.path.startswith("/tasks/") and "X-AppEngine-QueueName" not in request.headers:
        abort(403)


@app.post("/tasks/thumbnail")
def thumbnail() -> tuple[str, int]:
    photo = request.form["photo"]
    time.sleep(SECONDS)
    photos.record("thumbnail", photo)
    with suppress(*TAKEN):
        taskqueue.add(name=f"publish-{photo}", url="/tasks/publish", params={"photo": photo})
    return "", 204


@app.post("/tasks/publish")
def publish() -> tuple[str, int]:
    photos.record("publish", request.form["photo"])
    return "", 204


@app.post("/tasks/labels")
def labels() -> tuple[str, int]:
    photo = request.form["photo"]
    time.sleep(SECONDS)
    photos.record("labels", photo)
    with suppress(*TAKEN):
        deferlib.defer(photos.back_up, photo, _name=f"backup-{photo}")
    return "", 204


@app.post("/backups")
def back_up_again() -> tuple[str, int]:
    """Back photos up again: a request from outside, whose tasks stay with this service as well."""
    for photo in request.form["names"].split():
        deferlib.defer(photos.back_up, photo)
    return "", 202
