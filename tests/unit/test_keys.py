"""Signing keys: derivation, the ring, and the file they are kept in."""

from __future__ import annotations

import grp
import hashlib
import hmac
import logging
import os
import pwd
import re
import stat
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from deferlib import keys, owners
from deferlib.errors import ConfigError, KeyringError

FIRST = "first-key-0123456789"
SECOND = "second-key-0123456789"


# --- derivation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 32, 63, 64, 65, 200])
def test_mac_is_the_hmac_of_its_parts_together(length: int) -> None:
    key = bytes(range(length))

    assert keys.mac(key, b"one", b"", b"two" * 1000) == hmac.digest(key, b"one" + b"two" * 1000, "sha256")
    assert keys.mac(key) == hmac.digest(key, b"", "sha256"), "the state that is kept isn't used up"


def test_derivation_is_hkdf_of_rfc_5869_test_case_3() -> None:
    okm = bytes.fromhex("8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d")

    assert keys._derive(b"\x0b" * 22, b"", 32) == okm


@pytest.mark.parametrize("length", [1, 8, 31, 32])
def test_derivation_is_hkdf_with_info_as_written_down_in_the_rfc(length: int) -> None:
    secret, info = FIRST.encode(), b"deferlib/payload/1"
    extracted = hmac.new(b"\x00" * 32, secret, hashlib.sha256).digest()
    expanded = hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()

    assert keys._derive(secret, info, length) == expanded[:length]


@given(st.binary(min_size=16, max_size=200), st.binary(max_size=50), st.integers(1, 32))
def test_derivation_is_that_of_the_cryptography_library(secret: bytes, info: bytes, length: int) -> None:
    assert keys._derive(secret, info, length) == HKDF(SHA256(), length, None, info).derive(secret)


def test_each_purpose_has_a_key_of_its_own() -> None:
    key = keys.parse(FIRST).signing

    assert len({key.payload, key.dispatch, key.id.ljust(32)}) == 3
    assert not key.payload.startswith(key.id)
    assert not key.dispatch.startswith(key.id)
    assert len(key.payload) == len(key.dispatch) == 32
    assert len(key.id) == 8


def test_formats_are_final() -> None:
    """What was signed by an earlier release is still verified: these values never change."""
    key = keys.parse("0123456789abcdef").signing

    assert key.id.hex() == "5f6db7f73725ced6"
    assert key.payload.hex()[:16] == "691757315284fca4"
    assert key.dispatch.hex()[:16] == "f2fe71dd91e44aae"


# --- the ring -------------------------------------------------------------------------------------------------------


def test_first_key_signs_and_all_are_known() -> None:
    ring = keys.parse(f"{FIRST},{SECOND}")
    alone = keys.parse(SECOND).signing

    assert ring.signing.payload == keys.parse(FIRST).signing.payload
    assert ring.ids() == [ring.signing.id, alone.id]
    found = ring.get(alone.id)
    assert found is not None
    assert found.payload == alone.payload


def test_unknown_id_is_none() -> None:
    assert keys.parse(FIRST).get(b"12345678") is None


@pytest.mark.parametrize(
    "text",
    [f"{FIRST},{SECOND}", f" {FIRST} , {SECOND} ", f"{FIRST}\n{SECOND}\n", f"{FIRST},\n,{SECOND},", f"{FIRST}\r\n{SECOND}"],
)
def test_keys_are_separated_by_commas_or_lines(text: str) -> None:
    assert keys.parse(text).ids() == keys.parse(f"{FIRST},{SECOND}").ids()


def test_key_that_stands_there_twice_counts_once_at_its_first_place() -> None:
    ring = keys.parse(f"{FIRST},{SECOND},{FIRST}")

    assert ring.ids() == keys.parse(f"{FIRST},{SECOND}").ids()
    assert ring.signing.id == keys.parse(FIRST).signing.id


def test_comments_are_lines_that_begin_with_a_number_sign_and_a_space() -> None:
    text = f"# for the shop, and its mail\n{FIRST}\n#\n#{SECOND}\n# {SECOND}\n"

    assert keys.parse(text).ids() == keys.parse(f"{FIRST},#{SECOND}").ids()


