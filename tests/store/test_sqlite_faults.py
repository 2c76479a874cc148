"""The SQLite store under real faults: locks held elsewhere, full and read-only disks, fsyncs that fail, kill -9."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest

from deferlib import errors
from deferlib.store.sqlite import SqliteStore
from tests.store.children import child, mounts, run, strace
from tests.store.stores import add, ids, live, open_store, task

HOLDER = """
connection = apsw.Connection(sys.argv[1])
while hear() == "lock":
    connection.execute("begin exclusive")
    say("locked")
    hear()
    connection.execute("rollback")
    say("unlocked")
"""


def opened(folder: Path, busy_seconds: float = 2) -> SqliteStore:
    store = open_store(lambda folder: SqliteStore(str(folder / "tasks.db"), busy_seconds=busy_seconds), folder)
    assert isinstance(store, SqliteStore)
    return store


# --- locked ---------------------------------------------------------------------------------------------------------


def test_lock_held_by_another_process_is_busy_in_time_for_every_thread(tmp_path: Path) -> None:
    store = opened(tmp_path, busy_seconds=0.3)
    took: list[float] = []

    def attempt(id: int) -> None:
        start = time.monotonic()
        with pytest.raises(errors.StoreBusyError, match=r"tasks\.db: another process"):
            add(store, task(id))
        took.append(time.monotonic() - start)

    with child(HOLDER, store.path) as holder:
        holder.tell("lock")
        holder.hear()
        threads = [threading.Thread(target=attempt, args=(id,)) for id in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        holder.tell("release")
        holder.hear()

    assert len(took) == 6
    assert min(took) >= 0.3
    assert max(took) < 1.2, "the wait for other threads counts: six in a line don't take six times as long"
    assert add(store, task(9)) == ["added"]
    assert ids(live(store)) == [9]
    store.close()


def test_add_goes_on_when_the_lock_is_released(tmp_path: Path) -> None:
    store = opened(tmp_path, busy_seconds=20)
    results: list[str] = []
    with child(HOLDER, store.path) as holder:
        holder.tell("lock")
        holder.hear()
        thread = threading.Thread(target=lambda: results.extend(add(store, task(1))))
        thread.start()
        holder.tell("release")
        assert holder.hear() == "unlocked"
        thread.join(10)

    assert results == ["added"]
    store.close()


def test_reading_needs_no_write_lock(tmp_path: Path) -> None:
    store = opened(tmp_path, busy_seconds=0.1)
    add(store, task(1))
    with child(HOLDER.replace("exclusive", "immediate"), store.path) as holder:
        holder.tell("lock")
        holder.hear()

        assert ids(live(store)) == [1]

        holder.tell("release")
    store.close()


def test_reader_sees_a_snapshot_while_others_write(tmp_path: Path) -> None:
    store = opened(tmp_path)
    add(store, task(1))

    with store.read() as tx:
        before = ids(tx.find("default", ["1", "2"]))
        thread = threading.Thread(target=add, args=(store, task(2)))
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "a reader doesn't keep a writer waiting"
        after = ids(tx.find("default", ["1", "2"]))

    assert before == after == [1]
    assert ids(live(store)) == [1, 2]
    store.close()


# --- no room, no right ----------------------------------------------------------------------------------------------


FILL = """
store = open_store(lambda _: SqliteStore(folder + "/tasks.db", busy_seconds=1), None)
def fill(first):
    acknowledged = []
    for id in range(first, first + 10_000):
        try:
            assert add(store, task(id, body=b"x" * 5000)) == ["added"]
            acknowledged.append(id)
        except errors.StoreFullError as error:
            assert store.path in str(error) and "Free some space" in str(error)
            return acknowledged
    raise AssertionError("never full")
def check(acknowledged):
    assert ids(live(store)) == acknowledged, "what failed left nothing, what was acknowledged is there"
    assert stats(store).tasks == len(acknowledged)
    assert apsw.Connection(store.path).pragma("integrity_check") == "ok"
"""


def test_full_disk_stores_nothing_and_works_again_when_there_is_room(tmp_path: Path) -> None:
    code = """
