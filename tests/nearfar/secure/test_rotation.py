"""Rotation statements: signed by both identities, and by nobody else."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import ConfigError, SecurityError
from nearfar.secure.handshake import ClientHandshake, ServerHandshake
from nearfar.secure.identity import Pin, RotationStatement, ServerIdentity
from nearfar.secure.keys import KeyRing
from tests.support.wire import NOW_S

OLD, NEW = ServerIdentity(b"\x01" * 32), ServerIdentity(b"\x02" * 32)
STATEMENT = RotationStatement.issue(OLD, NEW, now_s=NOW_S)
TEXT = STATEMENT.text()


def test_a_statement_says_the_same_after_parsing() -> None:
    assert RotationStatement.parse(TEXT) == STATEMENT
    assert TEXT.splitlines()[:5] == [
        "nearfar-rotation 1", f"old {OLD.pin}", f"new {NEW.pin}",
        "issued 1800000000", "until 1802592000",
    ]  # fmt: skip


def test_the_signed_bytes_are_as_documented() -> None:
    signed = (
        b"nearfar/1 identity rotation\x00"
        + b"\x00\x20"
        + OLD.pin.public_key
        + b"\x00\x20"
        + NEW.pin.public_key
        + (1_800_000_000).to_bytes(8, "big")
        + (1_802_592_000).to_bytes(8, "big")
    )
    assert STATEMENT.old_signature == OLD.sign(signed)
    assert STATEMENT.new_signature == NEW.sign(signed)


THIEF = ServerIdentity(b"\x03" * 32)
FORGERIES = {
    "another successor": TEXT.replace(str(NEW.pin), str(THIEF.pin)),
    "another predecessor": TEXT.replace(str(OLD.pin), str(THIEF.pin)),
    "a later end": TEXT.replace("until 1802592000", "until 1802592001"),
    "another date": TEXT.replace("issued 1800000000", "issued 1800000001"),
    "the old signature twice": TEXT.replace(
        STATEMENT.new_signature.hex(), STATEMENT.old_signature.hex()
    ),
    "a flipped bit": TEXT[:-3] + ("0" if TEXT[-3] != "0" else "1") + TEXT[-2:],
    "an endless overlap": TEXT.replace("until 1802592000", "until 9999999999"),
    "no overlap": TEXT.replace("until 1802592000", "until 1800000000"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_nothing_in_a_statement_can_be_changed(name: str) -> None:
    assert FORGERIES[name] != TEXT
    with pytest.raises(SecurityError):
        RotationStatement.parse(FORGERIES[name])


def test_a_thief_without_the_old_key_cannot_announce_itself() -> None:
    forged = RotationStatement.issue(THIEF, THIEF, now_s=NOW_S).text()
    with pytest.raises(SecurityError):
        RotationStatement.parse(forged.replace(f"old {THIEF.pin}", f"old {OLD.pin}"))


@pytest.mark.parametrize(
    "text",
    ["", "nearfar-rotation 2", TEXT.replace("old ", "old  "), TEXT + "more x\n", TEXT[:200],
     TEXT.replace("1800000000", "-1"), TEXT.replace("1800000000", "١٨")],
)  # fmt: skip
def test_other_texts_are_no_statements(text: str) -> None:
    with pytest.raises(ConfigError, match="not a nearfar rotation statement"):
        RotationStatement.parse(text)


@given(st.text(max_size=300), st.integers(0, len(TEXT) - 1))
def test_any_text_is_a_statement_or_a_documented_error(text: str, cut: int) -> None:
    for candidate in (text, TEXT[:cut] + text):
        with contextlib.suppress(ConfigError, SecurityError):
            assert RotationStatement.parse(candidate) == STATEMENT


@pytest.mark.parametrize("overlap_s", [0, 3600, 400 * 24 * 3600])
def test_overlaps_are_bounded(overlap_s: int) -> None:
    with pytest.raises(ConfigError, match="Choose 1 to 366 days"):
        RotationStatement.issue(OLD, NEW, now_s=NOW_S, overlap_s=overlap_s)


@pytest.mark.parametrize("identity", [OLD, NEW])
def test_during_the_overlap_a_client_takes_either_identity(identity: ServerIdentity) -> None:
    client = ClientHandshake((NEW.pin, OLD.pin))
    server = ServerHandshake(KeyRing(identity, now_s=NOW_S), now_s=NOW_S)
    hello = client.receive_configuration(server.configuration.message, now_s=NOW_S)
    welcome, secrets = server.receive_hello(hello, now_s=NOW_S)
    assert client.receive_welcome(welcome) == secrets


def test_during_the_overlap_a_client_takes_no_third_identity() -> None:
    server = ServerHandshake(KeyRing(THIEF, now_s=NOW_S), now_s=NOW_S)
    with pytest.raises(SecurityError, match=f"expected {NEW.pin}"):
        ClientHandshake((NEW.pin, OLD.pin)).receive_configuration(
            server.configuration.message, now_s=NOW_S
        )


def test_a_rotated_identity_may_not_sign_with_the_old_key() -> None:
    """Both are trusted, but each configuration is by the one that it names."""
    message = bytearray(KeyRing(OLD, now_s=NOW_S).current(NOW_S).message)
    message[-96:-64] = NEW.pin.public_key
    with pytest.raises(SecurityError, match="not signed"):
        ClientHandshake((NEW.pin, OLD.pin)).receive_configuration(bytes(message), now_s=NOW_S)
    assert Pin(bytes(message[-96:-64])) == NEW.pin
