"""queue.yaml: every field, every mistake, and whatever else people or fuzzers put into the file."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deferlib import queue_fields, queue_yaml
from deferlib.core.bucket import interval_of
from deferlib.core.model import DAY, HOUR, MINUTE, SECOND, Mode, QueueConfig, RetryPolicy
from deferlib.errors import InvalidQueueError
from deferlib.queue_fields import Place

FULL = """\
total_storage_limit: 120M
application: old
resume_paused_queues: true
queue:
- name: mail
  mode: push
  rate: 20/m
  bucket_size: 40
  max_concurrent_requests: 10
  target: v2.worker
  acl:
  - user_email: someone@example.com
  retry_parameters:
    task_retry_limit: 7
    task_age_limit: 2d
    min_backoff_seconds: 10
    max_backoff_seconds: 200.5
    max_doublings: 0
  deferlib:
    tombstone: 1h
    deadline: 90s
    lost_limit: 5
    jitter: 0.25
- name: Pull-Queue-1
  mode: pull
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queue.yaml"


def read(path: Path, text: str | bytes) -> list[QueueConfig]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return queue_yaml.read(path).queues


def one(**fields: object) -> QueueConfig:
    return queue_fields.from_mapping({"name": "mail", **fields}, Place("queue.yaml"))


# --- what is right ----------------------------------------------------------------------------------------------------


def test_every_field_is_read(path: Path) -> None:
    mail, pull = read(path, FULL)

    assert mail == QueueConfig(
        name="mail",
        mode=Mode.PUSH,
        rate=pytest.approx(1 / 3),
        bucket_size=40,
        max_concurrent=10,
        target="v2.worker",
        retry=RetryPolicy(
            retry_limit=7,
            age_limit=2 * DAY,
            min_backoff=10 * SECOND,
            max_backoff=round(200.5 * SECOND),
            max_doublings=0,
            jitter=0.25,
        ),
        tombstone=HOUR,
        deadline=90 * SECOND,
        lost_limit=5,
    )
    assert pull == QueueConfig(name="Pull-Queue-1", mode=Mode.PULL)


def test_what_is_not_written_is_unlimited() -> None:
    queue = one()

    assert queue == QueueConfig(name="mail")
    assert queue.rate is None
    assert queue.max_concurrent is None
    assert not queue.limited


def test_bucket_is_5_where_only_rate_is_given() -> None:
    assert one(rate="5/s").bucket_size == 5


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "queue:\n", "queue: []\n", "queue: ~\n", "---\n...\n", "application: x\n"]
)
def test_file_without_queues_has_none(path: Path, text: str) -> None:
    assert read(path, text) == []


@pytest.mark.parametrize(
    ("rate", "per_second"),
    [
        ("5/s", 5), ("1.5/m", 0.025), ("20/h", 20 / 3600), ("1/d", 1 / 86400), ("0/s", 0), ("0/d", 0), (0, 0), ("0", 0),
        (0.0, 0), ("500/s", 500), ("0.01/d", 0.01 / 86400), ("1000000/s", 1e6), ("1./s", 1),
    ],
)  # fmt: skip
def test_rates(rate: object, per_second: float) -> None:
    assert one(rate=rate).rate == pytest.approx(per_second)


@pytest.mark.parametrize(
    ("text", "micros"), [("30s", 30 * SECOND), ("1.5m", 90 * SECOND), ("2h", 2 * HOUR), ("9d", 9 * DAY), ("0.000001s", 1)]
)
def test_spans(text: str, micros: int) -> None:
    assert one(deferlib={"tombstone": text}).tombstone == micros
    assert one(retry_parameters={"task_age_limit": text}).retry.age_limit == micros


def test_default_yields_where_one_backoff_contradicts_it() -> None:
    assert one(retry_parameters={"min_backoff_seconds": 7200}).retry.max_backoff == 7200 * SECOND
    assert one(retry_parameters={"max_backoff_seconds": 0.01}).retry.min_backoff == SECOND // 100


