"""`deferlib dev` as its users have it: real processes, real requests, files that are saved while it runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.system.desk import Desk, alive
from tests.system.processes import TIMEOUT, listens, wait_until

APP = """
import os, time
import deferlib
from flask import Flask

app = Flask(__name__)
app.wsgi_app = deferlib.wrap_wsgi_app(app.wsgi_app)
GREETING = "Hello"

def greet(name):
    print(f"{GREETING}, {name}!")

def slow(seconds):
    print(f"attempt {deferlib.current_task().attempt} begins")
    time.sleep(seconds)
    print("slow is over")

def fail():
    raise ValueError("on purpose")

def die():
    if deferlib.current_task().attempt == 1:
        os._exit(9)
    print("risen")

@app.get("/pid")
def pid():
    return str(os.getpid())

@app.get("/do/<name>/<argument>")
def do(name, argument):
    deferlib.defer(globals()[name], argument)
    return "Later."

@app.get("/slow/<float:seconds>")
def be_slow(seconds):
    deferlib.defer(slow, seconds)
    return "Later."

@app.get("/fail/<int:limit>")
def do_fail(limit):
    deferlib.defer(fail, _retry_options=deferlib.taskqueue.TaskRetryOptions(task_retry_limit=limit))
    return "Later."

@app.get("/die")
def do_die():
    deferlib.defer(die, _countdown=0.2)  # after the answer
    return "Later."
