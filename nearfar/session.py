"""One nearfar connection without a socket: secure channel and wire protocol joined.

The shells (asyncio, websockets) move bytes; everything else happens here::

    session = ClientSession(pin="nf1:…", token=token, now_s=time.time())
    for message in websocket:                     # each one binary websocket message
        for received in session.receive(message, now_s=time.time()):
            ...
        for data in session.data_to_send():       # after every receive, send and close
            websocket.send(data)

A session is not thread-safe. Once `is_closed` is true the shell flushes `data_to_send` and closes
the socket. Bytes on the wire: docs/reference/secure-channel.md and docs/reference/wire.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nearfar.errors import NearfarError
from nearfar.secure.identity import Pin
from nearfar.secure.keys import KeyRing
from nearfar.wire.limits import Limits
from nearfar.wire.messages import Message


@dataclass(frozen=True, slots=True)
class Received:
    """One message from the peer.

    Attributes:
        message: The decoded header.
        tensors: Read-only views into the received data, in the order of the header.
        size_bytes: Size on the wire, sealed.
    """

    message: Message
    tensors: tuple[np.ndarray, ...]
    size_bytes: int


class _Session:
    def receive(self, data: bytes, *, now_s: float) -> list[Received]:
        """Take one websocket binary message.

        Pings are answered and not returned; tokens of a cancelled stream are checked and not
        returned. After an error the session is closed.

        Raises:
            SecurityError: Pin, signature, validity or decryption failed.
            RemoteProtocolError: The peer broke the wire protocol.
        """
        raise NotImplementedError

    def send(self, message: Message, tensors: Sequence[np.ndarray] = ()) -> int:
        """Check, encode, seal and queue one message; returns its size on the wire in bytes.

        Raises:
            LocalProtocolError: The message is illegal now, or too large; nothing was queued and
                the session goes on.
            InvalidInput: A tensor's dtype cannot be sent.
        """
        raise NotImplementedError

    def data_to_send(self) -> list[bytes]:
        """Websocket binary messages waiting to be sent; empties the queue."""
        raise NotImplementedError

    def close(self, problem: NearfarError | None = None) -> None:
        """End the session; a server that can still speak queues `Error` on stream 0 first."""
        raise NotImplementedError

    @property
    def is_ready(self) -> bool:
        """Whether requests can flow: client, `Ready` came; server, `Ready` was sent."""
        raise NotImplementedError

    @property
    def is_closed(self) -> bool:
        """Whether the session is dead: failed, closed, or ended by `Error` on stream 0."""
        raise NotImplementedError

    def is_open(self, stream: int) -> bool:
        """Whether the stream was opened and has not ended (a cancelled one is open until it ends)."""
        raise NotImplementedError

    @property
    def open_streams(self) -> tuple[int, ...]:
        """Streams that are open, in the order of opening."""
        raise NotImplementedError

    def credit(self, stream: int) -> int:
        """Tokens the server may still send on an open `Generate` stream."""
        raise NotImplementedError

    def token_count(self, stream: int) -> int:
        """Tokens sent so far on an open `Generate` stream: the next `Token.index`, `Fin.count`."""
        raise NotImplementedError

    def digest(self, stream: int) -> bytes:
        """SHA-256 of all texts so far on an open `Generate` stream: `Fin.digest`."""
        raise NotImplementedError


class ClientSession(_Session):
    """The client's end. Answers the handshake, then sends `Auth` by itself.

    Args:
        pin: Identity the server must prove.
        token: Goes into `Auth`, inside the channel.
        client: Name and version of the caller, for the server's logs.
        limits: What to accept.
        now_s: Wall clock (`time.time()`).

    Raises:
        ConfigError: The pin does not parse.
    """

    def __init__(
        self,
        *,
        pin: Pin | str,
        token: str,
        client: str = "",
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        now_s: float,
    ) -> None:
        raise NotImplementedError

    @property
    def next_stream(self) -> int:
        """Id for the next request; it counts up when that request is sent."""
        raise NotImplementedError

    @property
    def can_open(self) -> bool:
        """Whether one more request may be sent now: ready, not going away, a stream is free."""
        raise NotImplementedError


class ServerSession(_Session):
    """The server's end. Queues the signed key configuration at once.

    The shell checks `Auth.token` itself and answers `Ready`, or `Error` on stream 0.

    Args:
        keys: Key configurations of this server; shared by all its sessions.
        limits: What to accept.
        now_s: Wall clock (`time.time()`).
    """

    def __init__(
        self,
        *,
        keys: KeyRing,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        now_s: float,
    ) -> None:
        raise NotImplementedError
