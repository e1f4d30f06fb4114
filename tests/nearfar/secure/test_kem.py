"""X-Wing sealing against the published vector and against damage."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nearfar.secure import kem

VECTOR = {
    name: value if name == "source" else bytes.fromhex(value)
    for name, value in json.loads(
        (Path(__file__).parent / "xwing_hpke_vector.json").read_text()
    ).items()
}


def _key_from_seed(seed: bytes) -> kem.KemPrivateKey:
    """X-Wing's expandDecapsulationKey: SHAKE-256 to 64 bytes for ML-KEM and 32 for X25519."""
    expanded = hashlib.shake_256(seed).digest(96)
    return kem.KemPrivateKey(
        MLKEM768PrivateKey.from_seed_bytes(expanded[:64]),
        X25519PrivateKey.from_private_bytes(expanded[64:]),
    )


def _hpke_key_and_nonce(shared_secret: bytes, info: bytes) -> tuple[bytes, bytes]:
    """RFC 9180, KeySchedule in base mode, for X-Wing, HKDF-SHA256, AES-256-GCM; written anew."""
    suite = b"HPKE" + bytes.fromhex("647a00010002")

    def extract(salt: bytes, label: bytes, ikm: bytes) -> bytes:
        return hmac.digest(salt, b"HPKE-v1" + suite + label + ikm, "sha256")

    def expand(secret: bytes, label: bytes, context: bytes, size: int) -> bytes:
        text = size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + context
        return hmac.digest(secret, text + b"\x01", "sha256")[:size]

    context = b"\x00" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared_secret, b"secret", b"")
    return expand(secret, b"key", context, 32), expand(secret, b"base_nonce", context, 12)


def test_public_keys_are_encoded_as_x_wing_says() -> None:
    assert _key_from_seed(VECTOR["skRm"]).public_bytes == VECTOR["pkRm"]
    assert len(VECTOR["pkRm"]) == kem.PUBLIC_KEY_BYTES


def test_opens_what_the_published_encapsulation_and_rfc_9180_give() -> None:
    key, nonce = _hpke_key_and_nonce(VECTOR["shared_secret"], VECTOR["info"])
    sealed = VECTOR["enc"] + AESGCM(key).encrypt(nonce, b"a seed", b"")
    assert _key_from_seed(VECTOR["skRm"]).open(sealed, VECTOR["info"]) == b"a seed"


def test_what_is_sealed_opens_only_with_the_same_key_and_info() -> None:
    key = kem.KemPrivateKey.generate()
    sealed = kem.seal(b"seed", key.public_bytes, b"info")
    assert sealed is not None
    assert len(sealed) == len(b"seed") + kem.OVERHEAD_BYTES
    assert key.open(sealed, b"info") == b"seed"
    assert key.open(sealed, b"other") is None
    assert kem.KemPrivateKey.generate().open(sealed, b"info") is None


@pytest.mark.parametrize("position", [0, 1087, 1088, 1119, 1120, -1])
def test_damage_in_either_encapsulation_or_ciphertext_is_noticed(position: int) -> None:
    key = kem.KemPrivateKey.generate()
    sealed = bytearray(kem.seal(b"seed", key.public_bytes, b"") or b"")
    sealed[position] ^= 1
    assert key.open(bytes(sealed), b"") is None


@pytest.mark.parametrize("size", [0, 100, 1119, 1120, 1135])
def test_short_ciphertexts_are_noticed(size: int) -> None:
    key = kem.KemPrivateKey.generate()
    sealed = kem.seal(b"", key.public_bytes, b"") or b""
    assert key.open(sealed[:size], b"") is None


@pytest.mark.parametrize(
    "public_key",
    [
        b"",
        bytes(100),
        b"\xff" * kem.PUBLIC_KEY_BYTES,  # coefficients beyond the modulus
        VECTOR["pkRm"][:1184] + bytes(32),  # X25519 point of low order
        VECTOR["pkRm"] + b"\x00",
    ],
    ids=["empty", "short", "out of range", "low order", "long"],
)
def test_nothing_is_sealed_to_an_unusable_key(public_key: bytes) -> None:
    assert kem.seal(b"seed", public_key, b"") is None