"""


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path, APP)


def test_call_runs_and_is_told_and_so_is_where_everything_is(desk: Desk) -> None:
    with desk.dev():
        desk.sees("queues  default")
        desk.get("/do/greet/Ada")
        desk.sees(r"deskapp\.greet\('Ada'\) +queued")
        desk.sees(r"deskapp\.greet\('Ada'\) +ran in [\d.]+ m?s")

    assert f"http://127.0.0.1:{desk.port}" in desk.out
    assert f"{desk.folder}/.deferlib/tasks.db\n" in desk.out
    assert f"{desk.folder}/.deferlib/tasks.db.key" in desk.out
    assert "Hello, Ada!" in desk.out
    assert "note" not in desk.out
    assert desk.out.index("queued") < desk.out.index("ran in")


def test_failing_call_is_told_with_its_waits_and_its_end(desk: Desk) -> None:
    with desk.dev():
        desk.sees("queues")
        desk.get("/fail/2")
        desk.sees("is a dead letter now")

    waits = re.findall(r"deskapp\.fail\(\) +failed: ValueError: on purpose; retry in (.*)", desk.out)
    assert waits == ["0.1 s", "0.2 s"]
    assert re.search(r"dead letter now: limits: 3 failures: ValueError: on purpose · deferlib tasks show \d+", desk.out)
    assert re.search(r'Traceback.*\n  File ".*deskapp.py", line \d+, in fail', desk.out), "it begins in the user's code"


def test_saved_file_is_reloaded_and_the_engine_survives(desk: Desk) -> None:
    with desk.dev() as process:
        desk.sees("queues")
        before = desk.get("/pid")

        desk.save('"Hello"', '"Good day"')
        desk.sees("reloaded in")
        after = desk.get("/pid")
        desk.get("/do/greet/Ada")
        desk.sees("Good day, Ada!")

        assert before != after
        assert process.poll() is None


def test_call_cut_off_by_a_reload_runs_again_at_once(desk: Desk) -> None:
    with desk.dev():
        desk.sees("queues")
        desk.get("/slow/60.0")
        desk.sees("attempt 1 begins")

        desk.save("time.sleep(seconds)", "pass")
        desk.sees(r"deskapp\.slow\(60\.0\) +ran in .* \(attempt 2\)")

    assert re.search(r"deskapp\.slow\(60\.0\) +was cut off by the reload: runs again at once", desk.out)
    assert "attempt 2 begins" in desk.out


def test_request_during_a_reload_waits_instead_of_being_refused(desk: Desk) -> None:
    desk.save("GREETING =", "time.sleep(1)\nGREETING =")
    with desk.dev():
        desk.sees("queues")
        desk.save("time.sleep(1)", "time.sleep(1.01)")
        desk.sees("changed: reloading")

        assert desk.get("/pid").isdigit()


def test_syntax_error_is_shown_and_the_next_save_recovers(desk: Desk) -> None:
    with desk.dev():
        desk.sees("queues")
        desk.save('GREETING = "Hello"', 'GREETING = = "Hello"')
        desk.sees(r"can't be imported; save a file to try again")
        page = desk.get("/do/greet/Ada")
        desk.save('GREETING = = "Hello"', 'GREETING = "Back"')
        desk.sees("reloaded in")
        desk.get("/do/greet/Ada")
        desk.sees("Back, Ada!")

    assert "SyntaxError" in page
    assert re.search(r'deskapp.py", line 8\n.*GREETING = = "Hello"', desk.out)


def test_syntax_error_at_the_very_start_is_shown_and_the_next_save_recovers(desk: Desk) -> None:
    desk.save('GREETING = "Hello"', "GREETING = = ")
    with desk.dev():
        desk.sees("SyntaxError")
        desk.save("GREETING = = ", 'GREETING = "Mended"')
        desk.sees("queues")
        desk.get("/do/greet/Ada")
        desk.sees("Mended, Ada!")


def test_tasks_wait_uncharged_while_the_app_is_broken(desk: Desk) -> None:
    with desk.dev():
        desk.sees("queues")
        desk.get("/slow/60.0")
        desk.sees("attempt 1 begins")
        desk.save("time.sleep(seconds)", "= pass")
        desk.sees(r"can't be imported; save a file to try again")
        desk.save("= pass", "pass")
        desk.sees("slow is over")

    assert "attempt 2 begins" in desk.out, "the broken app was never asked"


def test_call_that_kills_the_app_is_retried_in_a_new_one(desk: Desk) -> None:
    with desk.dev():
        desk.sees("queues")
        desk.get("/die")
        desk.sees("risen")

    assert "ended with exit code 9: it is started again" in desk.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_lets_calls_finish_and_leaves_nothing_behind(desk: Desk, number: int) -> None:
    with desk.dev() as process:
        desk.sees("queues")
        child = int(desk.get("/pid"))
        desk.get("/slow/0.5")
        desk.sees("attempt 1 begins")

        process.send_signal(number)

        assert process.wait(TIMEOUT) == 0
        wait_until(lambda: not alive(child), "the app's process has ended")
        assert not listens(desk.port)
    assert "slow is over" in desk.out
    assert "1 running call:" in desk.out
    assert "Traceback" not in desk.out


def test_ctrl_c_in_a_terminal_reaches_both_processes_and_still_ends_cleanly(desk: Desk) -> None:
    with desk.dev() as process:
        desk.sees("queues")
        desk.get("/slow/0.5")
        desk.sees("attempt 1 begins")

        os.killpg(process.pid, signal.SIGINT)

        assert process.wait(TIMEOUT) == 0
    assert "slow is over" in desk.out
    assert "Traceback" not in desk.out


def test_second_signal_ends_at_once(desk: Desk) -> None:
    with desk.dev("--grace", "60") as process:
        desk.sees("queues")
        child = int(desk.get("/pid"))
        desk.get("/slow/60.0")
        desk.sees("attempt 1 begins")
        process.send_signal(signal.SIGINT)
        desk.sees("stopping")

        process.send_signal(signal.SIGINT)

        assert process.wait(10) == 128 + signal.SIGINT
        wait_until(lambda: not alive(child), "the app's process has ended")


def test_killed_and_started_again_it_runs_at_once_what_was_cut_off(desk: Desk) -> None:
    with desk.dev("--lease", "600") as process:
        desk.sees("queues")
        child = int(desk.get("/pid"))
        desk.get("/slow/60.0")
        desk.sees("attempt 1 begins")
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not alive(child), "the app dies with its parent")
        wait_until(lambda: not listens(desk.port), "the port is free again")
    desk.save("time.sleep(seconds)", "pass")

    with desk.dev("--lease", "600"):
        desk.sees("slow is over")

    assert "1 task from before in the store" in desk.out
    assert "attempt 2 begins" in desk.out


def test_settings_of_the_code_are_the_engines_too(desk: Desk) -> None:
    desk.save("GREETING =", 'deferlib.configure(store="sqlite:///other.db", key="a-key-of-sixteen-bytes")\nGREETING =')
    with desk.dev():
        desk.sees("queues")
        desk.get("/do/greet/Ada")
        desk.sees("Hello, Ada!")
        desk.save("other.db", "third.db")
        desk.sees("a new engine starts")
        desk.sees("queues", 2)
        desk.get("/do/greet/Bob")
        desk.sees("Hello, Bob!")

    assert (desk.folder / "other.db").exists()
    assert (desk.folder / "third.db").exists()
    assert not (desk.folder / ".deferlib").exists()


def test_plain_app_gets_the_handler_and_a_note(desk: Desk) -> None:
    desk.save("app.wsgi_app =", "unused =")
    with desk.dev():
        desk.sees("queues")
        desk.sees("note    deskapp:app isn't wrapped")
        desk.get("/do/greet/Ada")
        desk.sees("Hello, Ada!")


def test_asgi_app_is_served_and_reloaded_with_its_lifespan(desk: Desk) -> None:
    desk.module.write_text("""