def test_version_number_is_a_target() -> None:
    assert one(target=2).target == "2"


def test_nothing_written_is_the_default() -> None:
    nothing = dict.fromkeys(("rate", "max_concurrent_requests", "target", "retry_parameters", "deferlib", "acl"))

    assert one(**nothing) == one()
    assert one(retry_parameters=dict.fromkeys(("task_retry_limit", "task_age_limit", "max_doublings"))) == one()


# --- what is wrong: file, queue, value, what is allowed ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "pusch"}, r"mode 'pusch': push or pull"),
        ({"mode": ["push"]}, r"mode \['push'\]: push or pull"),
        ({"mode": None}, r"mode None: push or pull"),
        ({"rate": 5}, r"rate 5: a number and a unit are needed, like 5/s"),
        ({"rate": False}, r"rate False: a number and a unit"),
        ({"rate": "5"}, r"rate '5': a number and a unit"),
        ({"rate": "5/w"}, r"rate '5/w': a number and a unit"),
        ({"rate": "-1/s"}, r"rate '-1/s': a number and a unit"),
        ({"rate": "nan/s"}, r"rate 'nan/s'"),
        ({"rate": "\u0665/s"}, "rate '\u0665/s'"),
        ({"rate": "5/s\n"}, r"rate '5/s\\n'"),
        ({"rate": "0.001/d"}, r"rate '0.001/d': 0, to pause, or from 0.01/d to 1000000/s"),
        ({"rate": "9" * 400 + "/s"}, r"rate '9+…: 0, to pause"),
        ({"bucket_size": 0}, r"bucket_size: 0: a whole number from 1 to 1000000"),
        ({"bucket_size": 1.5}, r"bucket_size: 1.5: a whole number"),
        ({"bucket_size": "5"}, r"bucket_size: '5': a whole number"),
        ({"bucket_size": True}, r"bucket_size: True: a whole number"),
        ({"bucket_size": None}, r"bucket_size: None: a whole number"),
        ({"bucket_size": 10**400}, r"bucket_size: 1000.*…: a whole number"),
        ({"bucket_size": 10**5000}, r"bucket_size: a number: a whole number"),
        ({"max_concurrent_requests": 0}, r"max_concurrent_requests: 0: a whole number from 1"),
        ({"max_concurrent_requests": -1}, r"max_concurrent_requests: -1: a whole number from 1"),
        ({"target": "Worker"}, r"target: 'Worker': lower-case letters"),
        ({"target": ["a"]}, r"target: \['a'\]: lower-case letters"),
        ({"target": True}, r"target: True: lower-case letters"),
        ({"target": "http://x"}, r"target: 'http://x': lower-case letters"),
        ({"retry_parameters": []}, r"retry_parameters: is a mapping of max_backoff_seconds, "),
        ({"retry_parameters": 3}, r"retry_parameters: is a mapping"),
        ({"retry_parameters": {"retries": 3}}, r"retry_parameters: unknown key 'retries'; allowed are max_backoff_seconds"),
        ({"retry_parameters": {"task_retry_limit": -1}}, r"task_retry_limit: -1: a whole number from 0"),
        ({"retry_parameters": {"task_retry_limit": 1.0}}, r"task_retry_limit: 1.0: a whole number from 0"),
        ({"retry_parameters": {"task_age_limit": 60}}, r"task_age_limit: 60: a number and a unit are needed, like 30s"),
        ({"retry_parameters": {"task_age_limit": "0s"}}, r"task_age_limit: '0s': more than 0s and at most 3650d"),
        ({"retry_parameters": {"task_age_limit": "9" * 400 + "d"}}, r"at most 3650d"),
        ({"retry_parameters": {"max_doublings": "x"}}, r"max_doublings: 'x': a whole number from 0"),
        ({"retry_parameters": {"min_backoff_seconds": -1}}, r"min_backoff_seconds: -1: a number of seconds from 0"),
        ({"retry_parameters": {"min_backoff_seconds": float("nan")}}, r"min_backoff_seconds: nan: a number of seconds"),
        ({"retry_parameters": {"max_backoff_seconds": float("inf")}}, r"max_backoff_seconds: inf: a number of seconds"),
        ({"retry_parameters": {"max_backoff_seconds": 10**400}}, r"max_backoff_seconds: 1000.*: a number of seconds"),
        ({"retry_parameters": {"max_backoff_seconds": True}}, r"max_backoff_seconds: True: a number of seconds"),
        (
            {"retry_parameters": {"min_backoff_seconds": 2, "max_backoff_seconds": 1}},
            r"retry_parameters: min_backoff_seconds is larger than max_backoff_seconds",
        ),
        ({"deferlib": "x"}, r"deferlib: is a mapping of deadline, first_limit_wins, jitter"),
        ({"deferlib": False}, r"deferlib: is a mapping"),
        (
            {"deferlib": {"dedline": "1m"}},
            r"deferlib: unknown key 'dedline'; allowed are deadline, first_limit_wins, jitter",
        ),
        ({"deferlib": {"jitter": 1.1}}, r"deferlib: jitter: 1.1: a number from 0 to 1"),
        ({"deferlib": {"jitter": True}}, r"deferlib: jitter: True: a number from 0 to 1"),
        ({"deferlib": {"deadline": "721h"}}, r"deferlib: deadline: '721h': more than 0s and at most 30d"),
        ({"deferlib": {"tombstone": 5}}, r"deferlib: tombstone: 5: a number and a unit"),
        ({"deferlib": {"tombstone": "0.0000001s"}}, r"deferlib: tombstone: '0.0000001s': more than 0s"),
        ({"deferlib": {"lost_limit": 0}}, r"deferlib: lost_limit: 0: a whole number from 1"),
        ({"buckets": 5}, r"unknown key 'buckets'; allowed are acl, bucket_size"),
        ({1: 5}, r"unknown key 1; allowed are"),
    ],
)
def test_mistake_is_named_with_its_place_and_what_is_allowed(fields: dict[object, object], message: str) -> None:
    with pytest.raises(InvalidQueueError, match=f"^queue.yaml: queue 'mail': .*{message}"):
        queue_fields.from_mapping({"name": "mail", **fields}, Place("queue.yaml"))