def test_comments_alone_are_no_ring() -> None:
    with pytest.raises(KeyringError, match="there is no signing key"):
        keys.parse("# nothing here\n")


@pytest.mark.parametrize("text", ["", " ", ",", "\n\n", ", ,"])
def test_empty_ring_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(KeyringError, match=r"no signing key.*`deferlib keys new`"):
        keys.parse(text)


def test_short_key_is_refused_without_showing_it() -> None:
    with pytest.raises(KeyringError, match="signing key 2 has 15 bytes, at least 16 are needed") as caught:
        keys.parse(f"{FIRST},fifteen-bytes-x")

    assert "fifteen" not in str(caught.value)
    assert "first-key" not in str(caught.value)


def test_16_bytes_are_enough_and_bytes_count_not_characters() -> None:
    assert keys.parse("sixteen-bytes-xx").signing
    assert keys.parse("ßßßßßßßß").signing


def test_bytes_that_are_no_utf_8_count_as_they_are() -> None:
    raw = b"\xff\xfe" * 8

    assert keys.parse(raw.decode("utf-8", "surrogateescape")).signing.id == keys.Keyring([raw]).signing.id


def test_key_that_no_encoding_has_is_a_keyring_error_without_showing_it() -> None:
    with pytest.raises(KeyringError) as caught:
        keys.parse("hidden-0123456789\ud800")

    assert "hidden" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_keyring_error_is_a_config_error() -> None:
    assert issubclass(KeyringError, ConfigError)


def test_repr_and_str_show_ids_only() -> None:
    ring = keys.parse(f"{FIRST},{SECOND}")
    key = ring.signing
    shown = f"{ring!r} {ring} {key!r} {key}"

    assert key.id.hex() in shown
    for secret in (FIRST, SECOND, key.payload.hex(), key.dispatch.hex(), repr(key.payload), repr(key.dispatch)):
        assert secret not in shown


def test_generated_keys_differ_and_are_long_enough() -> None:
    made = {keys.generate() for _ in range(50)}

    assert len(made) == 50
    assert all(len(keys.parse(text).ids()) == 1 and len(text) >= 43 for text in made)


# --- the file -------------------------------------------------------------------------------------------------------


def test_file_is_made_once_with_mode_0600_in_a_folder_of_mode_0700(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tasks.db.key"

    first = keys.from_file(str(path))
    again = keys.from_file(str(path))

    assert first.ids() == again.ids()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["tasks.db.key"]


def test_file_and_its_name_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        assert (tmp_path / "key").exists() is synced[-1], "the content first, then the name"
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)

    keys.from_file(str(tmp_path / "key"))

    assert synced == [False, True]


@pytest.mark.parametrize("mask", [0o000, 0o077, 0o777])
def test_file_has_mode_0600_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "key"
    former = os.umask(mask)
    try:
        keys.from_file(str(path))
    finally:
        os.umask(former)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o644])
def test_file_that_others_can_open_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    path.write_text(FIRST)
    path.chmod(mode)

    with pytest.raises(KeyringError, match=rf"mode {mode:04o}\); run `chmod 600 ") as caught:
        keys.from_file(str(path))

    assert FIRST not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n", "short"])
def test_bad_file_is_refused_by_name_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(0o600)

    with pytest.raises(KeyringError, match=str(path)):
        keys.from_file(str(path))

    assert path.read_text() == content


def test_file_of_several_lines_is_a_ring(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{FIRST}\n{SECOND}\n")
    path.chmod(0o600)

    assert keys.from_file(str(path)).ids() == keys.parse(f"{FIRST},{SECOND}").ids()


def test_file_that_is_no_utf_8_is_read_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"\xff" * 32)
    path.chmod(0o600)

    assert keys.from_file(str(path)).ids() == keys.Keyring([b"\xff" * 32]).ids()


