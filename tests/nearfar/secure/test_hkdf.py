"""HKDF-SHA256 against RFC 5869's own cases and against another implementation."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nearfar.secure import hkdf

#: RFC 5869, appendix A, cases 1 to 3: input key, salt, info, pseudo-random key, first block.
CASES = (
    (
        b"\x0b" * 22,
        bytes(range(13)),
        bytes(range(0xF0, 0xFA)),
        "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf",
    ),
    (
        bytes(range(0x50)),
        bytes(range(0x60, 0xB0)),
        bytes(range(0xB0, 0x100)),
        "06a6b88c5853361a06104c9ceb35b45cef760014904671014a193f40c15fc244",
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c",
    ),
    (
        b"\x0b" * 22,
        b"",
        b"",
        "19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d",
    ),
)


@pytest.mark.parametrize(("secret", "salt", "info", "key", "block"), CASES)
def test_the_cases_of_the_rfc(
    secret: bytes, salt: bytes, info: bytes, key: str, block: str
) -> None:
    assert hkdf.extract(salt, secret).hex() == key
    assert hkdf.expand(bytes.fromhex(key), info).hex() == block


@pytest.mark.parametrize("size_bytes", [1, 12, 31, 32])
def test_it_is_what_cryptography_derives(size_bytes: int) -> None:
    salt, secret, info = os.urandom(32), os.urandom(64), os.urandom(20)
    theirs = HKDF(hashes.SHA256(), size_bytes, salt, info).derive(secret)
    assert hkdf.expand(hkdf.extract(salt, secret), info, size_bytes) == theirs


@pytest.mark.parametrize("size_bytes", [-1, 0, 33])
def test_more_than_a_block_is_refused(size_bytes: int) -> None:
    with pytest.raises(ValueError, match="one block"):
        hkdf.expand(bytes(32), b"", size_bytes)