import contextlib
import deferlib
from fastapi import FastAPI

@contextlib.asynccontextmanager
async def lifespan(app):
    print("it begins")
    yield
    print("it is over")

app = FastAPI(lifespan=lifespan)
GREETING = "Hello"

async def greet(name):
    print(f"{GREETING}, {name}!")

@app.get("/do/{name}")
async def do(name: str):
    await deferlib.adefer(greet, name)
    return "Later."
""")
    with desk.dev() as process:
        desk.sees("queues")
        desk.get("/do/Ada")
        desk.sees("Hello, Ada!")
        desk.sees(r"deskapp\.greet\('Ada'\) +ran in")
        desk.save('"Hello"', '"Good day"')
        desk.sees("reloaded in")
        desk.get("/do/Bob")
        desk.sees("Good day, Bob!")
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 0

    assert desk.out.count("it begins") == 2
    assert desk.out.count("it is over") == 2
    assert re.search(r"GET /do/Ada +200", desk.out)


# --- what can't start -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("app", "options", "message"),
    [
        ("nowhere:app", (), "there is no module 'nowhere'"),
        ("deskapp:ap", (), "deskapp has no 'ap'; did you mean 'app'?"),
        ("deskapp:GREETING", (), "is a str, not a WSGI or ASGI app"),
        ("deskapp:pid", (), "did you mean 'deskapp:pid()'?"),
        ("deskapp.py", (), "'deskapp.py' is not MODULE:APP, like deskapp:app"),
        ("deskapp:app", ("--store", "sqlite:///:memory:"), "a store in memory can't be shared"),
        ("deskapp:app", ("--store", "sqlite:///deskapp.py"), "deskapp.py"),
        ("deskapp:app", ("--lease", "soon"), "'soon' is not seconds"),
        ("deskapp:app", ("--port", "65536"), "is not a port"),
        ("deskapp:app", ("--host", "nowhere.invalid"), "is no address of this machine"),
    ],
)
def test_what_cannot_start_is_said_in_one_line(desk: Desk, app: str, options: tuple[str, ...], message: str) -> None:
    with desk.dev(*options, app=app) as process:
        assert process.wait(TIMEOUT) == 2

    assert desk.out.startswith("deferlib: error: ")
    assert message in desk.out
    assert len(desk.out.splitlines()) == 1
    assert not (desk.folder / ".deferlib").exists()


def test_port_in_use_is_said_in_one_line(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", desk.port)), desk.dev() as process:
        assert process.wait(TIMEOUT) == 2

    assert re.fullmatch(rf"deferlib: error: port {desk.port} of 127.0.0.1: address already in use; .*--port.*\n", desk.out)


def test_app_that_ends_its_process_while_it_starts_is_said_in_one_line(desk: Desk) -> None:
    desk.save("GREETING =", "os._exit(7)\nGREETING =")
    with desk.dev() as process:
        assert process.wait(TIMEOUT) == 1

    assert desk.out == "deferlib: error: the process of deskapp:app ended with exit code 7 while it started\n"


# --- what a reload must not do ----------------------------------------------------------------------------------------

NO_RETRY = "_retry_options=deferlib.taskqueue.TaskRetryOptions(task_retry_limit=0)"
LOAD = f"""
import os, time
import deferlib
from concurrent.futures import ThreadPoolExecutor

