"""A websocket without tasks between it and its session: messages go straight through, both ways.

`websockets` hands messages over through a queue and a task: two turns of the event loop, and some
sixty Python calls, for each message. A session answers at once and never waits, so both asyncio
shells take the frames where asyncio reads them, and write records where they are sealed. All of
the websocket protocol, its handshake, keepalive and closing stay those of the library.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Protocol, Union

from websockets.asyncio.connection import Connection
from websockets.exceptions import ConnectionClosed
from websockets.frames import DATA_OPCODES, Frame, Opcode
from websockets.protocol import State

#: Records shorter than that together are joined and written at once: one TLS record, one system
#: call. Longer ones are not worth the copy.
_MAX_JOINED_BYTES = 32 * 1024


class Listener(Protocol):
    """Whoever takes what comes on a websocket. None of its methods may raise."""

    def message_received(self, data: bytes | bytearray) -> None:
        """A binary message came, whole."""
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

    _listener: Listener | None = None
    _is_writable = True
    _fragments: bytearray | None = None

    def listen(self, listener: Listener) -> None:
        """Hand all messages to a listener from now on, first those that wait.

        Args:
            listener: Called on the event loop.
        """
        self._listener = listener
        while self._early:
            self._take(listener, self._early.pop(0))
        listener.batch_ended()
        if self.protocol.state is State.CLOSED:
            listener.connection_ended(self.close_exc)

    @property
    def is_writable(self) -> bool:
        """Whether `write` may be called: open, and the other end keeps up."""
        return self._is_writable and self.protocol.state is State.OPEN

    def write(self, records: list[Any]) -> None:
        """Write binary messages at once; only while `is_writable`.

        Args:
            records: bytes or bytearray; each becomes one message, in their order.
        """
        protocol = self.protocol
        for record in records:
            protocol.send_binary(record)
        frames = protocol.data_to_send()
        if len(frames) > 1 and sum(map(len, frames)) <= _MAX_JOINED_BYTES:
            frames = [b"".join(frames)]
        for frame in frames:
            self.transport.write(frame)

    async def until_writable(self) -> None:
        """Wait until the other end has read most of what was written, or the connection ended."""
        if not self._is_writable:
            with contextlib.suppress(ConnectionError):
                await self.drain()

    # Called by asyncio and websockets

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._early: list[Frame] = []  # what came before `listen`
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._listener is not None:
            self._listener.batch_ended()

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
            listener.connection_ended(self.close_exc)

    def _take(self, listener: Listener, frame: Frame) -> None:
        data: Union[bytes, bytearray, memoryview] = frame.data
        if frame.fin and frame.opcode is Opcode.BINARY:
            listener.message_received(data)  # type: ignore[arg-type]
        elif frame.opcode is Opcode.TEXT:
            listener.text_received()
        elif frame.opcode is Opcode.BINARY:
            # One buffer: a list would spend 40 bytes on each fragment of a single byte.
            self._fragments = bytearray(data)
            listener.message_began()
        elif self._fragments is not None:  # otherwise the rest of a text
            self._fragments += data
            if frame.fin:
                whole, self._fragments = self._fragments, None
                listener.message_ended()
                listener.message_received(whole)