def test_folder_in_its_place_is_a_keyring_error(tmp_path: Path) -> None:
    with pytest.raises(KeyringError, match="can't be read: it is a folder; move it away"):
        keys.from_file(str(tmp_path))


def test_pipe_in_its_place_is_a_keyring_error_and_nobody_waits_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key", 0o600)

    with pytest.raises(KeyringError, match="can't be read: it is no file; move it away"):
        keys.from_file(str(tmp_path / "key"))


def test_link_that_leads_nowhere_is_a_keyring_error_and_makes_no_key(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to(tmp_path / "unmounted")

    with pytest.raises(KeyringError, match="can't be read: No such file or directory; bring it back"):
        keys.from_file(str(tmp_path / "key"))

    assert os.listdir(tmp_path) == ["key"]


def test_large_file_is_no_key_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"x" * 70_000)
    path.chmod(0o600)

    with pytest.raises(KeyringError, match="more than 65536 bytes, so it is no key file"):
        keys.from_file(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_file_of_another_user_is_refused_with_whose_it_is(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(FIRST)
    path.chmod(0o600)
    tmp_path.chmod(0o755)
    code = (
        "import os, sys; from deferlib import keys\n"
        "os.chdir(os.path.dirname(sys.argv[1])); os.setuid(65534)\n"
        "try: keys.from_file('key')\nexcept keys.KeyringError as error: print(error)"
    )

    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout == (
        "key: the signing keys can't be read: Permission denied; it belongs to root: run this process as the same user\n"
    )


# --- who could have put it there --------------------------------------------------------------------------------------


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the file, or the link, somebody else's: give it away, or else become somebody else."""
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534, follow_symlinks=False)
    else:
        stranger = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: stranger)


def key_file(folder: Path, text: str = FIRST) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "key"
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_file_that_somebody_else_has_put_there_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root, say, can read it all the same, and would run whatever its owner signs."""
    path = key_file(tmp_path)
    give_away(path, monkeypatch)

    with pytest.raises(KeyringError) as caught:
        keys.from_file(str(path))

    assert re.match(
        rf"{path}: the signing keys belong to .+, not to (.+ or )?root; run this process as ", str(caught.value)
    )
    assert f"`chown {owners.myself()} {path}`" in str(caught.value)
    assert FIRST not in str(caught.value)


def test_link_that_somebody_else_has_put_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = key_file(tmp_path / "mine")
    link = tmp_path / "key"
    link.symlink_to(path)
    ours = keys.from_file(str(link))
    give_away(link, monkeypatch)

    assert ours.ids() == [ONE]
    with pytest.raises(KeyringError, match=r"the signing keys belong to .+, not to (.+ or )?root"):
        keys.from_file(str(link))


def test_roots_file_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a secret that is mounted into a container."""
    path = key_file(tmp_path)
    me = os.geteuid()
    monkeypatch.setattr(owners, "_ROOT", me)
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)

    assert keys.from_file(str(path)).ids() == [ONE]


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o702])
@pytest.mark.parametrize("exists", [True, False])
def test_folder_that_others_can_write_to_is_refused_and_no_key_made_in_it(tmp_path: Path, mode: int, exists: bool) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    if exists:
        key_file(folder)
    folder.chmod(mode)

    with pytest.raises(KeyringError) as caught:
        keys.from_file(str(folder / "key"))

    assert str(caught.value) == (
        f"{folder / 'key'}: others could put keys of theirs in its place: others can write to its folder "
        f"(mode {mode:04o}); run `chmod go-w {folder}`, or keep the store in a folder below it, which is made for you alone"
    )
    assert os.listdir(folder) == ["key"] * exists


def test_folder_behind_a_link_is_looked_at_as_well(tmp_path: Path) -> None:
    path = key_file(tmp_path / "open")
    path.parent.chmod(0o777)
    (tmp_path / "key").symlink_to(path)

    with pytest.raises(KeyringError, match=f"chmod go-w {path.parent}`"):
        keys.from_file(str(tmp_path / "key"))


