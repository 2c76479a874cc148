"""What a type checker says of programs that use deferlib: right calls pass, and each wrong one is found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from datetime import datetime, timezone

import deferlib
from deferlib import deferred, taskqueue


def send(user_id: int, text: str, *, urgent: bool = False) -> None: ...


async def fetch(url: str) -> bytes:
    return b""


class Report:
    def make(self, year: int) -> str:
        return ""


mail = deferlib.using(queue="mail", countdown=5, deadline=30)
task: taskqueue.Task = mail.defer(send, 1, "hello")
mail.defer(send, 1, "hello", urgent=True)
mail.defer(send, user_id=1, text="hello")
mail.defer(fetch, "http://localhost/")
mail.defer(Report().make, 2026)
mail.defer(Report)
mail.defer(send)  # wrong: call-arg
mail.defer(send, 1)  # wrong: call-arg
mail.defer(send, "1", "hello")  # wrong: arg-type
mail.defer(send, 1, "hello", True)  # wrong: call-arg
mail.defer(send, 1, "hello", urgently=True)  # wrong: call-arg
mail.defer(send, 1, "hello", urgent="yes")  # wrong: arg-type
mail.defer(Report().make, "2026")  # wrong: arg-type
mail.defer(5)  # wrong: arg-type
deferlib.using(queu="mail")  # wrong: call-arg
deferlib.using(countdown=[5])  # wrong: arg-type
deferlib.using(name="a").defer(send, 1, 2)  # wrong: arg-type


async def later() -> None:
    await mail.adefer(send, 1, "hello")
    await deferlib.adefer(send, 1, "hello")
    await mail.adefer(send, "1", "hello")  # wrong: arg-type
    await deferlib.adefer(send, 1)  # wrong: call-arg


deferlib.defer(send, 1, "hello", _countdown=5, _eta=datetime.now(timezone.utc), _url=None, _headers=None)
deferred.defer(send, 1, "hello", _queue="mail", _retry_options=taskqueue.TaskRetryOptions(task_retry_limit=3))
deferlib.defer(send, 1, "hello", _countdown="soon", _queue=5)  # wrong: arg-type
taskqueue.Task("text", params={"a": 1}, headers={"X": ["1", "2"]})
taskqueue.Task(payload=5)  # wrong: arg-type
taskqueue.Task(colour="red")  # wrong: call-arg
taskqueue.TaskRetryOptions(tries=3)  # wrong: call-arg
call: taskqueue.UserRPC = taskqueue.Queue("mail").add_async(taskqueue.Task())
name: str | None = task.name
gone: bool = taskqueue.Queue("mail").delete_tasks_by_name("a").was_deleted
tasks: list[taskqueue.Task] = taskqueue.Queue("mail").add([task])
one: taskqueue.Task = taskqueue.Queue("mail").add(task)
several: taskqueue.Task = taskqueue.Queue("mail").add([task])  # wrong: assignment
"""


def test_checker_finds_each_wrong_call_and_no_other(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file=", str(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )

    found = {
        (int(line), kind) for line, kind in re.findall(r"program\.py:(\d+): error: .*\[([a-z-]+)\]$", checked.stdout, re.M)
    }
    wrong = {
        (number, kind.group(1))
        for number, line in enumerate(PROGRAM.splitlines(), 1)
        if (kind := re.search(r"# wrong: ([a-z-]+)$", line))
    }
    assert found == wrong, checked.stdout + checked.stderr
