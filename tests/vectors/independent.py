"""What another implementation would write: HKDF, HPKE and X-Wing from their specifications.

Imports nothing of nearfar, so that a vector checked with it says more than that the code agrees
with itself. RFC 5869, RFC 9180 (base mode), draft-connolly-cfrg-xwing-kem.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from tests.vectors import mlkem

XWING = 0x647A
X25519 = 0x0020
HKDF_SHA256 = 0x0001
AEAD_KEY_BYTES = {1: 16, 2: 32, 3: 32}
AEADS: dict[str, Any] = {"AES-256-GCM": AESGCM, "ChaCha20-Poly1305": ChaCha20Poly1305}

_XWING_LABEL = b"\\.//^\\"
_ENCAPSULATION_BYTES = {XWING: 1120, X25519: 32}


def extract(salt: bytes, material: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), material, "sha256")


def expand(secret: bytes, info: bytes, size: int) -> bytes:
    output, block = b"", b""
    for number in range(1, -(-size // 32) + 1):
        block = hmac.digest(secret, block + info + bytes([number]), "sha256")
        output += block
    return output[:size]


# X-Wing


def xwing_halves(seed: bytes) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    """The two private keys behind a 32-byte X-Wing private key."""
    expanded = hashlib.shake_256(seed).digest(96)
    return (
        MLKEM768PrivateKey.from_seed_bytes(expanded[:64]),
        X25519PrivateKey.from_private_bytes(expanded[64:]),
    )


def xwing_public_key(seed: bytes) -> bytes:
    lattice, curve = xwing_halves(seed)
    return lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()


def _combine(lattice: bytes, curve: bytes, curve_share: bytes, curve_public: bytes) -> bytes:
    material = lattice + curve + curve_share + curve_public + _XWING_LABEL
    return hashlib.sha3_256(material).digest()


def xwing_decapsulate(seed: bytes, encapsulation: bytes) -> bytes:
    lattice, curve = xwing_halves(seed)
    share = encapsulation[1088:]
    return _combine(
        lattice.decapsulate(encapsulation[:1088]),
        curve.exchange(X25519PublicKey.from_public_bytes(share)),
        share,
        curve.public_key().public_bytes_raw(),
    )


def xwing_encapsulate(public_key: bytes, randomness: bytes) -> tuple[bytes, bytes]:
    """Shared secret and encapsulation for 64 bytes of chosen randomness (the draft's `eseed`)."""
    lattice_public, curve_public = public_key[:1184], public_key[1184:]
    lattice_secret, ciphertext = mlkem.encapsulate(lattice_public, randomness[:32])
    ephemeral = X25519PrivateKey.from_private_bytes(randomness[32:])
    share = ephemeral.public_key().public_bytes_raw()
    curve_secret = ephemeral.exchange(X25519PublicKey.from_public_bytes(curve_public))
    return _combine(lattice_secret, curve_secret, share, curve_public), ciphertext + share


# HPKE


def hpke_key_schedule(
    shared_secret: bytes, info: bytes, *, kem_id: int = XWING, aead_id: int = 2
) -> tuple[bytes, bytes]:
    """Key and base nonce: RFC 9180, section 5.1, mode_base, HKDF-SHA256."""
    ids = (kem_id, HKDF_SHA256, aead_id)
    suite = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in ids)

    def labeled_extract(salt: bytes, label: bytes, material: bytes) -> bytes:
        return extract(salt, b"HPKE-v1" + suite + label + material)

    def labeled_expand(secret: bytes, label: bytes, context: bytes, size: int) -> bytes:
        return expand(secret, size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + context, size)

    context = b"\x00" + labeled_extract(b"", b"psk_id_hash", b"")
    context += labeled_extract(b"", b"info_hash", info)
    secret = labeled_extract(shared_secret, b"secret", b"")
    return (
        labeled_expand(secret, b"key", context, AEAD_KEY_BYTES[aead_id]),
        labeled_expand(secret, b"base_nonce", context, 12),
    )


def dhkem_x25519_decapsulate(private_key: bytes, encapsulation: bytes) -> bytes:
    """Shared secret: RFC 9180, section 4.1, DHKEM(X25519, HKDF-SHA256)."""
    key = X25519PrivateKey.from_private_bytes(private_key)
    dh = key.exchange(X25519PublicKey.from_public_bytes(encapsulation))
    suite = b"KEM" + X25519.to_bytes(2, "big")
    context = encapsulation + key.public_key().public_bytes_raw()
    prk = extract(b"", b"HPKE-v1" + suite + b"eae_prk" + dh)
    return expand(prk, b"\x00\x20HPKE-v1" + suite + b"shared_secret" + context, 32)


def _hpke_aead(aead_id: int, key: bytes) -> Any:
    return (ChaCha20Poly1305 if aead_id == 3 else AESGCM)(key)


