"""HKDF-SHA256 (RFC 5869) for outputs of one block, on the standard library's HMAC.

A handshake derives eighteen secrets, none longer than a hash. Each is one HMAC then, and what
``cryptography`` builds around it costs more than that.
"""

from __future__ import annotations

import hmac

HASH_BYTES = 32


def extract(salt: bytes, secret: bytes) -> bytes:
    """HKDF-Extract (RFC 5869, section 2.2): a key of 32 bytes from a secret of any length."""
    return hmac.digest(salt, secret, "sha256")


def expand(key: bytes, info: bytes, size_bytes: int = HASH_BYTES) -> bytes:
    """HKDF-Expand (RFC 5869, section 2.3), its first block.

    Args:
        key: 32 bytes.
        info: The purpose; one output for each.
        size_bytes: Of the output.

    Raises:
        ValueError: More than one block is asked for.
    """
    if not 0 < size_bytes <= HASH_BYTES:
        raise ValueError(f"{size_bytes} bytes are not within one block of {HASH_BYTES}")
    return hmac.digest(key, info + b"\x01", "sha256")[:size_bytes]
