from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import ConfigError, SecurityError
from nearfar.secure.identity import Pin, ServerIdentity

IDENTITY = ServerIdentity(bytes(range(32)))
PIN_TEXT = "nf1:aoqqpp7tzyil4hlq3umoos6atft6jvrqtosq2xy53sdgiesvgg4fmr22u4"


def test_pin_text_of_a_known_key_never_changes() -> None:
    assert str(IDENTITY.pin) == PIN_TEXT


@given(st.binary(min_size=32, max_size=32))
def test_pins_survive_being_written_and_read(public_key: bytes) -> None:
    pin = Pin(public_key)
    assert Pin.parse(str(pin)) == pin
    assert Pin.parse(f"  {str(pin).upper()}\n") == pin


@given(st.integers(4, len(PIN_TEXT) - 1), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
def test_any_mistyped_character_is_noticed(position: int, character: str) -> None:
    mistyped = PIN_TEXT[:position] + character + PIN_TEXT[position + 1 :]
    if mistyped != PIN_TEXT:
        with pytest.raises(ConfigError, match="a character is mistyped"):
            Pin.parse(mistyped)


def test_one_key_has_one_spelling() -> None:
    """The last character carries two bits that mean nothing; they must be zero."""
    assert PIN_TEXT[-1] == "4"  # 28 = 0b11100
    for spelling in "567":
        with pytest.raises(ConfigError, match="mistyped"):
            Pin.parse(PIN_TEXT[:-1] + spelling)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not start with nf1:"),
        ("sha256/abc", "does not start with nf1:"),
        (PIN_TEXT[:-1], "57 characters after nf1: instead of 58"),
        (PIN_TEXT + "a", "59 characters"),
        (PIN_TEXT[:-1] + "1", "characters other than a-z and 2-7"),
        (PIN_TEXT[:-1] + "é", "characters other than a-z and 2-7"),
    ],
)
def test_what_is_not_a_pin_says_why_and_what_to_do(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        Pin.parse(text)
    assert "nearfar cloud identity show" in caught.value.fix


@given(st.text(max_size=70))
def test_any_text_is_a_pin_or_a_config_error(text: str) -> None:
    for candidate in (text, "nf1:" + text, "nf1:" + text.ljust(58, "a")):
        with contextlib.suppress(ConfigError):
            assert str(Pin.parse(candidate)) == candidate.strip().lower()


def test_signatures_hold_for_their_message_and_identity_only() -> None:
    signature = IDENTITY.sign(b"message")
    assert IDENTITY.pin.verifies(signature, b"message")
    assert not IDENTITY.pin.verifies(signature, b"other")
    assert not IDENTITY.pin.verifies(signature[:-1], b"message")
    assert not ServerIdentity.generate().pin.verifies(signature, b"message")


def test_identity_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    identity = ServerIdentity.generate()
    identity.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert ServerIdentity.load(path).pin == identity.pin
    assert ServerIdentity.load(path).sign(b"m") == identity.sign(b"m")


def test_identity_file_has_this_very_text(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    IDENTITY.save(path)
    assert path.read_text() == (
        "nearfar-identity 1\n"
        "seed 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n"
        f"pin {PIN_TEXT}\n"
    )


def test_saving_never_replaces_an_identity(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    IDENTITY.save(path)
    with pytest.raises(ConfigError, match="exists already"):
        ServerIdentity.generate().save(path)
    assert ServerIdentity.load(path).pin == IDENTITY.pin


def test_saving_under_a_missing_directory_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        IDENTITY.save(tmp_path / "missing" / "identity.key")


def test_missing_identity_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nearfar cloud init"):
        ServerIdentity.load(tmp_path / "identity.key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_identity_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    IDENTITY.save(path)
    os.chmod(path, mode)
    with pytest.raises(SecurityError, match="chmod 600"):
        ServerIdentity.load(path)


def test_damaged_seed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    IDENTITY.save(path)
    path.write_text(path.read_text().replace("seed 00", "seed 01"))
    with pytest.raises(SecurityError, match="is damaged"):
        ServerIdentity.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,
        b"nearfar-identity 2\nseed " + b"00" * 32 + b"\npin x\n",
        b"nearfar-identity 1\nseed " + b"00" * 31 + b"\npin x\n",
        b"nearfar-identity 1\nseed zz\npin x\n",
        b"nearfar-identity 1\n",
        b"-----BEGIN PRIVATE KEY-----\n" * 1000,
    ],
)
def test_other_files_are_not_taken_for_an_identity(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="not a nearfar identity file"):
        ServerIdentity.load(path)


def test_errors_and_repr_never_show_the_seed(tmp_path: Path) -> None:
    seed_hex = bytes(range(32)).hex()
    path = tmp_path / "identity.key"
    path.write_text(f"nearfar-identity 1\nseed {seed_hex}zz\npin x\n")
    path.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        ServerIdentity.load(path)
    assert seed_hex[:8] not in f"{caught.value!r} {caught.value.__cause__!r} {IDENTITY!r}"
