"""A websocket without tasks between it and its session: messages go straight through, both ways.

`websockets` hands messages over through a queue and a task: two turns of the event loop, and some
sixty Python calls, for each message. A session answers at once and never waits, so both asyncio
shells take the frames where asyncio reads them, and write records where they are sealed.

Of the websocket protocol only its simplest case is handled here, and nearly all messages are it: a
whole binary message in one frame (RFC 6455, section 5.2), which the library builds and reads with
another fifty calls. Everything else stays the library's: handshake, fragments, very long frames,
masks and opcodes that are wrong, keepalive, closing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import Generator
from typing import Any, Protocol, Union

import numpy as np
from websockets.asyncio.connection import Connection
from websockets.exceptions import ConnectionClosed
from websockets.frames import DATA_OPCODES, Frame, Opcode
from websockets.protocol import Side, State
from websockets.streams import StreamReader

from nearfar.tls import DirectTls, take_over

try:
    from websockets.speedups import apply_mask
except ImportError:  # the library was built without its C module
    from websockets.utils import apply_mask

Buffer = Union[bytes, bytearray, memoryview]

#: First byte of the frame that is a whole binary message.
_WHOLE_BINARY = 0x82
#: In the second byte: whether a client masked it, and its length; two lengths say that the real one
#: follows in 16 or in 64 bits.
_MASKED, _LENGTH = 0x80, 0x7F
_LENGTH_16, _LENGTH_64 = 126, 127
_MASK_BYTES = 4
_HEAD_16, _HEAD_64 = struct.Struct("!BBH"), struct.Struct("!BBQ")
#: Longer frames are the library's to refuse or to collect; no sealed record is longer.
_MAX_LENGTH = 192 * 1024
_OPEN = State.OPEN  # as in `nearfar.wire.connection`
#: The longest head of a frame.
_HEAD_BYTES = _HEAD_64.size + _MASK_BYTES


class Listener(Protocol):
    """Whoever takes what comes on a websocket. None of its methods may raise."""

    def message_received(self, data: Buffer) -> None:
        """A binary message came, whole; a view is valid until this returns."""
        ...

    def text_received(self) -> None:
        """A text message began: the other end does not speak our protocol."""
        ...

    def message_began(self) -> None:
        """The first fragment of a message came, and not the last."""
        ...

    def message_ended(self) -> None:
        """The last fragment of that message came; `message_received` follows."""
        ...

    def batch_ended(self) -> None:
        """All messages that the system had for us were handed over: answer them now."""
        ...

    def writing_paused(self) -> None:
        """The other end reads more slowly than we write: write no more for now."""
        ...

    def writing_resumed(self) -> None:
        """It has read most of it."""
        ...

    def connection_ended(self, problem: ConnectionClosed) -> None:
        """The connection has ended; nothing more comes."""
        ...


class DirectConnection(Connection):
    """Mixed in before `ClientConnection` or `ServerConnection` of `websockets`.

    Messages wait until `listen` is called.
    """

    #: Where a record may be sealed that is `put` next; `None` if it must have its own memory.
    room: memoryview | None = None
    _listener: Listener | None = None
    _direct: DirectTls | None = None
    _is_writable = True
    _fragments: bytearray | None = None
    _is_amid_text = False

    def listen(self, listener: Listener) -> None:
        """Hand all messages to a listener from now on, first those that wait.

        Args:
            listener: Called on the event loop.
        """
        self._listener = listener
        self._direct = take_over(self)
        if self._direct is not None:
            self.room = self._direct.room
        while self._early:
            self._take(listener, self._early.pop(0))
        listener.batch_ended()
        if self.protocol.state is State.CLOSED:
            listener.connection_ended(self.protocol.close_exc)

    @property
    def is_open(self) -> bool:
        """Whether neither end has begun to close it."""
        return self.protocol.state is _OPEN

    @property
    def is_writable(self) -> bool:
        """Whether `put` may be called: open, and the other end keeps up."""
        return self._is_writable and self.protocol.state is _OPEN

    def put(self, record: Buffer) -> None:
        """Make a binary message of a record, for `push` to send; only while `is_writable`.

        Args:
            record: If it lies at the beginning of `room`, that is free again afterwards.
        """
        parts, direct, length = self._parts, self._direct, len(record)
        bit = _MASKED if self._masks else 0
        if length < _LENGTH_16:
            head = bytes((_WHOLE_BINARY, bit | length))
        elif length < 1 << 16:
            head = _HEAD_16.pack(_WHOLE_BINARY, bit | _LENGTH_16, length)
        else:
            head = _HEAD_64.pack(_WHOLE_BINARY, bit | _LENGTH_64, length)
        # From the system's generator, as RFC 6455, section 10.3, asks.
        mask = os.urandom(_MASK_BYTES) if bit else b""
        if direct is not None and type(record) is memoryview and record.obj is direct.room.obj:
            if parts:
                direct.encrypt(b"".join(parts))
                parts.clear()
            direct.encrypt(direct.framed(length, head + mask, mask))
        elif bit:
            parts += (head, mask, apply_mask(record, mask))
        else:
            parts += (head, record)

    def push(self) -> None:
        """Send what was put, together."""
        parts, direct = self._parts, self._direct
        if parts:
            data = b"".join(parts)
            parts.clear()
            if direct is None:
                self.transport.write(data)
                return
            direct.encrypt(data)
        if direct is not None:
            direct.send()

    async def until_writable(self) -> None:
        """Wait until the other end has read most of what was written, or the connection ended."""
        if not self._is_writable:
            with contextlib.suppress(Exception):  # what ended it: the listener is told
                await self.drain()

    # Called by asyncio and websockets

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._early: list[Frame] = []  # what came before `listen`
        self._parts: list[Buffer] = []  # put, and not pushed
        self._begun: memoryview | None = None  # a whole binary message whose end is missing
        self._begun_bytes = 0
        self._masks = self.protocol.side is Side.CLIENT
        self.protocol.reader.__class__ = _Reader  # its parser holds the object already
        super().connection_made(transport)

    def data_received(self, data: Buffer) -> None:
        listener = self._listener
        if listener is None:
            super().data_received(bytes(data))
            return
        begun = self._begun
        if begun is not None:
            start = self._begun_bytes
            end = start + len(data)
            if end < len(begun):
                begun[start:end] = data
                self._begun_bytes = end
                return
            missing_bytes = len(begun) - start
            begun[start:] = data[:missing_bytes]
            self._begun = None
            self._read(listener, begun)
            data = data[missing_bytes:]
        if data:
            self._read(listener, data)
        listener.batch_ended()

    def _read(self, listener: Listener, data: Buffer) -> None:
        """Take the whole binary messages at the beginning; what is left the library must read."""
        protocol = self.protocol
        reader: _Reader = protocol.reader  # type: ignore[assignment]
        is_amid = self._fragments is not None or self._is_amid_text
        if is_amid or not reader.waits_for_frame or protocol.state is not _OPEN:
            # The next byte begins no frame, or one that belongs to a message begun before.
            super().data_received(bytes(data))
            return
        position, total = 0, len(data)
        view = memoryview(data)  # long messages are read where they lie
        is_masked = not self._masks
        while position + _HEAD_BYTES <= total and view[position] == _WHOLE_BINARY:
            length = view[position + 1]
            if (length >= _MASKED) is not is_masked:
                break
            length &= _LENGTH
            if length == _LENGTH_64:
                length = _HEAD_64.unpack_from(view, position)[2]
                start = position + _HEAD_64.size
            elif length == _LENGTH_16:
                length = _HEAD_16.unpack_from(view, position)[2]
                start = position + _HEAD_16.size
            else:
                start = position + 2
            if length > _MAX_LENGTH:
                break
            if is_masked:
                start += _MASK_BYTES
            end = start + length
            if end > total:
                # Not cleared first, and not touched before it is filled.
                self._begun = np.empty(end - position, np.uint8).data
                self._begun_bytes = total - position
                self._begun[: total - position] = view[position:]
                return
            message: Buffer = view[start:end]
            if is_masked:
                message = apply_mask(message, bytes(view[start - _MASK_BYTES : start]))
            position = end
            listener.message_received(message)
        if position < total:
            super().data_received(bytes(view[position:]))

    def process_event(self, event: Any) -> None:
        if not isinstance(event, Frame) or event.opcode not in DATA_OPCODES:
            super().process_event(event)
        elif self._listener is None:
            self._early.append(event)
        else:
            self._take(self._listener, event)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._is_writable = False
        if self._listener is not None:
            self._listener.writing_paused()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._is_writable = True
        if self._listener is not None:
            self._listener.writing_resumed()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        listener, self._listener = self._listener, None
        if listener is not None:
            problem = self.protocol.close_exc
            problem.__cause__ = exc or problem.__cause__
            listener.connection_ended(problem)

    def _take(self, listener: Listener, frame: Frame) -> None:
        data: Buffer = frame.data
        if frame.fin and frame.opcode is Opcode.BINARY:
            listener.message_received(data)
        elif frame.opcode is Opcode.TEXT:
            self._is_amid_text = not frame.fin
            listener.text_received()
        elif frame.opcode is Opcode.BINARY:
            # One buffer: a list would spend 40 bytes on each fragment of a single byte.
            self._fragments = bytearray(data)
            listener.message_began()
        elif self._fragments is not None:
            self._fragments += data
            if frame.fin:
                whole, self._fragments = self._fragments, None
                listener.message_ended()
                listener.message_received(whole)
        else:
            self._is_amid_text = not frame.fin


class _Reader(StreamReader):
    """The library's buffer, and whether its parser is between two frames."""

    waits_for_frame = False

    def at_eof(self) -> Generator[None, None, bool]:
        self.waits_for_frame = True
        is_at_eof = yield from super().at_eof()
        self.waits_for_frame = False
        return is_at_eof
