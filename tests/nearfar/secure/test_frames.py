from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.errors import RemoteProtocolError
from nearfar.secure.frames import (
    HEADER_BYTES,
    MAX_UNFINISHED,
    MAX_WHOLE_BYTES,
    Arrived,
    Assembler,
    Pieces,
    frame,
    only_piece,
)
from nearfar.secure.records import OVERHEAD_BYTES, TYPE_MESSAGE, RecordOpener, RecordSealer
from nearfar.secure.shaping import padded_bytes

LIMIT = 1 << 20


def feed(assembler: Assembler, plaintext: bytes | memoryview, limit: int = LIMIT) -> list[Arrived]:
    return assembler.feed(bytes(plaintext), max_message_bytes=limit)


def whole(arrived: list[Arrived]) -> list[bytes]:
    return [bytes(one.message) for one in arrived if one.message is not None]


def pieces(
    message: bytes, number: int = 1, record_bytes: int = 256, stream: int = 7
) -> list[bytes]:
    return taken(
        Pieces([message], len(message), stream=stream, number=number, record_bytes=record_bytes)
    )


def taken(laid_out: Pieces) -> list[bytes]:
    left_bytes = laid_out.left_bytes
    plaintexts = [laid_out.take() for _ in range(laid_out.count)]
    assert laid_out.count == laid_out.left_bytes == 0
    assert sum(map(len, plaintexts)) == left_bytes
    return plaintexts


# Layout


def test_whole_message_has_these_very_bytes() -> None:
    assert frame([b"near", b"far"], 7).hex() == "0100000000000007" + b"nearfar".hex()
    assert frame([b"x"], 1, 16) == bytes.fromhex("0100000000000001") + b"x" + bytes(7)


def test_pieces_have_these_very_bytes() -> None:
    first, second = pieces(b"abcdefghij", number=5, record_bytes=24)
    assert first.hex() == "0200000500000010000000070000000a" + b"abcdefgh".hex()
    assert second.hex() == "0300000500000002" + b"ij".hex()


def test_tensors_stay_aligned_behind_the_frame_header() -> None:
    assert HEADER_BYTES % 8 == 0


# Identity


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(0, 500))
def test_padded_messages_come_back(messages: list[bytes], zeros: int) -> None:
    plaintext = b"".join(frame([message], len(message)) for message in messages) + bytes(zeros)
    assert whole(feed(Assembler(), plaintext)) == messages


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=3000), st.integers(17, 400), st.integers(1, 10))
def test_cut_messages_come_back(message: bytes, record_bytes: int, parts: int) -> None:
    step = max(1, len(message) // parts)
    split = [message[start : start + step] for start in range(0, len(message), step)]
    laid_out = taken(
        Pieces(split, len(message), stream=3, number=1, record_bytes=record_bytes, pad=padded_bytes)
    )
    assert all(len(plaintext) == record_bytes for plaintext in laid_out[:-1])
    assert sum(map(len, laid_out)) == padded_bytes(sum(map(len, laid_out)))
    assembler = Assembler()
    arrived = [one for plaintext in laid_out for one in feed(assembler, plaintext)]
    assert whole(arrived) == [message]
    assert {one.announced_stream for one in arrived} == {3}
    assert assembler.unfinished == 0


@settings(deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=900), min_size=1, max_size=MAX_UNFINISHED),
    st.randoms(use_true_random=False),
)
def test_pieces_of_several_messages_interleave(
    messages: list[bytes], chance: random.Random
) -> None:
    queues = [pieces(message, number) for number, message in enumerate(messages)]
    assembler, arrived = Assembler(), []
    while queues:
        queue = chance.choice(queues)
        arrived += whole(feed(assembler, queue.pop(0)))
        queues = [queue for queue in queues if queue]
    assert sorted(arrived) == sorted(messages)


class Placing:
    """An assembler that is fed as a session does: plaintexts lie where they seem to belong."""

    def __init__(self) -> None:
        self.assembler = Assembler()
        self._sealer, self._opener = RecordSealer(bytes(32)), RecordOpener(bytes(32))

    def feed(self, plaintext: bytes) -> list[Arrived]:
        record = self._sealer.seal(TYPE_MESSAGE, plaintext)
        opened = self.assembler.open_piece(self._opener, record)
        if opened is None:
            _, plaintext = self._opener.open(record)
        elif opened[2] is not None:
            return list(opened[2])
        else:
            assert opened[1] == plaintext
        return self.assembler.feed(plaintext, max_message_bytes=LIMIT)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=MAX_UNFINISHED),
    st.integers(17, 200),
    st.integers(0, 1 << 32),
)
def test_it_does_not_matter_where_a_plaintext_lay(
    sizes: list[int], record_bytes: int, seed: int
) -> None:
    chance = random.Random(seed)
    streams = [
        pieces(chance.randbytes(size), number, record_bytes, stream=number)
        for number, size in enumerate(sizes, 1)
    ]
    copying, placing = Assembler(), Placing()
    while streams:
        kind = chance.randrange(20)
        if kind == 0:
            plaintext = chance.randbytes(chance.randrange(40))  # means nothing
        elif kind < 5:
            plaintext = frame([b"hi"], 2)
        else:
            chosen = chance.choice(streams)
            plaintext = chosen.pop(0)
            streams = [left for left in streams if left]
        try:
            expected = feed(copying, plaintext)
        except RemoteProtocolError as error:
            with pytest.raises(RemoteProtocolError, match=re.escape(str(error))):
                placing.feed(plaintext)
            return
        found = placing.feed(plaintext)
        assert whole(found) == whole(expected)
        assert [one[1:] for one in found] == [one[1:] for one in expected]
        assert placing.assembler.oldest == copying.oldest


