"""X-Wing keys and sealing to them: the one seam to ``cryptography``'s HPKE.

X-Wing (draft-connolly-cfrg-xwing-kem) joins ML-KEM-768 and X25519, so a seed stays secret while
either of the two holds. HPKE (RFC 9180) base mode, HKDF-SHA256, AES-256-GCM.
"""

from __future__ import annotations

import functools

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from nearfar.errors import SecurityError

MLKEM_PUBLIC_KEY_BYTES = 1184
PUBLIC_KEY_BYTES = MLKEM_PUBLIC_KEY_BYTES + 32
#: What sealing adds: ML-KEM ciphertext, X25519 public key, GCM tag.
OVERHEAD_BYTES = 1088 + 32 + 16

_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class KemPrivateKey:
    """An X-Wing private key; lives in memory only.

    Attributes:
        public_bytes: ML-KEM-768 public key (1184 bytes), then X25519 public key (32).
    """

    __slots__ = ("_key", "public_bytes")

    public_bytes: bytes

    def __init__(self, mlkem_key: MLKEM768PrivateKey, x25519_key: X25519PrivateKey) -> None:
        self._key = MLKEM768X25519PrivateKey(mlkem_key, x25519_key)
        self.public_bytes = (
            mlkem_key.public_key().public_bytes_raw() + x25519_key.public_key().public_bytes_raw()
        )

    @classmethod
    def generate(cls) -> KemPrivateKey:
        """A fresh key.

        Raises:
            SecurityError: The installed ``cryptography`` has no ML-KEM.
        """
        try:
            return cls(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())
        except UnsupportedAlgorithm as exc:
            raise _no_mlkem() from exc

    def open(self, sealed: bytes, info: bytes) -> bytes | None:
        """What was sealed to this key under the same `info`; `None` when anything differs."""
        try:
            return _SUITE.decrypt(sealed, self._key, info=info)
        except (InvalidTag, ValueError):
            return None


def seal(
    plaintext: bytes, public_bytes: bytes, info: bytes, *, keep_key: bool = False
) -> bytes | None:
    """Seal to an X-Wing public key; `None` when it is not a usable key.

    Args:
        plaintext: A seed.
        public_bytes: As `KemPrivateKey.public_bytes`.
        info: Must be the same when it is opened.
        keep_key: The key is sealed to again and again: keep its parsed form.

    Raises:
        SecurityError: The installed ``cryptography`` has no ML-KEM.
    """
    try:
        key = (_kept_public_key if keep_key else _public_key)(public_bytes)
        return _SUITE.encrypt(plaintext, key, info=info)
    except UnsupportedAlgorithm as exc:
        raise _no_mlkem() from exc
    except ValueError:  # wrong length, coefficients out of range, or an X25519 point of low order
        return None


def _public_key(public_bytes: bytes) -> MLKEM768X25519PublicKey:
    return MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(public_bytes[:MLKEM_PUBLIC_KEY_BYTES]),
        X25519PublicKey.from_public_bytes(public_bytes[MLKEM_PUBLIC_KEY_BYTES:]),
    )


_kept_public_key = functools.lru_cache(maxsize=16)(_public_key)


def _no_mlkem() -> SecurityError:
    return SecurityError(
        "The installed cryptography package has no ML-KEM-768",
        fix="Install a wheel from PyPI: pip install 'cryptography>=48'",
    )