@pytest.mark.parametrize("name", ["", "a b", "a_b", "x" * 501, "ä", "a\n", None, 3, ["a"], True])
def test_name_is_checked(name: object) -> None:
    with pytest.raises(InvalidQueueError, match=r"^q: queue name .*: 1 to 100 letters, digits and hyphens are allowed"):
        queue_fields.from_mapping({"name": name}, Place("q"))


@pytest.mark.parametrize("raw", [None, "mail", 3, ["mail"], []])
def test_queue_is_a_mapping(raw: object) -> None:
    with pytest.raises(InvalidQueueError, match=r"^q: a queue is a mapping with at least `name:`, not "):
        queue_fields.from_mapping(raw, Place("q"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("queue: x", "`queue:` is a list of queues"),
        ("queue: false", "`queue:` is a list of queues"),
        ("queue: {name: a}", "`queue:` is a list of queues"),
        ("- name: a", "is a mapping of application, queue"),
        ("just text", "is a mapping of application, queue"),
        ("queues:\n- name: a", "unknown key 'queues'; allowed are application, queue"),
        ("queue:\n- name: a\n- name: b\n- name: a", "queue 'a' stands there twice"),
        ("queue:\n- name: a\n  rate: 1/s\n  rate: 2/s", r"'rate' stands there twice"),
        ("queue:\n- name: [", r":2:10: is not the YAML of a queue.yaml: "),
        ("queue:\n\t- name: a", r":2:1: is not the YAML of a queue.yaml: .*\\t"),
        ("a: 1\n--- \nb: 2", "is not the YAML of a queue.yaml: but found another document"),
        ("queue:\n- name: 2024-13-45", "is not YAML: month must be in 1..12"),
        ("queue:\n- !!python/object/apply:os.system [echo]", r"tags \(!\) aren't allowed"),
        ("queue: !!timestamp x", r"tags \(!\) aren't allowed"),
        ("queue: &a []", r"anchors and aliases aren't allowed"),
        ("queue: *a", r"anchors and aliases aren't allowed"),
        ("a: &a 1\n? *a\n: 2", "anchors and aliases aren't allowed"),
        (b"queue: \xff\xfe", "is not YAML: .*invalid start byte"),
        (b"queue: \x00", "is not YAML: unacceptable character"),
        ("[" * 5_000, "is nested too deeply"),
        ("queue:\n- " + "- " * 5_000, "is nested too deeply"),
    ],
)
def test_mistake_in_the_file_is_named_in_one_line(path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InvalidQueueError, match=message) as caught:
        read(path, text)

    assert str(caught.value).startswith(f"{path}:")
    assert "\n" not in str(caught.value)


