"""App Engine's counter sample: pages add tasks, and the tasks count. Since it ran there, only imports have changed."""

import datetime
import time
from typing import Any

import models
from flask import Flask, abort, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from deferlib import deferred, taskqueue, wrap_wsgi_app
from deferlib import namespaces as namespace_manager

TENANTS = ("acme", "initech")
QUEUES = ("default", "counter", "rollup", "announcements", "audit")
MONTH = 30 * 86_400

app = Flask(__name__)
app.wsgi_app = wrap_wsgi_app(app.wsgi_app, use_deferred=True)


@app.before_request
def guard() -> None:
    """Keep the workers for the queues, and have everybody else choose a tenant."""
    if "X-AppEngine-QueueName" in request.headers:  # a task, in its namespace already; nobody else can send this
        return
    if request.path.startswith(("/worker", "/_ah/")):
        abort(403)
    tenant = request.values.get("tenant", TENANTS[0])
    if tenant not in TENANTS:
        abort(404)
    namespace_manager.set_namespace(tenant)


@app.post("/count")
def count() -> Response:
    task = taskqueue.add(url="/worker", params={"key": request.form["key"], "amount": 1}, queue_name="counter")
    return say(f"task {task.name} will count")


@app.post("/batch")
def batch() -> Response:
    """Count many keys: a list of tasks is one call, and the audit's task is added meanwhile."""
    keys = request.form["keys"].split()
    audit = taskqueue.Task(payload=f"a batch of {len(keys)}")  # has no URL, so it goes to its queue's
    rpc = taskqueue.Queue("audit").add_async(audit)
    tasks = [taskqueue.Task(url="/worker", params={"key": key, "amount": 1}) for key in keys]
    for start in range(0, len(tasks), taskqueue.MAX_TASKS_PER_ADD):
        taskqueue.Queue("counter").add(tasks[start : start + taskqueue.MAX_TASKS_PER_ADD])
    return say(f"{len(keys)} tasks will count; task {rpc.get_result().name} audits that")


@app.post("/worker")
def worker() -> tuple[str, int]:
    models.increment(request.form["key"], int(request.form["amount"]), task_id())
    return "", 204


@app.post("/_ah/queue/audit")
def audit_worker() -> tuple[str, int]:
    models.note(task_id(), request.get_data(as_text=True))
    return "", 204


def task_id() -> str:
    """Return what is the same in every attempt of a task, and another's never."""
    return f"{request.headers['X-AppEngine-QueueName']}/{request.headers['X-AppEngine-TaskName']}"


@app.post("/rollup")
def rollup() -> Response:
    """Add up today's counters, once a day, however often this is called."""
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    name = f"rollup-{namespace_manager.get_namespace()}-{day}"
    countdown = float(request.form.get("countdown", 0))
    try:
        taskqueue.add(name=name, url="/worker/rollup", params={"day": day}, queue_name="rollup", countdown=countdown)
    except taskqueue.TaskAlreadyExistsError:
        return say(f"{name} is waiting already")
    except taskqueue.TombstonedTaskError:
        return say(f"{name} has run, or was deleted")
    return say(f"{name} is added")


@app.post("/worker/rollup")
def rollup_worker() -> tuple[str, int]:
    models.roll_up(request.form["day"])
    return "", 204


@app.post("/flaky")
def flaky() -> Response:
    """Add a task whose first two attempts fail, as if it needed a service that is down."""
    options = taskqueue.TaskRetryOptions(task_retry_limit=5, min_backoff_seconds=0.2, max_doublings=1)
    task = taskqueue.add(url="/worker/flaky", params={"failures": 2}, retry_options=options)
    return say(f"task {task.name} will fail twice")


@app.post("/worker/flaky")
def flaky_worker() -> tuple[str, int]:
    retries = int(request.headers["X-AppEngine-TaskRetryCount"])
    executions = request.headers["X-AppEngine-TaskExecutionCount"]
    previous = request.headers.get("X-AppEngine-TaskPreviousResponse")
    models.note(f"{task_id()} {retries}", f"flaky: retry {retries}, executions {executions}, previous {previous}")
    return ("not yet", 500) if retries < int(request.form["failures"]) else ("", 204)


def announce(key: str, goal: int) -> None:
    """Note that a counter has reached its goal; until then, ask to be called again."""
    value = models.state()["counters"].get(key)
    if value is None:
        raise deferred.PermanentTaskFailure(f"there is no counter {key!r}")  # no use in another attempt
    if value < goal:
        raise deferred.SingularTaskFailure  # as any other exception, but no error is logged
    models.note(f"announce {key} {goal}", f"{key} has reached {goal}")


@app.post("/announce")
def announce_later() -> Response:
    options = taskqueue.TaskRetryOptions(min_backoff_seconds=0.5, max_backoff_seconds=2, task_age_limit=86_400)
    key, goal = request.form["key"], int(request.form["goal"])
    task = deferred.defer(announce, key, goal, _countdown=0.5, _queue="announcements", _retry_options=options)
    return say(f"task {task.name} will announce that {key} has reached {goal}")


class NotingHandler(deferred.Handler):
    """Runs deferred calls, and notes which task did."""

    def run_from_request(self, environ: dict[str, Any]) -> Any:
        answer = super().run_from_request(environ)
        models.note(task_id(), "old tasks are forgotten")
        return answer


@app.post("/forget")
def forget_later() -> Response:
    deferred.defer(models.forget, time.time() - MONTH, _url="/worker/forget")
    return say("old tasks will be forgotten")


@app.post("/worker/forget")
def forget_worker() -> Any:
    return NotingHandler().post(request.environ)


@app.post("/delete")
def delete() -> Response:
    task = taskqueue.Queue(request.form["queue"]).delete_tasks_by_name(request.form["name"])
    return say(f"{task.name} {'is deleted' if task.was_deleted else 'was not there'}")


@app.post("/purge")
def purge() -> Response:
    taskqueue.Queue(request.form["queue"]).purge()
    return say(f"queue {request.form['queue']} is empty")


@app.get("/queues")
def queues() -> dict[str, Any]:
    names = ("tasks", "oldest_eta_usec", "executed_last_minute", "in_flight", "enforced_rate")
    statistics = [taskqueue.Queue(queue).fetch_statistics() for queue in QUEUES]
    return {each.queue.name: {name: getattr(each, name) for name in names} for each in statistics}


@app.get("/counters")
def counters() -> dict[str, Any]:
    former, states = namespace_manager.get_namespace(), {}
    for tenant in TENANTS:
        namespace_manager.set_namespace(tenant)
        states[tenant] = models.state()
    namespace_manager.set_namespace(former)
    return states


@app.get("/")
def home() -> str:
    return render_template("home.html", tenant=namespace_manager.get_namespace(), counters=counters(), queues=queues())


def say(text: str) -> Response:
    return redirect(url_for("home", tenant=namespace_manager.get_namespace(), said=text), 303)