import subprocess
folder = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], check=True)
with open(folder + "/ballast", "wb") as file:
    file.write(bytes(600_000))
{FILL}
first = fill(1)
check(first)
for _ in range(3):
    try:
        add(store, task(50_000, body=b"x" * 5000))
    except errors.StoreFullError:
        continue
    raise AssertionError("there is no room")
check(first)
os.unlink(folder + "/ballast")
second = fill(20_000)
check(first + second)
say(len(first), len(second))
"""

    [counts] = run(code.replace("{FILL}", FILL), tmp_path, under=mounts())

    first, second = map(int, counts.split())
    assert first > 20
    assert second > 20


def test_log_isnt_made_larger_than_it_must_be_where_there_is_little_room(tmp_path: Path) -> None:
    code = """
import subprocess
folder = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "none", folder], check=True)
store = open_store(lambda _: SqliteStore(folder + "/tasks.db", busy_seconds=1), None)
for id in range(1, 21):
    add(store, task(id, body=b"x" * 5000))
before = os.path.getsize(store.path + "-wal")
with store.serving(lambda: None):
    assert os.path.getsize(store.path + "-wal") == before
    for id in range(21, 1_500):  # the store stays small: there is room for it
        add(store, task(id, body=b"x" * 5000))
        store.run(lambda tx: tx.purge(NOW, "default", 1))
say(stats(store).tasks)
"""

    assert run(code, tmp_path, under=mounts()) == ["20"]


def test_log_that_cant_be_extended_gives_the_room_back(tmp_path: Path) -> None:
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
store = open_store(lambda _: SqliteStore(sys.argv[1] + "/tasks.db"), None)
for id in range(1, 21):
    add(store, task(id, body=b"x" * 5000))
with store.serving(lambda: None):
    assert os.path.getsize(store.path + "-wal") == 0
    assert add(store, task(21)) == ["added"]
say(*ids(live(store)))
"""

    assert run(code, tmp_path) == [" ".join(map(str, range(1, 22)))]


def test_engine_starts_at_once_beside_a_long_transaction(tmp_path: Path) -> None:
    store, other = opened(tmp_path), SqliteStore(str(tmp_path / "tasks.db"), busy_seconds=10)
    with store.begin(durable=True):
        started = time.monotonic()
        with other.serving(lambda: None):
            took = time.monotonic() - started
    store.close()
    other.close()

    assert took < 5, "nothing of it may wait for as long as a task's add may"


def test_file_size_limit_is_a_full_disk_too(tmp_path: Path) -> None:
    code = """
import resource
folder = sys.argv[1]
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
{FILL}
first = fill(1)
check(first)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
assert add(store, task(30_000)) == ["added"]
check(first + [30_000])
say(len(first))
"""

    [count] = run(code.replace("{FILL}", FILL), tmp_path)

    assert int(count) > 20


def test_full_disk_while_it_is_made_leaves_nothing(tmp_path: Path) -> None:
    code = """
import subprocess
folder = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", folder], check=True)
try:
    SqliteStore(folder + "/tasks.db").migrate()
except errors.StoreFullError as error:
    say("full", os.listdir(folder))
subprocess.run(["mount", "-o", "remount,size=2m", folder], check=True)
say(*add(open_store(lambda _: SqliteStore(folder + "/tasks.db"), None), task(1)))
"""

    assert run(code, tmp_path, under=mounts()) == ["full []", "added"]


def test_read_only_disk_is_told_and_works_again_when_it_isnt(tmp_path: Path) -> None:
    code = """
import subprocess
folder = sys.argv[1]
def remount(how):
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)
def try_to(work):
    try:
        work()
    except errors.StoreError as error:
        assert folder in str(error)
        say(type(error).__name__)
subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
store = open_store(lambda _: SqliteStore(folder + "/tasks.db", busy_seconds=1), None)
add(store, task(1))
store.close()
remount("ro")
try_to(lambda: add(store, task(2)))
try_to(lambda: SqliteStore(folder + "/new.db").migrate())
remount("rw")
say(*add(store, task(2)))
say(ids(live(store)))
"""

    told = run(code, tmp_path, under=mounts())

    assert told[0] in ("StoreReadOnlyError", "StoreUnavailableError")
    assert told[1:] == ["StoreUnavailableError", "added", "[1, 2]"]