def test_a_first_piece_may_be_all_and_is_not_copied() -> None:
    plaintext = only_piece([b"near", b"far!"], 8, 7, 5 + (1 << 24), 64)
    assert plaintext.hex() == "02000005000000100000000700000008" + b"nearfar!".hex() + ("00" * 40)
    assembler = Assembler()
    (one,) = feed(assembler, plaintext)
    assert one == (b"nearfar!", 64 + OVERHEAD_BYTES, 7)
    assert one.message is not None
    assert one.message.obj is plaintext
    assert assembler.unfinished == 0
    assert whole(feed(assembler, plaintext)) == [b"nearfar!"]  # its number is free again


def test_a_first_piece_that_is_all_counts_against_what_is_unfinished() -> None:
    assembler = Assembler()
    feed(assembler, first_piece(1, LIMIT - 7))
    with pytest.raises(RemoteProtocolError):
        feed(assembler, only_piece([bytes(8)], 8, 1, 2, 0))


def test_sizes_on_the_wire_are_counted() -> None:
    assembler = Assembler()
    (one,) = feed(assembler, frame([b"abc"], 3, 128))
    assert one.size_bytes == 128 + OVERHEAD_BYTES
    both = feed(assembler, frame([b"abc"], 3) + frame([b"de"], 2) + bytes(50))
    assert [one.size_bytes for one in both] == [11, 10]
    laid_out = pieces(bytes(1000))
    arrived = [one for plaintext in laid_out for one in feed(assembler, plaintext)]
    assert arrived[-1].size_bytes == sum(map(len, laid_out)) + len(laid_out) * OVERHEAD_BYTES


def test_messages_are_read_only_and_whole_ones_are_not_copied() -> None:
    plaintext = frame([b"abc"], 3)
    (one,) = Assembler().feed(plaintext, max_message_bytes=LIMIT)
    assert one.message is not None
    assert one.message.obj is plaintext
    assembler = Assembler()
    (last,) = [a for p in pieces(bytes(500)) for a in feed(assembler, p) if a.message is not None]
    assert last.message is not None
    assert last.message.readonly


# Refusals


def header(kind: int, length: int, number: int = 0) -> bytes:
    return (kind << 24 | number).to_bytes(4, "big") + length.to_bytes(4, "big")


def first_piece(number: int, total_bytes: int, data: bytes = b"x") -> bytes:
    announcement = (7).to_bytes(4, "big") + total_bytes.to_bytes(4, "big")
    return header(2, 8 + len(data), number) + announcement + data


BAD = {
    "length beyond the record": header(1, 4) + b"abc",
    "unknown kind": header(4, 1) + b"x",
    "numbered whole message": header(1, 1, number=1) + b"x",
    "padding not zero": frame([b"abc"], 3) + b"\0\0\0\0\0\0\0\0\x01",
    "short padding not zero": frame([b"abc"], 3) + b"\0\1",
    "padding header with a length": bytes(4) + (1).to_bytes(4, "big") + b"\0",
    "padding header with a number": bytes(3) + b"\x01" + bytes(4),
    "piece without a beginning": header(3, 1) + b"x",
    "first piece cut": header(2, 7) + bytes(7),
    "first piece without data": first_piece(1, 10, b""),
    "begun twice": first_piece(1, 10) + first_piece(1, 10),
    "longer than announced": first_piece(1, 3, b"abcd"),
    "announced as empty": first_piece(1, 0, b"a"),
    "empty piece": first_piece(1, 3) + header(3, 0, 1),
    "piece after the last": first_piece(1, 1) + header(3, 1, 1) + b"x",
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_plaintext_is_refused(name: str) -> None:
    with pytest.raises(RemoteProtocolError, match="A record cannot be read"):
        feed(Assembler(), BAD[name])


def test_announcement_above_the_limit_is_refused_before_memory_is_spent() -> None:
    assembler = Assembler()
    with pytest.raises(RemoteProtocolError, match="1001 bytes where 1000 are allowed"):
        feed(assembler, first_piece(1, 1001), limit=1000)
    assert assembler.held_bytes == 0
    with pytest.raises(RemoteProtocolError, match="are allowed"):
        feed(Assembler(), frame([bytes(1001)], 1001), limit=1000)


@pytest.mark.parametrize("total_bytes", [2, LIMIT // MAX_UNFINISHED, LIMIT])
def test_endless_first_pieces_stay_bounded(total_bytes: int) -> None:
    assembler = Assembler()

    def flood() -> None:
        for number in range(1000):
            feed(assembler, first_piece(number, total_bytes))

    with pytest.raises(RemoteProtocolError, match="too many messages are unfinished"):
        flood()
    assert assembler.unfinished <= MAX_UNFINISHED
    assert assembler.held_bytes <= LIMIT


def test_place_is_free_again_when_a_message_is_complete() -> None:
    assembler = Assembler()
    for number in range(20):
        feed(assembler, first_piece(number, LIMIT))
        for start in range(1, LIMIT, MAX_WHOLE_BYTES):
            size_bytes = min(MAX_WHOLE_BYTES, LIMIT - start)
            arrived = feed(assembler, header(3, size_bytes, number) + bytes(size_bytes))
        assert [len(message) for message in whole(arrived)] == [LIMIT]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=20))
def test_any_bytes_give_messages_or_a_typed_error(plaintexts: list[bytes]) -> None:
    assembler = Assembler()
    for plaintext in plaintexts:
        try:
            assembler.feed(plaintext, max_message_bytes=1000)
        except RemoteProtocolError:
            break
    assert assembler.held_bytes <= 1000
