"""Signing keys: derivation, the ring, and the file they are kept in."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from deferlib import keys
from deferlib.errors import ConfigError, KeyringError

FIRST = "first-key-0123456789"
SECOND = "second-key-0123456789"


# --- derivation -----------------------------------------------------------------------------------------------------


def test_derivation_is_hkdf_of_rfc_5869_test_case_3() -> None:
    okm = bytes.fromhex("8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d")

    assert keys._derive(b"\x0b" * 22, b"", 32) == okm


@pytest.mark.parametrize("length", [1, 8, 31, 32])
def test_derivation_is_hkdf_with_info_as_written_down_in_the_rfc(length: int) -> None:
    secret, info = FIRST.encode(), b"deferlib/payload/1"
    extracted = hmac.new(b"\x00" * 32, secret, hashlib.sha256).digest()
    expanded = hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()

    assert keys._derive(secret, info, length) == expanded[:length]


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


@pytest.mark.parametrize("text", ["", " ", ",", "\n\n", ", ,"])
def test_empty_ring_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(KeyringError, match=r"no signing key.*token_urlsafe"):
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
    with pytest.raises(KeyringError, match="can't be read"):
        keys.from_file(str(tmp_path))


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