POOL = ThreadPoolExecutor(2)
COUNT = 300

def mark(number):
    POOL.submit(time.sleep, 0.005).result()
    os.close(os.open(f"ran-{{number}}", os.O_CREAT))

def app(environ, start_response):
    if environ["PATH_INFO"] == "/fill":
        for number in range(COUNT):
            deferlib.defer(mark, number, {NO_RETRY})
    start_response("200 OK", [])
    return [b"ok"]

MISTAKES = 0
"""


def test_saves_and_mistakes_under_load_lose_and_charge_no_task(desk: Desk) -> None:
    desk.write(LOAD)
    with desk.dev("--concurrency", "8"):
        desk.sees("queues")
        desk.get("/fill")
        for round in range(3):
            desk.save(f"MISTAKES = {round}", "MISTAKES = =")
            desk.sees("can't be imported", round + 1)
            desk.save("MISTAKES = =", f"MISTAKES = {round + 1}")
            desk.sees("reloaded in", round + 1)
        wait_until(lambda: len(list(desk.folder.glob("ran-*"))) == 300, "every call ran")

    assert "dead letter" not in desk.out


ASGI_APP = f"""
import asyncio, time
import deferlib
from fastapi import FastAPI

app = FastAPI()
SECONDS = 60

async def wait():
    print("it waits")
    await asyncio.sleep(SECONDS)
    print("it is over")

def block():
    print("it blocks")
    time.sleep(SECONDS)
    print("it is over")

@app.get("/do/{{name}}")
async def do(name: str):
    await deferlib.using({NO_RETRY[1:]}).adefer(globals()[name])
    return "Later."
"""


@pytest.mark.parametrize(("call", "begins"), [("wait", "it waits"), ("block", "it blocks")])
def test_asgi_call_cut_off_by_a_reload_is_neither_charged_nor_waited_for(desk: Desk, call: str, begins: str) -> None:
    desk.write(ASGI_APP)
    with desk.dev():
        desk.sees("queues")
        desk.get(f"/do/{call}")
        desk.sees(begins)
        desk.save("SECONDS = 60", "SECONDS = 0")
        desk.sees("it is over")

    assert "was cut off by the reload" in desk.out
    assert "dead letter" not in desk.out


def test_thread_that_never_ends_holds_up_no_reload(desk: Desk) -> None:
    desk.save("GREETING =", "import threading\nthreading.Thread(target=time.sleep, args=(3600,)).start()\nGREETING =")
    with desk.dev():
        desk.sees("queues")
        desk.save('"Hello"', '"Good day"')
        desk.sees("reloaded in")
        desk.get("/do/greet/Ada")
        desk.sees("Good day, Ada!")


def test_store_that_is_removed_and_made_again_gets_a_new_engine(desk: Desk) -> None:
    with desk.dev() as process:
        desk.sees("queues")
        shutil.rmtree(desk.folder / ".deferlib")
        desk.save('"Hello"', '"Good day"')
        desk.sees("a new engine starts")
        desk.get("/do/greet/Ada")
        desk.sees("Good day, Ada!")

        assert process.poll() is None


def test_settings_that_the_app_puts_into_its_environment_count(desk: Desk) -> None:
    desk.save("GREETING =", 'os.environ["DEFERLIB_STORE"] = "sqlite:///env.db"\nGREETING =')
    with desk.dev():
        desk.sees("queues")
        desk.get("/do/greet/Ada")
        desk.sees("Hello, Ada!")

    assert (desk.folder / "env.db").exists()
    assert not (desk.folder / ".deferlib").exists()


def test_ctrl_c_while_the_app_is_imported_ends_quietly_and_soon(desk: Desk) -> None:
    desk.save("GREETING =", 'print("importing")\ntime.sleep(60)\nGREETING =')
    with desk.dev() as process:
        desk.sees("importing")

        os.killpg(process.pid, signal.SIGINT)

        assert process.wait(2) == 0  # the child is given 3 s before it is killed
    assert desk.out == "importing\n"


def test_signals_while_the_app_is_imported_are_the_main_threads(desk: Desk) -> None:
    desk.save(
        "GREETING =",
        """