def test_sticky_folder_keeps_our_file_where_it_is(tmp_path: Path) -> None:
    path = key_file(tmp_path / "tmp")
    path.parent.chmod(0o1777)

    assert keys.from_file(str(path)).ids() == [ONE]


def test_folder_in_a_folder_that_all_can_write_to_is_ours(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)

    assert keys.from_file(str(tmp_path / "own" / "key")).ids()
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    path = key_file(tmp_path / "theirs")
    os.chown(path.parent, 65534, 65534)

    with pytest.raises(
        KeyringError, match=r"its folder belongs to .+, not to (.+ or )?root; keep the store in one of your own"
    ):
        keys.from_file(str(path))


def test_group_may_write_to_the_folder_if_nobody_else_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a group for each user, folders that are made with the umask 002 are their owner's alone."""
    path = key_file(tmp_path / "shop")
    path.parent.chmod(0o775)
    user, members = pwd.getpwuid(os.geteuid()), list[str]()
    of_user = [path.parent.stat().st_gid]
    monkeypatch.setattr(owners, "_ROOT", -1)  # whose group is root's alone anyway
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group((user.pw_name, "x", gid, members)))
    monkeypatch.setattr(
        pwd, "getpwuid", lambda uid: pwd.struct_passwd((user.pw_name, "x", uid, of_user[-1], "", "/", "/bin/sh"))
    )

    assert keys.from_file(str(path)).ids() == [ONE]
    members.append(user.pw_name)
    assert keys.from_file(str(path)).ids() == [ONE]
    members.append("somebody")
    with pytest.raises(KeyringError, match=r"others can write to its folder \(mode 0775\)"):
        keys.from_file(str(path))
    members.pop()
    of_user.append(of_user[0] + 1)
    with pytest.raises(KeyringError, match="others can write to its folder"):
        keys.from_file(str(path))


def test_user_and_group_without_a_name_are_told_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = 3_999_999_999
    path = key_file(tmp_path / "shop")
    path.parent.chmod(0o770)
    monkeypatch.setattr(owners, "_is_alone_in", partial(lambda real, gid: real(unknown), owners._is_alone_in))

    assert owners.name(unknown) == f"user {unknown}"
    with pytest.raises(KeyringError, match="others can write to its folder"):
        keys.from_file(str(path))


def test_place_that_can_t_be_written_is_a_keyring_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(KeyringError, match=r"can't be written.*set DEFERLIB_KEY"):
        keys.from_file(str(tmp_path / "file" / "key"))


def test_file_system_without_hard_links_is_a_keyring_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)

    with pytest.raises(KeyringError, match="can't be written"):
        keys.from_file(str(tmp_path / "key"))

    assert os.listdir(tmp_path) == []


def test_processes_that_make_the_file_at_once_agree(tmp_path: Path) -> None:
    path = tmp_path / "key"
    code = "import sys; from deferlib import keys; sys.stdin.read(1); print(keys.from_file(sys.argv[1]).signing.id.hex())"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    shown = {process.communicate(b"x", timeout=60)[0] for process in processes}

    assert shown == {keys.from_file(str(path)).signing.id.hex().encode() + b"\n"}
    assert os.listdir(tmp_path) == ["key"]


def test_made_by_another_process_between_look_and_link_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    real = os.link

    def late(source: str, target: str) -> None:
        path.write_text(SECOND)
        path.chmod(0o600)
        real(source, target)

    monkeypatch.setattr(os, "link", late)

    assert keys.from_file(str(path)).ids() == keys.parse(SECOND).ids()
    assert os.listdir(tmp_path) == ["key"]


# --- a file that changes ----------------------------------------------------------------------------------------------


