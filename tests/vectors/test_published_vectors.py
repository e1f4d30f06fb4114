"""RFC 9180, X-Wing and ML-KEM by published vectors: the library, and our vectors' own code."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    Suite,
)

from nearfar.secure import kem
from tests.vectors import generate, independent, mlkem
from tests.vectors.seeded import key_from_seed

AEAD_OF = {1: AEAD.AES_128_GCM, 2: AEAD.AES_256_GCM, 3: AEAD.CHACHA20_POLY1305}
INFO = b"nearfar/1 client seed\x00" + bytes(32)


def published(name: str) -> list[dict[str, Any]]:
    """Texts that are hexadecimal become bytes."""
    text = (generate.DIRECTORY / "published" / name).read_text()

    def binary(vector: dict[str, Any]) -> dict[str, Any]:
        return {
            key: bytes.fromhex(value)
            if isinstance(value, str)
            else binary(value)
            if isinstance(value, dict)
            else value
            for key, value in vector.items()
        }

    return [binary(vector) for vector in json.loads(text)["vectors"]]


RFC_9180 = published("hpke_rfc9180.json")
XWING = published("hpke_xwing.json")
MLKEM = published("mlkem768.json")


def test_files_hold_what_they_should() -> None:
    assert sorted(vector["aead_id"] for vector in RFC_9180) == [1, 2, 3]
    assert XWING
    assert len(MLKEM) == 3


@pytest.mark.parametrize("vector", MLKEM)
def test_ml_kem_768(vector: dict[str, Any]) -> None:
    key = MLKEM768PrivateKey.from_seed_bytes(vector["d"] + vector["z"])
    assert key.public_key().public_bytes_raw() == vector["pk"]
    assert key.decapsulate(vector["ct"]) == vector["ss"]
    assert mlkem.encapsulate(vector["pk"], vector["msg"]) == (vector["ss"], vector["ct"])


@pytest.mark.parametrize("vector", RFC_9180, ids=lambda vector: f"aead {vector['aead_id']}")
def test_hpke_of_rfc_9180(vector: dict[str, Any]) -> None:
    shared_secret = independent.dhkem_x25519_decapsulate(vector["skRm"], vector["enc"])
    assert shared_secret == vector["shared_secret"]
    schedule = independent.hpke_key_schedule(
        shared_secret, vector["info"], kem_id=vector["kem_id"], aead_id=vector["aead_id"]
    )
    assert schedule == (vector["key"], vector["base_nonce"])
    encryption = vector["encryption"]
    opened = independent.hpke_open(
        vector["enc"] + encryption["ct"],
        shared_secret,
        vector["info"],
        aad=encryption["aad"],
        kem_id=vector["kem_id"],
        aead_id=vector["aead_id"],
    )
    assert opened == encryption["pt"]


@pytest.mark.parametrize("vector", RFC_9180, ids=lambda vector: f"aead {vector['aead_id']}")
def test_library_follows_rfc_9180(vector: dict[str, Any]) -> None:
    """The library takes no AAD, so the published key seals the published text once more."""
    aead = (ChaCha20Poly1305 if vector["aead_id"] == 3 else AESGCM)(vector["key"])
    text = vector["encryption"]["pt"]
    sealed = vector["enc"] + aead.encrypt(vector["base_nonce"], text, b"")
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD_OF[vector["aead_id"]])
    key = X25519PrivateKey.from_private_bytes(vector["skRm"])
    assert suite.decrypt(sealed, key, info=vector["info"]) == text
    with pytest.raises(InvalidTag):
        suite.decrypt(sealed, key, info=vector["info"] + b"\x00")


@pytest.mark.parametrize("vector", XWING, ids=lambda vector: f"aead {vector['aead_id']}")
def test_x_wing_in_hpke(vector: dict[str, Any]) -> None:
    assert independent.xwing_public_key(vector["skRm"]) == vector["pkRm"]
    secret = independent.xwing_decapsulate(vector["skRm"], vector["enc"])
    assert secret == vector["shared_secret"]
    encapsulated = independent.xwing_encapsulate(vector["pkRm"], vector["ikmE"])
    assert encapsulated == (vector["shared_secret"], vector["enc"])
    schedule = independent.hpke_key_schedule(secret, vector["info"], aead_id=vector["aead_id"])
    assert schedule == (vector["key"], vector["base_nonce"])
    encryption = vector["encryption"]
    sealed = vector["enc"] + encryption["ct"]
    opened = independent.hpke_open(
        sealed, secret, vector["info"], aad=encryption["aad"], aead_id=vector["aead_id"]
    )
    assert opened == encryption["pt"]


@pytest.mark.parametrize("vector", XWING, ids=lambda vector: f"aead {vector['aead_id']}")
def test_library_follows_x_wing_in_hpke(vector: dict[str, Any]) -> None:
    aead = (ChaCha20Poly1305 if vector["aead_id"] == 3 else AESGCM)(vector["key"])
    sealed = vector["enc"] + aead.encrypt(vector["base_nonce"], b"a seed", b"")
    suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD_OF[vector["aead_id"]])
    key = MLKEM768X25519PrivateKey(*independent.xwing_halves(vector["skRm"]))
    assert suite.decrypt(sealed, key, info=vector["info"]) == b"a seed"


def test_library_seals_what_an_independent_reader_opens() -> None:
    seed = bytes(range(32))
    sealed = kem.seal(b"thirty-two bytes of a fresh seed", key_from_seed(seed).public_bytes, INFO)
    assert sealed is not None
    shared_secret = independent.xwing_decapsulate(seed, sealed[:1120])
    opened = independent.hpke_open(sealed, shared_secret, INFO)
    assert opened == b"thirty-two bytes of a fresh seed"


def test_library_opens_what_an_independent_writer_seals() -> None:
    key = key_from_seed(bytes(32))
    sealed = independent.hpke_seal(b"seed", key.public_bytes, INFO, bytes(range(64)))
    assert key.open(sealed, INFO) == b"seed"
    assert key.open(sealed, INFO + b"\x00") is None