def test_mistake_in_a_queue_names_file_and_queue(path: Path) -> None:
    with pytest.raises(InvalidQueueError, match=f"^{path}:3:9: queue 'mail': rate '5/w': "):
        read(path, "queue:\n- name: mail\n  rate: 5/w")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("queue:\n- name: a b", "2:9: queue name 'a b'"),
        ("queue:\n- rate: 5/s", "2:3: queue name None"),
        ("queue:\n  - mail", "2:3: a queue is a mapping"),
        ("queue:\n- name: a\n  bucket_size:   0", "3:18: queue 'a': bucket_size: 0"),
        ("queue:\n- {name: a, mode: both}", "2:19: queue 'a': mode 'both': push or pull"),
        ("queue:\n- name: a\n  colour: red", "3:11: queue 'a': unknown key 'colour'"),
        ("queue:\n- name: a\n- name: b\n- name: a", "4:3: queue 'a' stands there twice"),
        ("queue:\n- name: a\n  deferlib:\n    jitter: 2", "4:13: queue 'a': deferlib: jitter: 2"),
        ("queue:\n- name: a\n  deferlib:\n    lost-limit: 0", "4:17: queue 'a': deferlib: lost_limit: 0"),
        ("queue:\n- name: a\n  deferlib: 5", "3:13: queue 'a': deferlib: is a mapping"),
        (
            "queue:\n- name: a\n  retry_parameters:\n    task_age_limit: 30",
            "4:21: queue 'a': retry_parameters: task_age_limit: 30",
        ),
        (
            "queue:\n- name: a\n  retry_parameters:\n    min_backoff_seconds: 9\n    max_backoff_seconds: 8",
            "4:26: queue 'a': retry_parameters: min_backoff_seconds is larger",
        ),
        ("queue:\n- name: a\n  acl:\n  - user: x", "4:3: queue 'a': acl: a list of"),
        ("total_storage_limit: 1.5", "1:22: total_storage_limit: 1.5: a number is needed"),
        ("total_storage_limit: 5X", "1:22: total_storage_limit: '5X': a number is needed"),
        ("resume_paused_queues: maybe", "1:23: resume_paused_queues: 'maybe': true or false"),
        ("application: [a]", "1:14: application: ['a']: a name is needed"),
        ("\n\nqueue: 5", "3:8: `queue:` is a list"),
        ("queue: []\nqueues: []", "2:9: unknown key 'queues'"),
    ],
)
def test_every_mistake_has_its_line_and_column(path: Path, text: str, place: str) -> None:
    with pytest.raises(InvalidQueueError) as caught:
        read(path, text)

    assert str(caught.value).startswith(f"{path}:{place}")