class Watched:
    """A key file in use: its ring, a clock for when it is looked at, and what was logged."""

    def __init__(self, path: Path, log: pytest.LogCaptureFixture) -> None:
        self.path = path
        self.now = 100.0
        self._log = log
        self.write(FIRST)

    def write(self, *lines: str) -> None:
        """Replace the file, as `keys rotate` does."""
        draft = self.path.with_suffix(".draft")
        draft.write_text("\n".join(lines))
        draft.chmod(0o600)
        draft.replace(self.path)

    def wait(self) -> None:
        """Let the time between two looks pass."""
        self.now += keys.LOOK_EVERY

    @property
    def errors(self) -> list[str]:
        return [record.getMessage() for record in self._log.records if record.levelno == logging.ERROR]


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Watched:
    caplog.set_level(logging.INFO, "deferlib.keys")
    file = Watched(tmp_path / "key", caplog)
    monkeypatch.setattr(keys, "monotonic", lambda: file.now)
    return file


ONE, TWO = keys.parse(FIRST).signing.id, keys.parse(SECOND).signing.id


def test_changed_file_is_taken_within_a_second(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    ring = keys.from_file(str(watched.path))
    watched.write(SECOND, FIRST)
    at_once = ring.signing.id
    watched.wait()

    assert (at_once, ring.signing.id) == (ONE, TWO)
    assert ring.ids() == [TWO, ONE]
    assert caplog.messages == [f"{watched.path} was changed: key {TWO.hex()} signs now, and verifies, {ONE.hex()}"]


@pytest.mark.parametrize("use", ["signing", "get", "ids"])
def test_every_use_of_the_ring_looks_at_the_file(watched: Watched, use: str) -> None:
    ring = keys.from_file(str(watched.path))
    watched.write(SECOND)
    watched.wait()

    match use:
        case "signing":
            assert ring.signing.id == TWO
        case "get":
            assert ring.get(ONE) is None, "it was retired"
        case "ids":
            assert ring.ids() == [TWO]


def test_unknown_key_is_looked_for_at_once(watched: Watched) -> None:
    ring = keys.from_file(str(watched.path))
    watched.write(FIRST, SECOND)

    found = ring.get(TWO)

    assert found is not None
    assert found.id == TWO


def test_unknown_keys_cost_a_limited_number_of_looks(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = keys.from_file(str(watched.path))
    looks: list[str] = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path: looks.append(path) or real(path))

    for number in range(10_000):
        assert ring.get(b"%8d" % number) is None
    many = len(looks)
    watched.write(FIRST, SECOND)
    too_many = ring.get(TWO)
    watched.wait()

    assert many == 100
    assert too_many is None
    assert ring.get(TWO) is not None


def test_file_is_not_looked_at_in_between(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = keys.from_file(str(watched.path))
    watched.wait()
    assert ring.signing.id == ONE
    monkeypatch.setattr(os, "stat", lambda path: pytest.fail("too often"))

    for _ in range(10):
        assert ring.signing.id == ONE
        assert ring.get(ONE) is not None


def test_unchanged_file_is_not_read_again(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = keys.from_file(str(watched.path))
    monkeypatch.setattr(keys, "read", lambda path: pytest.fail("read again"))
    watched.wait()

    assert ring.signing.id == ONE


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "there is no signing key; `deferlib keys new` makes a good one"),
        ("short", "signing key 1 has 5 bytes, at least 16 are needed"),
        ("# only a comment", "there is no signing key"),
    ],
)
def test_changed_file_that_is_wrong_keeps_the_ring_and_is_told_once(watched: Watched, content: str, said: str) -> None:
    ring = keys.from_file(str(watched.path))
    watched.write(content)
    for _ in range(3):
        watched.wait()
        assert ring.signing.id == ONE
    watched.write(SECOND)
    watched.wait()

    assert ring.signing.id == TWO
    [error] = watched.errors
    assert error.startswith("the signing keys stay what they were when they were read last, until this process ends: ")
    assert f"{watched.path}: {said}" in error


def test_file_that_vanishes_keeps_the_ring_and_is_told_once(watched: Watched) -> None:
    ring = keys.from_file(str(watched.path))
    kept = watched.path.rename(watched.path.with_suffix(".kept"))
    for _ in range(3):
        watched.wait()
        assert (ring.signing.id, ring.get(TWO)) == (ONE, None)
    kept.rename(watched.path)
    watched.wait()

    assert ring.signing.id == ONE
    [error] = watched.errors
    assert error.endswith(f"{watched.path} is gone; bring it back")
    assert not kept.exists()