# --- syncing --------------------------------------------------------------------------------------------------------


def test_durable_commits_are_synced_and_others_arent(tmp_path: Path) -> None:
    code = """
store = open_store(lambda _: SqliteStore(sys.argv[1]), None)
for id in range(20):
    if sys.argv[2] == "durable":
        add(store, task(id))
    else:
        with store.begin(durable=False) as tx:
            tx.add(NOW, [task(id)])
os._exit(0)
"""

    def syncs(how: str) -> int:
        log = tmp_path / f"{how}.log"
        run(code, tmp_path / how / "tasks.db", how, under=strace("-o", str(log), "-e", "trace=fsync,fdatasync"))
        return len(re.findall(r"\bf(?:data)?sync\(", log.read_text()))

    durable, other = syncs("durable"), syncs("other")

    assert durable - other == 20


FAILING = """
store = SqliteStore(sys.argv[1])
results = {}
def attempt(id, name):
    try:
        return str(*add(store, task(id, name=name)))
    except errors.StoreError as error:
        assert store.path in str(error)
        return type(error).__name__
for id in range(1, 13):
    if id % 3 == 0:
        with store.begin(durable=False) as tx:  # in the log, but not synced: lost with the pages of a failed fsync
            tx.add(NOW, [task(100 + id)])
    name = f"n{id}" if id % 2 else None
    result = attempt(id, name)
    say(id, result)
    if result == "EnqueueUnknownError":
        say(id, attempt(id, name))
say("found", *ids(live(store, limit=99)))
say("count", stats(store).tasks)
say("check", apsw.Connection(store.path).pragma("integrity_check"))
"""


def failing_fsync(which: int) -> list[str]:
    return strace("-o", "/dev/null", "-e", "trace=fdatasync", "-e", f"inject=fdatasync:error=EIO:when={which}")


@pytest.mark.parametrize("which", [1, 3, 4, 5, 8, 12])
def test_failed_fsync_is_an_unknown_outcome_and_the_same_add_again_is_safe(tmp_path: Path, which: int) -> None:
    opened(tmp_path).close()
    path = tmp_path / "tasks.db"

    told = run(FAILING, path, under=failing_fsync(which))

    results = [line.split() for line in told]
    unknown = [id for id, result, *_ in results if result == "EnqueueUnknownError"]
    assert len(unknown) == 1, told
    told_again = [result for id, result, *_ in results if id == unknown[0]][1:]
    assert told_again == ["exists" if which > 2 else "added"], "the log's header comes before anything is in it"
    assert {result for id, result, *_ in results if id.isdigit()} == {"added", "EnqueueUnknownError", *told_again}
    expected = sorted([*range(1, 13), *(103, 106, 109, 112)])
    assert [sorted(map(int, rest)) for word, *rest in results if word == "found"] == [expected]
    assert ["count", "16"] in results
    assert ["check", "ok"] in results
    store = SqliteStore(str(path))
    assert ids(live(store)) == expected, "doubled nothing, lost nothing"
    store.close()


def test_after_a_failed_fsync_the_log_starts_anew_at_once(tmp_path: Path) -> None:
    """What the log held unsynced may never reach the disk, and a reader of the log stops where something is missing."""
    code = """
import shutil
store = SqliteStore(sys.argv[1])
live(store)  # or else the writer would be the last connection, and write the log back as it closes
with store.begin(durable=False) as tx:
    tx.add(NOW, [task(1)])
try:
    add(store, task(2))
except errors.EnqueueUnknownError:
    say("unknown")
shutil.copy(store.path, store.path + ".copy")  # without the log; closing this descriptor matters no more
os._exit(0)
"""
    path = tmp_path / "tasks.db"
    opened(tmp_path).close()

    assert run(code, path, under=failing_fsync(3)) == ["unknown"], "after the header of the log and its folder"

    copy = SqliteStore(f"{path}.copy")
    assert ids(live(copy)) == [1, 2], "the log's content was synced into the file, before anybody adds anything to it"
    copy.close()