def test_what_has_no_effect_is_noted_with_its_place(path: Path) -> None:
    path.write_text(FULL + "  rate: 5/s\n")
    file = queue_yaml.read(path)

    assert [note.removeprefix(f"{path}:") for note in file.notes] == [
        "1:22: total_storage_limit isn't enforced",
        "12:3: queue 'mail': acl isn't enforced",
        "26:9: queue 'Pull-Queue-1': rate has no effect on a pull queue",
    ]
    assert file.resume_paused_queues is True
    assert [entry["name"] for entry in file.entries] == ["mail", "Pull-Queue-1"]


@pytest.mark.parametrize("limit", ["500M", "1.5K", "0", 120, "1G", "2T", "7B", ".5M", "5.M"])
def test_storage_limit_is_app_engines(path: Path, limit: object) -> None:
    assert read(path, f"total_storage_limit: {limit}") == []


@pytest.mark.parametrize("spelled", ["first_limit_wins", "first-limit-wins"])
def test_first_limit_may_win(spelled: str) -> None:
    assert one(deferlib={spelled: True}).retry.first_limit_wins is True
    assert one(retry_parameters={"task_retry_limit": 3}).retry.first_limit_wins is False
    with pytest.raises(InvalidQueueError, match="first_limit_wins: 'yes': true or false"):
        one(deferlib={spelled: "yes"})
    with pytest.raises(InvalidQueueError, match="stands there twice"):
        one(deferlib={"lost-limit": 1, "lost_limit": 2})


@pytest.mark.parametrize(
    "text",
    [
        "# a & b, *.example.com\nqueue:\n- name: a",
        "queue:\n- name: a\n  acl:\n  - user_email: 'a & *b @example.com'\n  - user_email: \"*.example.com\"",
        "queue:\n- name: a\n  acl: [{user_email: x&y}, {writer_email: 'a, *b'}, {user_email: \"- &c\"}]",
        "application: R&D *1\nqueue:\n- name: a",
        "application: '!important'\nqueue:\n- name: a",
    ],
)
def test_ordinary_text_with_stars_and_ampersands_is_no_anchor(path: Path, text: str) -> None:
    assert read(path, text) == [QueueConfig(name="a")]


def test_billion_laughs_is_refused_at_once(path: Path) -> None:
    levels = ["a0: &a0 [lol,lol,lol,lol,lol,lol,lol,lol,lol]"]
    levels += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    started = time.monotonic()

    with pytest.raises(InvalidQueueError, match="anchors and aliases"):
        read(path, "\n".join(levels))

    assert time.monotonic() - started < 2