def test_file_that_others_can_read_is_not_taken_until_it_is_mended(watched: Watched) -> None:
    ring = keys.from_file(str(watched.path))
    watched.write(SECOND)
    watched.path.chmod(0o644)
    watched.wait()
    open_to_all = ring.signing.id
    watched.path.chmod(0o600)  # changes neither its time, nor its inode, nor its size
    watched.wait()

    assert (open_to_all, ring.signing.id) == (ONE, TWO)
    [error] = watched.errors
    assert error.endswith(f"run `chmod 600 {watched.path}`")


def test_file_that_somebody_else_puts_in_its_place_is_not_taken(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = keys.from_file(str(watched.path))
    watched.write(SECOND)
    give_away(watched.path, monkeypatch)
    for _ in range(2):
        watched.wait()
        assert (ring.signing.id, ring.get(TWO)) == (ONE, None)

    [error] = watched.errors
    assert "the signing keys belong to " in error


def test_file_that_changes_in_a_folder_of_everybody_is_not_taken_until_that_is_mended(watched: Watched) -> None:
    ring = keys.from_file(str(watched.path))
    watched.write(SECOND)
    watched.path.parent.chmod(0o777)
    watched.wait()
    open_to_all = ring.signing.id
    watched.path.parent.chmod(0o755)
    watched.wait()

    assert (open_to_all, ring.signing.id) == (ONE, TWO)
    [error] = watched.errors
    assert f"run `chmod go-w {watched.path.parent}`" in error


def test_file_that_came_back_and_vanishes_again_is_told_again(watched: Watched) -> None:
    ring = keys.from_file(str(watched.path))
    away = watched.path.with_suffix(".away")
    for _ in range(2):
        watched.path.rename(away)
        watched.wait()
        assert ring.signing.id == ONE
        away.rename(watched.path)
        watched.wait()
        assert ring.signing.id == ONE

    assert len(watched.errors) == 2


def test_mistake_that_comes_again_is_told_again(watched: Watched) -> None:
    ring = keys.from_file(str(watched.path))
    for content in ("", FIRST, ""):
        watched.write(content)
        watched.wait()
        assert ring.signing.id == ONE

    assert len(watched.errors) == 2


def test_nothing_of_a_secret_is_logged(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    ring = keys.from_file(str(watched.path))
    for content in (SECOND, "fifteen-bytes-x", "hidden-0123456789\n# hidden"):
        watched.write(content)
        watched.wait()
        assert ring.ids()

    assert len(caplog.messages) == 3
    for secret in ("first-key", "second-key", "fifteen", "hidden"):
        assert secret not in caplog.text


def test_ring_of_a_setting_looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = keys.parse(FIRST)
    monkeypatch.setattr(keys, "monotonic", lambda: 1e12)
    monkeypatch.setattr(os, "stat", lambda path: pytest.fail("there is no file"))

    assert ring.signing.id == ONE
    assert ring.get(TWO) is None


def test_threads_always_find_a_whole_ring_while_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file always holds both keys, so that each must always be found, and one of them signs."""
    file = Watched(tmp_path / "key", None)  # type: ignore[arg-type]  # nothing is logged
    file.write(FIRST, SECOND)
    monkeypatch.setattr(keys, "LOOK_EVERY", 0.0)
    ring = keys.from_file(str(file.path))
    wrong: list[object] = []
    done = threading.Event()

    def use() -> None:
        while not done.is_set():
            if None in (ring.get(ONE), ring.get(TWO)) or ring.signing.id not in (ONE, TWO):
                wrong.append(ring.ids())

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(300):
        file.write(*((SECOND, FIRST) if number % 2 == 0 else (FIRST, SECOND)))
    done.set()
    for thread in threads:
        thread.join(60)

    assert wrong == []
    file.write(SECOND, FIRST, "# the last word")
    assert ring.signing.id == TWO
