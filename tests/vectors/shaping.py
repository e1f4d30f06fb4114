"""Vectors of what lies in records and of when they leave: frames, pieces, padding, shaping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nearfar.errors import RemoteProtocolError
from nearfar.secure.frames import Assembler, Pieces, frame
from nearfar.secure.outbox import Outbox, Traits
from nearfar.secure.shaping import Shaping, padded_bytes

MAX_MESSAGE_BYTES = 256
MESSAGE = bytes(range(100))


# Frames


def _pieces(message: bytes, *, stream: int, number: int, record_bytes: int = 64) -> list[bytes]:
    pieces = Pieces(
        (message,), len(message), stream=stream, number=number, record_bytes=record_bytes
    )
    return [pieces.take() for _ in range(pieces.count)]


def _raw(kind: int, number: int, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return bytes([kind]) + number.to_bytes(3, "big") + size.to_bytes(4, "big") + body


def _announced(stream: int, size: int, data: bytes) -> bytes:
    return stream.to_bytes(4, "big") + size.to_bytes(4, "big") + data


def _accepted() -> Iterator[tuple[str, list[bytes]]]:
    whole = frame((b"nearfar",), 7)
    first = _pieces(MESSAGE, stream=7, number=5)
    second = _pieces(MESSAGE[::-1], stream=8, number=6)
    yield "one whole message", [whole]
    yield "one empty message", [frame((), 0)]
    yield "one whole message, padded", [frame((b"nearfar",), 7, 128)]
    yield "two whole messages in a record", [whole + frame((b"!",), 1)]
    yield "two whole messages in a record, padded", [whole + frame((b"!",), 1) + bytes(40)]
    yield "fewer than eight bytes left", [whole + bytes(7)]
    yield "a dummy", [bytes(128)]
    yield "an empty record", [b""]
    yield "the longest message", [frame((bytes(MAX_MESSAGE_BYTES),), MAX_MESSAGE_BYTES)]
    yield "a message in pieces", first
    yield "a message in pieces, each padded", [piece + bytes(16) for piece in first]
    yield "a whole message between pieces", [first[0], whole, *first[1:]]
    yield "a whole message and a piece in one record", [first[0], whole + first[1], *first[2:]]
    turns = [piece for pair in zip(first, second, strict=True) for piece in pair]
    yield "two messages in pieces, in turns", turns
    yield "a number that is used again", first + first
    one = _announced(3, 1, b"x")
    yield "a first piece that is the whole message", [_raw(2, 1, one)]
    four = [_raw(2, number, _announced(number, 2, b"x")) for number in range(4)]
    yield "four messages unfinished", [*four, *(_raw(3, number, b"y") for number in range(4))]
    half = MAX_MESSAGE_BYTES // 2
    begun = [_raw(2, number, _announced(1 + number, half, bytes(half - 1))) for number in (0, 1)]
    yield "unfinished messages as long as one may be", [*begun, _raw(3, 0, b"x"), _raw(3, 1, b"x")]


def _refused() -> Iterator[tuple[str, list[bytes]]]:
    whole = frame((b"nearfar",), 7)
    first = _pieces(MESSAGE, stream=7, number=5)
    yield "a frame longer than its record", [_raw(1, 0, b"near", 5)]
    yield "a second frame longer than its record", [whole + _raw(1, 0, b"near", 5)]
    yield "padding that is not zero", [whole + bytes(9) + b"\x01"]
    yield "fewer than eight bytes left that are not zero", [whole + b"\x01"]
    yield "a dummy that is not zero", [bytes(20) + b"\x01" + bytes(20)]
    for kind in (0, 4, 255):
        yield f"kind {kind}", [_raw(kind, 1, b"near")]
    yield "a whole message with a number", [_raw(1, 1, b"near")]
    too_long = MAX_MESSAGE_BYTES + 1
    yield "a whole message that is too long", [frame((bytes(too_long),), too_long)]
    yield "a message in pieces that is too long", [_raw(2, 1, _announced(1, too_long, b"x"))]
    yield "a first piece without its announcement", [_raw(2, 1, bytes(7))]
    yield "a first piece of nothing", [_raw(2, 1, _announced(1, 4, b""))]
    yield "a further piece of nothing", [first[0], _raw(3, 5, b"")]
    yield "a further piece without a first", [_raw(3, 5, b"near")]
    yield "a further piece of another number", [first[0], _raw(3, 6, b"near")]
    yield "a further piece after the last", [*first, _raw(3, 5, b"x")]
    yield "a message that begins twice", [first[0], first[0]]
    yield "more in pieces than announced", [_raw(2, 1, _announced(1, 4, b"nearf"))]
    yield "more in a further piece than announced", [first[0], _raw(3, 5, bytes(97))]
    five = [_raw(2, number, _announced(1 + number, 2, b"x")) for number in range(5)]
    yield "five messages unfinished", five
    half = MAX_MESSAGE_BYTES // 2
    begun = [_raw(2, n, _announced(1 + n, half + n, b"x")) for n in (0, 1)]
    yield "unfinished messages longer than one may be", begun


def frames() -> dict[str, Any]:
    """Plaintexts of records in order, and the messages that they hold."""
    vectors = []
    for name, plaintexts in _accepted():
        found: list[dict[str, Any]] = []
        assembler = Assembler()
        for plaintext in plaintexts:
            for arrived in assembler.feed(plaintext, max_message_bytes=MAX_MESSAGE_BYTES):
                if arrived.message is not None:
                    message = bytes(arrived.message).hex()
                    found.append({"stream": arrived.announced_stream, "message": message})
        assert assembler.unfinished == 0, name
        vectors.append(
            {"name": name, "plaintexts": [one.hex() for one in plaintexts], "messages": found}
        )
    return {"max_message_bytes": MAX_MESSAGE_BYTES, "vectors": vectors}


def refused_frames() -> dict[str, Any]:
    """Plaintexts of which the last must be refused."""
    vectors = []
    for name, plaintexts in _refused():
        assert taken(plaintexts) == len(plaintexts) - 1, name
        vectors.append({"name": name, "plaintexts": [one.hex() for one in plaintexts]})
    return {"error": "protocol", "max_message_bytes": MAX_MESSAGE_BYTES, "vectors": vectors}


def taken(plaintexts: list[bytes]) -> int:
    """How many nearfar takes before it refuses one."""
    assembler = Assembler()
    for count, plaintext in enumerate(plaintexts):
        try:
            assembler.feed(plaintext, max_message_bytes=MAX_MESSAGE_BYTES)
        except RemoteProtocolError:
            return count
    return len(plaintexts)


# Padding and shaping

#: (milliseconds, stream, kind, bytes): `message`, `token` and `end` are what they are in wire.md.
Put = tuple[int, int, str, int]

_SIZES = (
    1, 2, 3, 127, 128, 129, 255, 256, 257, 1000, 1023, 1024, 1025, 1500, 2047, 2048, 2049, 3000,
    4095, 4096, 4097, 5000, 8191, 8192, 8193, 9000, 10_000, 16_383, 16_384, 16_385, 20_000, 32_768,
    40_000, 65_535, 65_536, 65_537, 100_000, 150_000, 1 << 20, (1 << 20) + 1, 3_000_000, 16 << 20,
)  # fmt: skip

_TOKENS: tuple[Put, ...] = tuple((35 * number, 1, "token", 28) for number in range(12))
_TRAFFIC: dict[str, tuple[Shaping, tuple[Put, ...]]] = {
    "off: at once, as they are": ("off", ((0, 1, "message", 40), (30, 1, "token", 28))),
    "off: a long message and a short one": (
        "off", ((0, 1, "message", 400_000), (0, 2, "message", 40)),
    ),
    "balanced: messages": (
        "balanced", ((0, 1, "message", 1), (0, 0, "message", 120), (10, 2, "message", 121)),
    ),
    "balanced: a long message": ("balanced", ((0, 1, "message", 400_000),)),
    "balanced: a long message in one record": ("balanced", ((0, 1, "message", 150_000),)),
    "balanced: an answer": ("balanced", (*_TOKENS, (420, 1, "end", 80))),
    "balanced: an answer that pauses": (
        "balanced", (*_TOKENS[:3], (950, 1, "token", 28), (960, 1, "end", 80)),
    ),
    "balanced: two answers share records": (
        "balanced",
        (
            *((40 * number, 1 + number % 2, "token", 28) for number in range(14)),
            (560, 1, "end", 80), (560, 2, "end", 80),
        ),
    ),
    "balanced: a burst waits for its turn": (
        "balanced", (*((0, 1, "token", 28) for _ in range(16)), (10, 1, "end", 80)),
    ),
    "balanced: one token of many bytes": (
        "balanced", ((0, 1, "token", 28), (10, 1, "token", 300), (320, 1, "end", 80)),
    ),
    "strict: messages": ("strict", ((0, 1, "message", 40), (20, 1, "message", 4088))),
    "strict: a long message and short ones": (
        "strict", ((0, 1, "message", 20_000), (0, 2, "message", 40), (60, 2, "message", 40)),
    ),
    "strict: an answer": ("strict", (*_TOKENS, (420, 1, "end", 80))),
}  # fmt: skip
#: `strict`: how long the vectors' stream is open.
STRICT_OPEN_MS = 1000
_END_MS = 4000


def _records(level: Shaping, puts: tuple[Put, ...]) -> list[dict[str, Any]]:
    """What leaves when, from an `Outbox` that is asked whenever it wants to be."""
    box, assembler = Outbox(level), Assembler()
    box.max_unfinished_bytes = 1 << 20
    records: list[dict[str, Any]] = []
    waiting = list(enumerate(puts))
    now_ms = 0.0
    while True:
        while waiting and waiting[0][1][0] <= now_ms:
            index, (_, stream, kind, size) = waiting.pop(0)
            message = index.to_bytes(1, "big") * size
            traits = Traits(is_paced=kind == "token", ends=kind == "end")
            box.put((message,), size, stream, traits)
        is_busy = level == "strict" and now_ms < STRICT_OPEN_MS
        while (plaintext := box.next(now_ms / 1000.0, is_busy=is_busy)) is not None:
            arrived = assembler.feed(bytes(plaintext), max_message_bytes=1 << 20)
            complete = [one.message[0] for one in arrived if one.message is not None]
            records.append(
                {"ms": round(now_ms), "bytes": len(plaintext), "complete": complete}
            )  # fmt: skip
        due_s = box.next_flush_s()
        times = [put[0] for _, put in waiting[:1]] + ([] if due_s is None else [due_s * 1000.0])
        if not times or min(times) > _END_MS:
            return records
        now_ms = max(now_ms, min(times) + 1e-6)


def shaping() -> dict[str, Any]:
    """Sizes and their padded sizes; messages that are put in, and the records that leave."""
    return {
        "padding": [{"bytes": size, "padded": padded_bytes(size)} for size in _SIZES],
        "vectors": [
            {
                "name": name,
                "level": level,
                "put": [
                    {"ms": ms, "stream": stream, "kind": kind, "bytes": size}
                    for ms, stream, kind, size in puts
                ],
                "records": _records(level, puts),
            }
            for name, (level, puts) in _TRAFFIC.items()
        ],
    }