def test_large_file_is_refused_unread(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(4 * 1024**4)  # four terabytes of nothing

    with pytest.raises(InvalidQueueError, match="is larger than 128 KiB"):
        queue_yaml.read(path)


def test_file_of_just_the_largest_size_is_read(path: Path) -> None:
    text = "queue:\n- name: a\n#"

    assert read(path, text + "x" * (queue_yaml.MAX_BYTES - len(text))) == [QueueConfig(name="a")]


def test_many_queues_take_no_quadratic_time() -> None:
    started = time.monotonic()

    configs = [QueueConfig(name=str(number)) for number in range(20_000)]
    queue_fields.refuse_twins(configs, [Place("q")] * len(configs))

    assert time.monotonic() - started < 5


def test_missing_file_and_folder_are_invalid_queue_errors(path: Path) -> None:
    for place in (path, path.parent):
        with pytest.raises(InvalidQueueError, match=f"{place}: can't be read: "):
            queue_yaml.read(place)


# --- anything at all --------------------------------------------------------------------------------------------------


def assert_sound(configs: list[QueueConfig]) -> None:
    """Whatever comes through can be kept, read back, and calculated with in 63 bits."""
    for queue in configs:
        assert QueueConfig.from_json(queue.to_json()) == queue
        assert queue.bucket_size * (interval_of(queue.rate) if queue.rate else 1) < 2**63 - 2**52
        assert 0 < queue.deadline <= 30 * DAY
        assert 0 < queue.tombstone < 2**52
        assert 0 <= queue.retry.min_backoff <= queue.retry.max_backoff < 2**52


anything = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@anything
@given(
    st.one_of(st.text(max_size=300), st.binary(max_size=300), st.text("queue:-name \n[]{},&*!?|>'\"%@#~0.1s/", max_size=60))
)
@example("=")
@example("<<: {a: 1}")
@example("!!int ''")
@example("? {a: 1}\n: 2")
@example("queue: 1:" + "59:" * 300 + "59.0")
@example("0x_")
@example("2001-01-01 00:00:00 +99:99")
@example("\ufeffqueue: []")
def test_any_text_gives_queues_or_an_invalid_queue_error(path: Path, text: str | bytes) -> None:
    try:
        configs = read(path, text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        message = f"{path}: "
    except InvalidQueueError as error:
        configs, message = [], str(error)
    assert message.startswith(f"{path}:")
    assert_sound(configs)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(),
    st.from_regex(r"[0-9]{1,3}(\.[0-9]{0,3})?(/)?[smhd]", fullmatch=True), st.just(10**400),
)  # fmt: skip
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3))
queues = st.dictionaries(
    st.sampled_from(sorted(queue_fields.KEYS)),
    st.one_of(
        values,
        st.dictionaries(st.sampled_from(sorted(queue_fields.RETRY_KEYS)), scalars),
        st.dictionaries(st.sampled_from(sorted(queue_fields.OWN_KEYS)), scalars),
    ),
)


@anything
@given(queues, st.sampled_from(["a", "default"]))
def test_any_mapping_gives_a_queue_or_an_invalid_queue_error(raw: dict[str, object], name: str) -> None:
    try:
        configs, message = [queue_fields.from_mapping({"name": name, **raw}, Place("configure()"))], "configure(): "
    except InvalidQueueError as error:
        configs, message = [], str(error)
    assert message.startswith("configure(): ")
    assert_sound(configs)


@anything
@given(
    st.builds(
        lambda rate, bucket, age, jitter: {"rate": rate, "bucket_size": bucket, "retry_parameters": {"task_age_limit": age},
                                           "deferlib": {"jitter": jitter}},
        st.from_regex(r"[1-9][0-9]{0,3}/[smhd]", fullmatch=True), st.integers(1, 500),
        st.from_regex(r"[1-9][0-9]{0,2}[smhd]", fullmatch=True), st.floats(0, 1),
    )
)  # fmt: skip
def test_written_as_yaml_reads_as_given(path: Path, raw: dict[str, object]) -> None:
    text = yaml.safe_dump({"queue": [{"name": "mail", **raw}]})

    assert read(path, text) == [one(**raw)]


def test_minute_is_the_unit_m() -> None:
    assert one(deferlib={"deadline": "1m"}).deadline == MINUTE


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can only be reset on Linux")
@pytest.mark.parametrize(
    "text", ["queue: [" + "[]," * 50_000 + "]", "queue: [" + "a," * 70_000 + "]", "queue:\n" + "- {a: 1}\n" * 20_000]
)
def test_no_file_takes_more_than_50_megabytes(path: Path, text: str) -> None:
    path.write_text(text[: queue_yaml.MAX_BYTES])
    code = (
        "import sys, yaml\nfrom pathlib import Path\nfrom deferlib import errors, queue_yaml\n"
        "def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "Path('/proc/self/clear_refs').write_text('5')\nbefore = peak()\n"
        "try: queue_yaml.read(Path(sys.argv[1]))\nexcept errors.InvalidQueueError: print(peak() - before)\n"
    )

    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True)

    assert 1_000 < int(done.stdout) < 50_000  # kilobytes