def hpke_seal(plaintext: bytes, public_key: bytes, info: bytes, randomness: bytes) -> bytes:
    """Single-shot sealing to an X-Wing key: encapsulation, then ciphertext."""
    shared_secret, encapsulation = xwing_encapsulate(public_key, randomness)
    key, nonce = hpke_key_schedule(shared_secret, info)
    return encapsulation + AESGCM(key).encrypt(nonce, plaintext, b"")


def hpke_open(
    sealed: bytes,
    shared_secret: bytes,
    info: bytes,
    *,
    aad: bytes = b"",
    kem_id: int = XWING,
    aead_id: int = 2,
) -> bytes:
    """Opens what follows the encapsulation. Raises `InvalidTag`."""
    key, nonce = hpke_key_schedule(shared_secret, info, kem_id=kem_id, aead_id=aead_id)
    ciphertext = sealed[_ENCAPSULATION_BYTES[kem_id] :]
    return bytes(_hpke_aead(aead_id, key).decrypt(nonce, ciphertext, aad))


# Records


def epoch_secret(secret: bytes, epoch: int) -> bytes:
    for _ in range(epoch):
        secret = expand(secret, b"nearfar/1 rekey", 32)
    return secret


def record_keys(secret: bytes, epoch: int, sequence: int) -> tuple[bytes, bytes]:
    """Key and nonce of one record."""
    secret = epoch_secret(secret, epoch)
    iv = int.from_bytes(expand(secret, b"nearfar/1 iv", 12), "big")
    return expand(secret, b"nearfar/1 key", 32), (iv ^ sequence).to_bytes(12, "big")


def open_record(
    record: bytes, header_bytes: int, secret: bytes, epoch: int, sequence: int
) -> tuple[str, bytes]:
    """Name of the AEAD that opens a record, and what it protects. Raises `InvalidTag`."""
    key, nonce = record_keys(secret, epoch, sequence)
    header, sealed = record[:header_bytes], record[header_bytes:]
    for name, aead in AEADS.items():
        try:
            return name, aead(key).decrypt(nonce, sealed, header)
        except InvalidTag:
            continue
    raise InvalidTag


def transcript(*messages: bytes) -> bytes:
    digest = hashlib.sha256(b"nearfar/1 transcript\x00")
    for message in messages:
        digest.update(len(message).to_bytes(4, "big") + message)
    return digest.digest()


# Frames and padding


def messages_in(plaintexts: list[bytes], limit: int) -> list[tuple[int | None, bytes]]:
    """The messages of records' plaintexts: the stream that a first piece named, and the bytes.

    Raises:
        ValueError: The last plaintext breaks a rule; all others were well.
        AssertionError: Another one does.
    """
    found: list[tuple[int | None, bytes]] = []
    open_ones: dict[int, tuple[int, int, bytes]] = {}  # number: stream, length, what came
    for index, plaintext in enumerate(plaintexts):
        try:
            _read_frames(plaintext, limit, found, open_ones)
        except ValueError:
            assert index == len(plaintexts) - 1
            raise
    return found


def _read_frames(
    rest: bytes,
    limit: int,
    found: list[tuple[int | None, bytes]],
    open_ones: dict[int, tuple[int, int, bytes]],
) -> None:
    while len(rest) >= 8 and rest[0]:
        kind, number, length = rest[0], int.from_bytes(rest[1:4], "big"), rest[4:8]
        body, rest = rest[8:], rest[8 + int.from_bytes(length, "big") :]
        if len(body) < int.from_bytes(length, "big"):
            raise ValueError("a frame is longer than its record")
        body = body[: int.from_bytes(length, "big")]
        if kind == 1:
            if number or len(body) > limit:
                raise ValueError("a whole message has a number, or is too long")
            found.append((None, body))
            continue
        if kind == 2:
            if number in open_ones or len(open_ones) == 4 or len(body) < 9:
                raise ValueError("it cannot begin")
            stream, size = (int.from_bytes(body[at : at + 4], "big") for at in (0, 4))
            if sum(one[1] for one in open_ones.values()) + size > limit:
                raise ValueError("too much is announced")
            open_ones[number], body = (stream, size, b""), body[8:]
        elif kind != 3 or number not in open_ones or not body:
            raise ValueError("no such kind, or a piece of nothing")
        stream, size, begun = open_ones[number]
        open_ones[number] = (stream, size, begun + body)
        if len(begun + body) > size:
            raise ValueError("more than announced")
        if len(begun + body) == size:
            found.append((stream, begun + body))
            del open_ones[number]
    if any(rest):
        raise ValueError("padding is not zero")


def padded(size: int) -> int:
    """Padmé (Nikitin et al., 2019, algorithm 1), in multiples of at least 128 bytes."""
    exponent = math.floor(math.log2(size))
    last_bits = exponent - (math.floor(math.log2(exponent)) + 1 if exponent else 0)
    grain = max(128, 2**last_bits)
    return math.ceil(size / grain) * grain
