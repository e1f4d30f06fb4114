from __future__ import annotations

import hmac

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.errors import SecurityError
from nearfar.secure.keys import SUITE_XWING_AES256GCM, SUITE_XWING_CHACHA20POLY1305
from nearfar.secure.records import (
    OVERHEAD_BYTES,
    TYPE_MESSAGE,
    RecordOpener,
    RecordSealer,
    RekeyLimits,
)

SECRET = b"\x05" * 32
GENERIC = "The secure channel failed and was closed"


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    return hmac.digest(secret, b"nearfar/1 " + label + b"\x01", "sha256")[:size]


def _record(
    secret: bytes,
    epoch: int,
    sequence: int,
    plaintext: bytes,
    cipher: type[AESGCM] | type[ChaCha20Poly1305] = AESGCM,
) -> bytes:
    """One record as the specification has it, written out."""
    header = b"\x10" + epoch.to_bytes(4, "big") + sequence.to_bytes(8, "big")
    iv = int.from_bytes(_expand(secret, b"iv", 12), "big")
    nonce = (iv ^ sequence).to_bytes(12, "big")
    return header + cipher(_expand(secret, b"key", 32)).encrypt(nonce, plaintext, header)


def test_record_vectors() -> None:
    """The vectors of docs/reference/secure-channel.md."""
    for suite, vector in ((SUITE_XWING_AES256GCM, VECTOR), (SUITE_XWING_CHACHA20POLY1305, CHACHA)):
        assert RecordSealer(SECRET, suite=suite).seal(TYPE_MESSAGE, b"near, far").hex() == vector


VECTOR = (
    "10000000000000000000000000"  # header
    "9dd15fcda5c2024a82de7a1f9c710f4b71a9d3fd78c8cfa623"
)


CHACHA = (
    "10000000000000000000000000"  # header
    "cd691937a48edc8c6d0069d3ddf9ec7aabe8e1c473ea4f088c"
)


def test_records_are_what_the_specification_says() -> None:
    sealer = RecordSealer(SECRET)
    assert sealer.seal(TYPE_MESSAGE, b"one") == _record(SECRET, 0, 0, b"one")
    assert sealer.seal(TYPE_MESSAGE, b"two") == _record(SECRET, 0, 1, b"two")


def test_records_of_the_other_suite_are_what_the_specification_says() -> None:
    suite = SUITE_XWING_CHACHA20POLY1305
    sealer, opener = RecordSealer(SECRET, suite=suite), RecordOpener(SECRET, suite=suite)
    sealer.seal(TYPE_MESSAGE, b"one")
    record = sealer.seal(TYPE_MESSAGE, b"two")
    assert record == _record(SECRET, 0, 1, b"two", ChaCha20Poly1305)
    opener.open(_record(SECRET, 0, 0, b"one", ChaCha20Poly1305))
    assert opener.open(record) == (TYPE_MESSAGE, b"two")
    with pytest.raises(SecurityError, match=GENERIC):
        RecordOpener(SECRET, suite=suite).open(RecordSealer(SECRET).seal(TYPE_MESSAGE, b"one"))


def test_rekeying_keeps_the_suite() -> None:
    limits = RekeyLimits(records=1)
    suite = SUITE_XWING_CHACHA20POLY1305
    sealer = RecordSealer(SECRET, suite=suite, limits=limits)
    opener = RecordOpener(SECRET, suite=suite, limits=limits)
    for text in (b"one", b"two", b"three"):
        assert opener.open(sealer.seal(TYPE_MESSAGE, text))[1] == text


def test_keys_change_after_ten_minutes_of_use() -> None:
    sealer, opener = RecordSealer(SECRET), RecordOpener(SECRET)
    epochs = []
    for now_s in (5.0, 300.0, 604.9, 605.0, 606.0, None, 1204.0, 1205.0, 9000.0):
        record = sealer.seal(TYPE_MESSAGE, b"x", now_s=now_s)
        assert opener.open(record)[1] == b"x"
        epochs.append(int.from_bytes(record[1:5], "big"))
    # However long the silence: one new epoch, which is all that the receiver accepts.
    assert epochs == [0, 0, 0, 1, 1, 1, 1, 2, 3]


def test_a_long_record_is_sealed_where_there_is_room() -> None:
    room = memoryview(bytearray(10_000))
    for size_bytes in (4096, 4097, 10_000 - OVERHEAD_BYTES, 10_001 - OVERHEAD_BYTES):
        plaintext = bytes(size_bytes)
        record = RecordSealer(SECRET).seal(16, plaintext, room=room)
        is_in_room = isinstance(record, memoryview) and record.obj is room.obj
        assert is_in_room is (4096 < size_bytes <= 10_000 - OVERHEAD_BYTES)
        assert record == RecordSealer(SECRET).seal(16, plaintext)


def test_any_buffer_can_be_sealed() -> None:
    for plaintext in (b"text", bytearray(b"text"), memoryview(b"..text")[2:]):
        assert RecordSealer(SECRET).seal(TYPE_MESSAGE, plaintext) == _record(SECRET, 0, 0, b"text")


