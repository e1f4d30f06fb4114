"""Identities that sign with ML-DSA-65 beside Ed25519: demanded by their pins, ignored by others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nearfar.errors import ConfigError, SecurityError
from nearfar.secure import identity as identity_module
from nearfar.secure.handshake import ClientHandshake, ServerHandshake
from nearfar.secure.identity import (
    COSIGNED_SIGNATURE_BYTES,
    Pin,
    RotationStatement,
    ServerIdentity,
)
from nearfar.secure.keys import KeyConfiguration, KeyRing
from tests.support.wire import NOW_S

mldsa = pytest.importorskip(
    "cryptography.hazmat.primitives.asymmetric.mldsa", reason="this cryptography has no ML-DSA"
)

SEED = bytes(range(32))
BOTH = ServerIdentity(SEED, cosigns=True)
ONE = ServerIdentity(SEED)
MESSAGE = KeyRing(BOTH, now_s=NOW_S).current(NOW_S).message


def shake(pin: Pin, tamper=bytes, *, identity: ServerIdentity = BOTH) -> None:
    client = ClientHandshake(pin)
    server = ServerHandshake(KeyRing(identity, now_s=NOW_S), now_s=NOW_S)
    first = tamper(server.configuration.message)
    welcome, secrets = server.receive_hello(
        client.receive_configuration(first, now_s=NOW_S), now_s=NOW_S
    )
    assert client.receive_welcome(welcome) == secrets


def test_the_pin_names_both_keys_and_survives_being_written() -> None:
    text = str(BOTH.pin)
    assert text.startswith("nf2:")
    assert len(text) == 113
    assert Pin.parse(f" {text.upper()}\n") == BOTH.pin
    assert BOTH.pin.public_key == ONE.pin.public_key
    assert BOTH.pin != ONE.pin
    for mistyped in (text[:-2] + "aa", text[:40] + ("a" if text[40] != "a" else "b") + text[41:]):
        with pytest.raises(ConfigError, match="mistyped"):
            Pin.parse(mistyped)
    with pytest.raises(ConfigError, match="58 characters after nf2: instead of 109"):
        Pin.parse("nf2:" + str(ONE.pin)[4:])


def test_the_file_says_whether_the_identity_cosigns(tmp_path: Path) -> None:
    for name, identity in (("both", BOTH), ("one", ONE)):
        identity.save(tmp_path / name)
        assert ServerIdentity.load(tmp_path / name).pin == identity.pin
    assert (tmp_path / "both").read_text().splitlines()[1] == f"seed {SEED.hex()}"


def test_the_signature_is_laid_out_as_documented() -> None:
    signature = BOTH.sign(b"m")
    assert len(signature) == COSIGNED_SIGNATURE_BYTES == 64 + 1952 + 3309
    assert signature[:64] == ONE.sign(b"m")
    assert hashlib.sha256(signature[64:2016]).digest() == BOTH.pin.cosigner_hash
    mldsa.MLDSA65PublicKey.from_public_bytes(signature[64:2016]).verify(signature[2016:], b"m")


@pytest.mark.parametrize("pin", [BOTH.pin, ONE.pin])
def test_a_cosigning_server_is_accepted_by_either_pin(pin: Pin) -> None:
    shake(pin)
    assert len(MESSAGE) == 6639
    assert KeyConfiguration.parse(MESSAGE).identity == BOTH.pin


def test_a_pin_with_a_cosigner_demands_the_cosignature() -> None:
    """A quantum computer that has the Ed25519 key alone gets nowhere."""
    with pytest.raises(SecurityError, match="not the pinned one"):
        shake(BOTH.pin, identity=ONE)
    with pytest.raises(SecurityError, match="not the pinned one"):
        shake(BOTH.pin, lambda message: message[: -(1952 + 3309)])


class Forger(ServerIdentity):
    """Has the Ed25519 key, and signs the rest with an ML-DSA key of its own."""

    __slots__ = ("shown",)

    def sign(self, message: bytes) -> bytes:
        own = mldsa.MLDSA65PrivateKey.from_seed_bytes(b"\x09" * 32)
        key = own.public_key().public_bytes_raw() if self.shown is None else self.shown
        return ONE.sign(message) + key + own.sign(message)


@pytest.mark.parametrize("shown", [None, MESSAGE[-5261:-3309]])
def test_another_cosigning_key_is_refused(shown: bytes | None) -> None:
    forger = Forger(SEED)
    forger.shown = shown
    with pytest.raises(SecurityError, match=r"not the pinned one|not signed by the pinned"):
        shake(BOTH.pin, identity=forger)


@pytest.mark.parametrize("position", [-1, -3309, -3310, -5261, -5262])
@pytest.mark.parametrize("pin", [BOTH.pin, ONE.pin])
def test_no_bit_of_a_signature_can_be_changed(pin: Pin, position: int) -> None:
    """Also what a plain pin ignores: the transcript has it."""

    def flipped(message: bytes) -> bytes:
        damaged = bytearray(message)
        damaged[position] ^= 1
        return bytes(damaged)

    with pytest.raises(SecurityError):
        shake(pin, flipped)


def test_stripping_the_cosignature_is_noticed_by_a_plain_pin_too() -> None:
    with pytest.raises(SecurityError, match="handshake failed"):
        shake(ONE.pin, lambda message: message[: -(1952 + 3309)])


def test_a_rotation_may_add_the_cosigner() -> None:
    old = ServerIdentity(b"\x01" * 32)
    for first, second in ((old, BOTH), (BOTH, old)):
        text = RotationStatement.issue(first, second, now_s=NOW_S).text()
        statement = RotationStatement.parse(text)
        assert (statement.old, statement.new) == (first.pin, second.pin)
    ed_only = text.replace(statement.old_signature.hex(), statement.old_signature[:64].hex())
    with pytest.raises(SecurityError):
        RotationStatement.parse(ed_only)


def test_a_cryptography_without_mldsa_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise identity_module._no_mldsa()

    monkeypatch.setattr(identity_module, "_mldsa", missing)
    with pytest.raises(SecurityError, match="pip install -U cryptography"):
        ServerIdentity(SEED, cosigns=True)
    with pytest.raises(SecurityError, match="no ML-DSA-65"):
        KeyConfiguration.parse(MESSAGE).verify(BOTH.pin, now_s=NOW_S)
    KeyConfiguration.parse(MESSAGE).verify(ONE.pin, now_s=NOW_S)