@pytest.mark.parametrize("which", [3, 5, 8])
def test_kill_within_an_fsync_keeps_what_was_acknowledged(tmp_path: Path, which: int) -> None:
    code = """
store = SqliteStore(sys.argv[1])
for id in range(1, 10):
    add(store, task(id, name=f"n{id}"))
    say(id)
"""
    store = opened(tmp_path)
    store.close()
    heard = tmp_path / "heard"
    inject = strace("-o", "/dev/null", "-e", "trace=fdatasync", "-e", f"inject=fdatasync:signal=SIGKILL:when={which}")

    run(code, store.path, under=["sh", "-c", f'"$@" > {heard}; true', "sh", *inject])

    acknowledged = [int(line) for line in heard.read_text().split()]
    assert which - 3 <= len(acknowledged) < 9
    found = ids(live(store))
    assert len(found) - len(acknowledged) in (0, 1)
    assert found[: len(acknowledged)] == acknowledged
    assert [str(*add(store, task(id, name=f"n{id}"))) for id in acknowledged] == ["exists"] * len(acknowledged)
    store.close()


# --- kill -9 --------------------------------------------------------------------------------------------------------

KILLS = """
import random, select
from collections import Counter
path, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)

def live_and_die(first, pipe):
    # Adds, claims and settles, and tells each step only after the store has acknowledged it.
    store = SqliteStore(path)
    for id in range(first, first + 100_000):
        assert add(store, task(id, name=f"n{id}" if id % 2 else None)) == ["added"]
        os.write(pipe, b"+%d\\n" % id)
        if id % 3 == 0:
            for each in claim(store, spec(limit=1)):
                assert settle(store, outcome(each, Action.DONE)) == [True]
                os.write(pipe, b"-%d\\n" % each.id)

open_store(lambda _: SqliteStore(path), None).close()
added, done, seen = set(), set(), Counter()
for kill in range(kills):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            live_and_die((kill + 1) * 1_000_000, writer)
        finally:
            os._exit(1)
    os.close(writer)
    heard, enough, until = b"", rng.choice([0, 1, 5, 20, 60]), time.monotonic() + rng.random() * 0.05
    while heard.count(b"\\n") < enough:  # a random moment: after so many acknowledgements, or so many milliseconds
        if select.select([reader], [], [], max(0, until - time.monotonic()))[0]:
            heard += os.read(reader, 65536)
        elif time.monotonic() >= until:
            break
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), status
    while more := os.read(reader, 65536):
        heard += more
    os.close(reader)
    steps = heard.decode().split()
    added |= {int(step[1:]) for step in steps if step[0] == "+"}
    done |= {int(step[1:]) for step in steps if step[0] == "-"}
    seen["before anything" if not steps else "at work"] += 1

    store = SqliteStore(path)
    found = set(ids(live(store, limit=10**6)))
    lost = added - done - found
    # One settle of each kill may have been committed without being heard of.
    assert len(lost) <= 1, (kill, sorted(lost))
    done |= lost
    assert not done & found, (kill, "settled tasks came back")
    extra = found - added
    assert len(extra) <= 1, (kill, sorted(extra))  # and one add
    added |= extra
    assert stats(store).tasks == len(found), kill
    assert apsw.Connection(path).pragma("integrity_check") == "ok", kill
    seen["committed and unheard"] += len(extra) + len(lost)
    with_lease = claim(store, now=NOW + 10 * LEASE)
    settle(store, *(outcome(each, Action.DONE) for each in with_lease), now=NOW + 10 * LEASE)
    done |= {each.id for each in with_lease}
    store.close()
say(len(added), dict(seen))
assert seen["at work"] > kills // 3 and len(added) > kills, "vacuous"
"""


def test_kill_9_at_any_moment_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    [counts] = run(KILLS, tmp_path / "tasks.db", 60, 20261121)

    print(counts)