def test_rekeyed_records_are_what_the_specification_says() -> None:
    sealer = RecordSealer(SECRET, limits=RekeyLimits(records=1))
    second = _expand(SECRET, b"rekey", 32)
    sealer.seal(TYPE_MESSAGE, b"one")
    assert sealer.seal(TYPE_MESSAGE, b"two") == _record(second, 1, 1, b"two")
    third = _expand(second, b"rekey", 32)
    assert sealer.seal(TYPE_MESSAGE, b"") == _record(third, 2, 2, b"")


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=30), st.integers(1, 5), st.integers(1, 60))
def test_records_open_in_order_across_every_rekey(
    plaintexts: list[bytes], max_records: int, max_bytes: int
) -> None:
    limits = RekeyLimits(records=max_records, size_bytes=max_bytes)
    sealer, opener = RecordSealer(SECRET, limits=limits), RecordOpener(SECRET, limits=limits)
    for plaintext in plaintexts:
        record = sealer.seal(TYPE_MESSAGE, plaintext)
        assert len(record) == len(plaintext) + OVERHEAD_BYTES
        assert opener.open(record) == (TYPE_MESSAGE, plaintext)


def test_keys_change_after_the_allowed_records_or_bytes() -> None:
    def epochs(limits: RekeyLimits, sizes: list[int]) -> list[int]:
        sealer = RecordSealer(SECRET, limits=limits)
        records = [sealer.seal(TYPE_MESSAGE, bytes(size)) for size in sizes]
        return [int.from_bytes(record[1:5], "big") for record in records]

    assert epochs(RekeyLimits(records=2), [1] * 5) == [0, 0, 1, 1, 2]
    assert epochs(RekeyLimits(size_bytes=10), [5, 5, 1, 20, 1]) == [0, 0, 1, 2, 3]


def test_a_key_protects_at_most_what_the_specification_says() -> None:
    assert RekeyLimits() == RekeyLimits(records=1 << 20, size_bytes=1 << 30, age_s=600.0)


def test_sender_that_rekeys_early_is_followed() -> None:
    opener = RecordOpener(SECRET)
    second = _expand(SECRET, b"rekey", 32)
    opener.open(_record(SECRET, 0, 0, b"a"))
    opener.open(_record(second, 1, 1, b"b"))


def test_sender_that_rekeys_late_is_refused() -> None:
    opener = RecordOpener(SECRET, limits=RekeyLimits(records=1))
    opener.open(_record(SECRET, 0, 0, b"a"))
    with pytest.raises(SecurityError, match=GENERIC):
        opener.open(_record(SECRET, 0, 1, b"b"))


def test_old_epoch_cannot_return_and_none_can_be_skipped() -> None:
    second = _expand(SECRET, b"rekey", 32)
    third = _expand(second, b"rekey", 32)
    opener = RecordOpener(SECRET)
    opener.open(_record(second, 1, 0, b"a"))
    with pytest.raises(SecurityError, match=GENERIC):
        opener.open(_record(SECRET, 0, 1, b"b"))
    with pytest.raises(SecurityError, match=GENERIC):
        RecordOpener(SECRET).open(_record(third, 2, 0, b"a"))


RECORDS = [_record(SECRET, 0, sequence, b"text %d" % sequence) for sequence in range(4)]


def _flipped(position: int) -> bytes:
    record = bytearray(RECORDS[1])
    record[position] ^= 1
    return bytes(record)


ATTACKS = {
    "replay": [RECORDS[0], RECORDS[0]],
    "reorder": [RECORDS[0], RECORDS[2], RECORDS[1]],
    "drop": [RECORDS[0], RECORDS[2]],
    "first dropped": [RECORDS[1]],
    "type changed": [RECORDS[0], _flipped(0)],
    "epoch changed": [RECORDS[0], _flipped(4)],
    "sequence changed": [RECORDS[0], _flipped(12)],
    "sequence of another record": [RECORDS[0], RECORDS[2][:5] + RECORDS[1][5:13] + RECORDS[2][13:]],
    "ciphertext changed": [RECORDS[0], _flipped(13)],
    "tag changed": [RECORDS[0], _flipped(-1)],
    "cut by one": [RECORDS[0], RECORDS[1][:-1]],
    "header only": [RECORDS[0], RECORDS[1][:13]],
    "empty": [RECORDS[0], b""],
    "longer by one": [RECORDS[0], RECORDS[1] + b"\x00"],
    "two in one": [RECORDS[0] + RECORDS[1]],
    "another key": [_record(b"\x06" * 32, 0, 0, b"x")],
    "another epoch's key": [_record(SECRET, 1, 0, b"x")],
}


def _open_all(opener: RecordOpener, records: list[bytes]) -> None:
    for record in records:
        opener.open(record)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_closes_the_channel_with_the_generic_error(name: str) -> None:
    opener = RecordOpener(SECRET)
    with pytest.raises(SecurityError, match=GENERIC) as caught:
        _open_all(opener, ATTACKS[name])
    assert caught.value.__cause__ is None  # nothing more is told
    for record in RECORDS:
        with pytest.raises(SecurityError, match=GENERIC):
            opener.open(record)


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_no_made_up_record_opens(data: bytes) -> None:
    with pytest.raises(SecurityError, match=GENERIC):
        RecordOpener(SECRET).open(data)
