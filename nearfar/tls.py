"""The established TLS connection of a websocket, with a fraction of asyncio's calls.

asyncio keeps TLS in a layer of its own between socket and protocol (`asyncio.sslproto`). Here it
goes on to make handshakes, check certificates and close in good order. But whatever comes or goes
passes it with its bookkeeping and its copies; what that costs stands in
docs/explanation/performance.md. `DirectTls` stands in for it while a connection does nothing but
carry data: it drives the same `ssl.SSLObject` over the same buffers, and steps aside for good as
soon as something else happens: TLS's own close, an end of file, `close()` of the transport.

It reaches for attributes of asyncio's layer that are not documented, and have been the same since
Python 3.11. Where they are not as expected (Python 3.10, uvloop), the connection stays as it is.
"""

from __future__ import annotations

import asyncio
import ssl
from asyncio import sslproto
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nearfar.scratch import READ_BYTES, of_thread

if TYPE_CHECKING:
    from nearfar.websocket import Buffer, DirectConnection

#: What is used of the layer: without one of them it is not the one we know.
_USED = ("_transport", "_incoming", "_outgoing", "_sslobj", "_write_backlog", "_app_reading_paused")


def take_over(websocket: DirectConnection) -> DirectTls | None:
    """Stand in for asyncio's TLS layer.

    Args:
        websocket: Connected, on the event loop of this thread. From now on its `data_received` is
            given views that are valid until it returns.

    Returns:
        `None` when it must stay: there is no TLS 1.3, it is not the layer we know, or it is amid
        something.
    """
    layer: Any = getattr(websocket.transport, "_ssl_protocol", None)
    is_known = type(layer) is sslproto.SSLProtocol
    if not is_known or not all(hasattr(layer, name) for name in _USED):
        return None
    tls: Any = layer._sslobj
    if (
        not hasattr(tls, "_sslobj")
        or tls.version() != "TLSv1.3"
        or websocket.transport.is_closing()
    ):
        return None
    if layer._write_backlog or layer._app_reading_paused or layer._outgoing.pending:
        return None
    return DirectTls(layer, websocket)


class DirectTls(asyncio.BufferedProtocol):
    """Between a socket's transport and a websocket; made by `take_over`.

    Args:
        layer: An `asyncio.sslproto.SSLProtocol`, past its handshake.
        websocket: Its protocol.

    Attributes:
        room: As of `Scratch`.
        framed: As of `Scratch`.
    """

    def __init__(self, layer: Any, websocket: DirectConnection) -> None:
        self._layer = layer
        self._websocket = websocket
        self._outer: asyncio.Transport = websocket.transport
        self._socket: asyncio.Transport = layer._transport
        self._incoming: ssl.MemoryBIO = layer._incoming
        self._outgoing: ssl.MemoryBIO = layer._outgoing
        self._tls: ssl.SSLObject = layer._sslobj
        # Without the method around it, which is a call more for each record of 16 KiB.
        self._read: Callable[[int, memoryview], int] = layer._sslobj._sslobj.read
        self._encrypt: Callable[[Buffer], int] = layer._sslobj._sslobj.write
        scratch = of_thread()
        self._sealed, self._plain, self.room = scratch.sealed, scratch.plain, scratch.room
        self.framed = scratch.framed
        self._is_paused = self._is_aside = False
        self._problem: Exception | None = None
        # The layer makes its buffer anew if it is to read again.
        layer._ssl_buffer = bytearray()
        layer._ssl_buffer_view = memoryview(layer._ssl_buffer)
        self._socket.set_protocol(self)

    def encrypt(self, data: Buffer) -> None:
        """Encrypt, for `send` to send."""
        if self._is_aside or self._outer.is_closing():
            self._outer.write(bytes(data))  # the layer's to send, or to drop; it may keep it
            return
        try:
            written = self._encrypt(data)
            while written < len(data):
                written += self._encrypt(memoryview(data)[written:])
        except ssl.SSLError as exc:
            self._fail(exc)

    def send(self) -> None:
        """Send what was encrypted; what the socket does not take now waits: `pause_writing`."""
        if self._outgoing.pending:
            self._socket.write(self._outgoing.read())

    # Called by the socket's transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._sealed

    def buffer_updated(self, nbytes: int) -> None:
        self._incoming.write(self._sealed[:nbytes])
        if self._outer.is_closing():
            self._step_aside()
            self._layer.buffer_updated(0)
            return
        plain, end, count = self._plain, 0, 1
        read, incoming = self._read, self._incoming
        problem: ssl.SSLError | None = None
        try:
            # Each call reads one record; one that is not whole is told by an error, which costs
            # more than asking whether anything is left.
            while count and incoming.pending:
                count = read(READ_BYTES, plain[end:])
                end += count
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as exc:
            problem = exc
        if end:
            self._websocket.data_received(plain[:end])
        if problem is not None:
            self._fail(problem)
        elif not count:  # the other end has closed TLS
            self._step_aside()
            self._layer.buffer_updated(0)
        elif self._outgoing.pending:  # TLS's own answers, such as to a change of keys
            self._socket.write(self._outgoing.read())

    def eof_received(self) -> bool | None:
        self._step_aside()
        keeps_open: bool | None = self._layer.eof_received()
        return keeps_open

    def pause_writing(self) -> None:
        self._is_paused = True
        self._websocket.pause_writing()

    def resume_writing(self) -> None:
        self._is_paused = False
        self._websocket.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._layer.connection_lost(exc or self._problem)

    def _step_aside(self) -> None:
        """Let asyncio's layer go on where this stands."""
        self._is_aside = True
        self._socket.set_protocol(self._layer)
        if self._is_paused:
            self._is_paused = False
            self._websocket.resume_writing()
            self._layer.pause_writing()

    def _fail(self, problem: Exception) -> None:
        self._problem = problem
        self._socket.abort()
