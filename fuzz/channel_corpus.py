"""Where fuzzing of `fuzz.channel_targets` starts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from unittest import mock

from websockets.frames import Close, CloseCode, Frame, Opcode

_CLOSE = Close(CloseCode.NORMAL_CLOSURE, "").serialize()
#: Of one conversation each: whole, in fragments with a ping between, text, closing, all wrong.
_CONVERSATIONS = (
    (Frame(Opcode.BINARY, b"near"), Frame(Opcode.BINARY, bytes(126)), Frame(Opcode.BINARY, b"")),
    (
        Frame(Opcode.BINARY, b"ne", fin=False),
        Frame(Opcode.PING, b"!"),
        Frame(Opcode.CONT, b"a", fin=False),
        Frame(Opcode.CONT, b"r"),
        Frame(Opcode.BINARY, b"far"),
    ),
    (Frame(Opcode.TEXT, b"ne", fin=False), Frame(Opcode.CONT, b"ar"), Frame(Opcode.BINARY, b"x")),
    (Frame(Opcode.BINARY, bytes(4000)), Frame(Opcode.PONG, b""), Frame(Opcode.CLOSE, _CLOSE)),
    (Frame(Opcode.BINARY, bytes(4097)),),
    (Frame(Opcode.BINARY, bytes(4000), fin=False), Frame(Opcode.CONT, bytes(97))),
    (Frame(Opcode.BINARY, b"x", fin=False), Frame(Opcode.BINARY, b"y")),
    (Frame(Opcode.CONT, b"x"),),
    (Frame(Opcode.CLOSE, b"\x03"), Frame(Opcode.BINARY, b"late")),
)


def websockets() -> Iterator[bytes]:
    """Conversations for either end, cut in several ways; and heads that no library writes."""
    with mock.patch("websockets.frames.secrets.token_bytes", lambda count: bytes(range(count))):
        for is_client in (False, True):
            for frames in _CONVERSATIONS:
                stream = b"".join(
                    frame.serialize(mask=not is_client, extensions=()) for frame in frames
                )
                for early_bytes, cut_bytes in ((0, 0), (0, 1), (5, 7), (0, 50)):
                    yield bytes((is_client, early_bytes, cut_bytes)) + stream
    yield b"\x01\x00\x00" + b"\xc2\x01x"
    yield b"\x01\x00\x00" + b"\x82\x7e\x00\x01x"
    yield b"\x01\x00\x00" + b"\x82\x7f" + bytes(7) + b"\x01x"
    yield b"\x01\x00\x00" + b"\x82\x7f\x80" + bytes(7) + b"x"


def pieces() -> Iterator[bytes]:
    """Sizes around those of records, alone and in turns."""
    for record in (0, 12, 255):
        for padded in (0, 1):
            for sizes in ((1,), (24,), (17, 600), (2000, 300, 1, 64)):
                lengths = b"".join(size.to_bytes(2, "little") for size in sizes)
                yield bytes((record, padded)) + lengths + bytes(2) + bytes((0, 1, 2, 3, 0x81)) * 9


def queues() -> Iterator[bytes]:
    """An answer, long messages beside short ones, and steps by chance."""
    put_token, end, wait = 0b1011, 0b11011, 0b10000
    answer = bytes((put_token, 0)) + bytes((wait, 5, put_token, 0)) * 9 + bytes((end, 1, wait, 50))
    large = bytes((0b11, 9, 0b101, 8, 0b1, 0, wait, 1)) * 3
    generator = random.Random("queues")  # noqa: S311 (no secret)
    for shaping in range(3):
        yield bytes((shaping,)) + answer
        yield bytes((shaping,)) + large + answer
        for _ in range(4):
            yield bytes((shaping,)) + generator.randbytes(120)
