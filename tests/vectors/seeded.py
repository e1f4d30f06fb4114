"""Makes nearfar's own code reproducible: every random choice of a block comes from a name."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

from nearfar.secure import kem
from tests.vectors import independent


@dataclass
class Seal:
    """One HPKE sealing that was done."""

    plaintext: bytes
    public_key: bytes
    info: bytes
    randomness: bytes
    sealed: bytes


@dataclass
class Randomness:
    """What was drawn, in order.

    Attributes:
        draws: Results of `os.urandom`.
        key_seeds: X-Wing private keys that were generated, as 32-byte seeds.
        seals: HPKE sealings.
    """

    name: str
    draws: list[bytes] = field(default_factory=list)
    key_seeds: list[bytes] = field(default_factory=list)
    seals: list[Seal] = field(default_factory=list)
    _count: int = 0

    def bytes(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(f"nearfar vectors/{self.name}/{self._count}".encode()).digest(size)

    def urandom(self, size: int) -> bytes:
        self.draws.append(self.bytes(size))
        return self.draws[-1]

    def generate(self) -> kem.KemPrivateKey:
        self.key_seeds.append(self.bytes(32))
        return key_from_seed(self.key_seeds[-1])

    def seal(
        self, plaintext: bytes, public_key: bytes, info: bytes, *, keep_key: bool = False
    ) -> bytes:
        randomness = self.bytes(64)
        sealed = independent.hpke_seal(plaintext, public_key, info, randomness)
        self.seals.append(Seal(plaintext, public_key, info, randomness, sealed))
        return sealed


def key_from_seed(seed: bytes) -> kem.KemPrivateKey:
    """The X-Wing private key of 32 bytes."""
    return kem.KemPrivateKey(*independent.xwing_halves(seed))


@contextlib.contextmanager
def seeded(name: str) -> Iterator[Randomness]:
    """Within the block the same name gives the same keys, seeds, nonces and sealings."""
    randomness = Randomness(name)
    with (
        mock.patch.object(os, "urandom", randomness.urandom),
        mock.patch.object(kem.KemPrivateKey, "generate", randomness.generate),
        mock.patch.object(kem, "seal", randomness.seal),
    ):
        yield randomness