import os
for id in os.listdir("/proc/self/task"):
    with open(f"/proc/self/task/{id}/status") as status:
        [mask] = [int(line.split()[1], 16) for line in status if line.startswith("SigBlk:")]
    print("main" if int(id) == os.getpid() else "other", {number for number in (2, 15) if mask >> number - 1 & 1} or "none")
GREETING =""",
    )
    with desk.dev():
        desk.sees("until Ctrl-C")
        assert re.findall("^(main|other) (.*)", desk.out, re.MULTILINE) == [("main", "none"), ("other", "{2, 15}")]


def test_mistake_in_queue_yaml_is_mended_by_saving_queue_yaml(desk: Desk) -> None:
    queue_yaml = desk.folder / "queue.yaml"
    queue_yaml.write_text("queue:\n- name: mail\n")
    with desk.dev():
        desk.sees("queues  default, mail")
        queue_yaml.write_text("queue:\n- nme: mail\n")
        desk.save('"Hello"', '"Good day"')
        desk.sees("the queues stay as they are: .*queue.yaml:2:3: queue name None")
        desk.sees("reloaded in")
        desk.get("/do/greet/Ada")
        desk.sees("Good day, Ada!")
        queue_yaml.write_text("queue:\n- name: mail\n- name: more\n")
        os.utime(queue_yaml, (time.time() + 5, time.time() + 5))
        desk.sees("queue.yaml is applied|reloaded in")


def test_app_that_ends_its_process_after_a_save_is_tried_again_at_the_next_one(desk: Desk) -> None:
    with desk.dev():
        desk.sees("queues")
        desk.save("GREETING =", "os._exit(3)\nGREETING =")
        desk.sees("ended with exit code 3 while it started; save a file to try again")
        page = desk.get("/pid")
        desk.save("os._exit(3)\nGREETING =", "GREETING =")
        desk.sees("reloaded in")
        assert desk.get("/pid").isdigit()

    assert "ended with exit code 3" in page


def test_asgi_app_whose_startup_fails_is_a_page_until_the_next_save(desk: Desk) -> None:
    desk.write(
        ASGI_APP.replace(
            "app = FastAPI()",
            "async def lifespan(app):\n    raise RuntimeError('no database')\n    yield\napp = FastAPI(lifespan=lifespan)",
        )
    )
    with desk.dev():
        desk.sees("no database")
        desk.sees("startup failed")
        page = desk.get("/do/wait")
        desk.save("raise RuntimeError('no database')", "pass")
        desk.sees("queues")

    assert "can't be served" in page


def test_app_run_at_the_end_of_the_module_is_ignored(desk: Desk) -> None:
    desk.write(desk.module.read_text() + "\napp.run()\n")
    with desk.dev():
        desk.sees("queues")
        desk.get("/do/greet/Ada")
        desk.sees("Hello, Ada!")
