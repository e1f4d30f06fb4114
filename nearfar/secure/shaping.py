"""What an observer of record sizes and times still sees: padding sizes and shaping levels.

Pure arithmetic; the queue that follows it is `nearfar.secure.outbox`. Specification and limits:
docs/reference/secure-channel.md, "Shaping".
"""

from __future__ import annotations

from typing import Literal

from nearfar.errors import ConfigError

Shaping = Literal["off", "balanced", "strict"]
#: Weakest first.
LEVELS: tuple[Shaping, ...] = ("off", "balanced", "strict")

#: No padded plaintext is shorter, and all are multiples of it.
BUCKET_BYTES = 128


def check_shaping(text: str) -> Shaping:
    """The level of that name.

    Raises:
        ConfigError: There is none.
    """
    for level in LEVELS:
        if text == level:
            return level
    raise ConfigError(
        f"'shaping' is {str(text)[:40]!r}",
        field="shaping",
        fix="Choose 'off', 'balanced' or 'strict'",
    )


def strongest(*levels: Shaping) -> Shaping:
    """The one that hides most."""
    return max(levels, key=LEVELS.index)


def padme_bytes(size_bytes: int) -> int:
    """Padmé: the next size whose binary form ends in enough zeros.

    Leaks O(log log size) bits instead of O(log size), for at most 12 % more bytes (Nikitin et al.,
    "Reducing Metadata Leakage from Encrypted Files and Communication with PURBs", 2019, section 4).
    """
    return _round_up(size_bytes, _padme_grain(size_bytes))


def padded_bytes(size_bytes: int) -> int:
    """Size of the padded plaintext in `balanced`: Padmé, in buckets of at least 128 bytes.

    Padmé alone hardly changes small sizes, and nearly all messages of a chat are small.
    """
    return _round_up(max(size_bytes, 1), max(_padme_grain(size_bytes), BUCKET_BYTES))


def _padme_grain(size_bytes: int) -> int:
    if size_bytes < 2:
        return 1
    exponent = size_bytes.bit_length() - 1
    return 1 << (exponent - exponent.bit_length())


def _round_up(size_bytes: int, grain: int) -> int:
    return size_bytes + -size_bytes % grain
