"""One nearfar connection without a socket: secure channel and wire protocol joined.

The shells (asyncio, websockets) move bytes; everything else happens here::

    session = ClientSession(pin="nf1:…", token=token, now_s=time.time())
    for message in websocket:                     # each one binary websocket message
        for received in session.receive(message, now_s=time.time()):
            ...
        for data in session.data_to_send():       # after every receive, send and close
            websocket.send(data)

A session is not thread-safe. Once `is_closed` is true, also after `receive` raised, the shell
flushes `data_to_send` and closes the socket. Bytes on the wire: docs/reference/secure-channel.md
and docs/reference/wire.md.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import structs

from nearfar.errors import (
    ConfigError,
    LocalProtocolError,
    NearfarError,
    RemoteProtocolError,
    SecurityError,
)
from nearfar.secure import records
from nearfar.secure.attestation import AttestedFacts, Verifier
from nearfar.secure.credentials import PROOF_BYTES, ApiKeyCredentials, Credentials
from nearfar.secure.handshake import (
    MAX_HANDSHAKE_MESSAGE_BYTES,
    MAX_HELLO_BYTES,
    ChannelSecrets,
    ClientHandshake,
    ServerHandshake,
    handshake_failed,
)
from nearfar.secure.identity import Pin
from nearfar.secure.keys import KeyRing
from nearfar.secure.records import RecordOpener, RecordSealer
from nearfar.wire.codec import encode
from nearfar.wire.connection import Connection, ConnectionState, Role
from nearfar.wire.limits import Limits
from nearfar.wire.messages import Auth, Message

__all__ = ["ClientSession", "Limits", "Received", "ServerSession", "max_sealed_bytes"]


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


def max_sealed_bytes(limits: Limits) -> int:
    """Largest websocket message a session with these limits accepts: the shell's `max_size`."""
    return limits.max_message_bytes + records.OVERHEAD_BYTES


class _Session(abc.ABC):
    """What both ends share; subclasses add their half of the handshake."""

    _max_handshake_bytes = MAX_HANDSHAKE_MESSAGE_BYTES

    def __init__(self, role: Role, limits: Limits) -> None:
        self._limits = limits
        self._connection = Connection(role, limits)
        self._sealer: RecordSealer | None = None
        self._opener: RecordOpener | None = None
        self._outgoing: list[bytes] = []
        self._unsent_replies = 0
        self._failure: NearfarError | None = None
        #: A server's, while the channel stands: the client's proof is checked with it.
        self.exporter = b""

    # Bytes

    def receive(self, data: bytes, *, now_s: float) -> list[Received]:
        """Take one websocket binary message.

        Pings are answered and not returned; tokens of a cancelled stream are checked and not
        returned. An `Error` on stream 0 is returned like any other message, and `is_closed` is
        true from then on. What comes after a clean end is ignored.

        Args:
            data: The whole message.
            now_s: Wall clock (`time.time()`).

        Raises:
            SecurityError: Pin, signature, validity or decryption failed; nothing is told the peer.
            RemoteProtocolError: The peer broke the wire protocol; a server has queued `Error`.
        """
        if self._failure is not None:
            raise self._failure
        if self.is_closed:
            return []
        try:
            if self._opener is None:
                self._receive_handshake(data, now_s)
                return []
            return self._receive_record(self._opener, data)
        except (SecurityError, RemoteProtocolError) as exc:
            self._failure = exc
            # A failure of the channel is told to nobody; a broken rule is, by a server.
            self.close(exc if isinstance(exc, RemoteProtocolError) else None)
            raise

    def _receive_handshake(self, data: bytes, now_s: float) -> None:
        if len(data) > self._max_handshake_bytes:
            raise handshake_failed()
        self._shake_hands(data, now_s)

    @abc.abstractmethod
    def _shake_hands(self, data: bytes, now_s: float) -> None:
        """Take one handshake message; queue the answer; install the secrets when it is the last."""

    def _receive_record(self, opener: RecordOpener, data: bytes) -> list[Received]:
        # Checked before decryption spends memory on it.
        if len(data) > self._connection.max_message_bytes + records.OVERHEAD_BYTES:
            raise RemoteProtocolError(
                f"The peer sent {len(data)} bytes where "
                f"{self._connection.max_message_bytes + records.OVERHEAD_BYTES} are allowed",
                fix="Send smaller messages, or raise max_message_bytes on both sides",
            )
        record_type, plaintext = opener.open(data)
        if record_type != records.TYPE_MESSAGE:
            raise RemoteProtocolError(
                f"The peer sent a record of unknown type {record_type}",
                fix="Update nearfar on the older side",
            )
        incoming = self._connection.receive(plaintext)
        if self._flush_connection():
            self._unsent_replies += 1
            if self._unsent_replies > self._limits.max_unsent_replies:
                raise RemoteProtocolError(
                    f"The peer sent more than {self._limits.max_unsent_replies} pings without "
                    "reading the answers",
                    fix="Ping once at a time",
                )
        if incoming is None:
            return []
        message, tensors = incoming
        return [Received(message, tensors, len(data))]

    def data_to_send(self) -> list[bytes]:
        """Websocket binary messages to send, in order; empties the queue.

        Look again after every `receive` (also when it raised), `send` and `close`.
        """
        outgoing, self._outgoing = self._outgoing, []
        self._unsent_replies = 0
        return outgoing

    def _flush_connection(self) -> int:
        """Seal what the connection has queued; returns the sealed size in bytes."""
        size_bytes = 0
        for plaintext in self._connection.data_to_send():
            assert self._sealer is not None  # a connection is used only after the handshake
            record = self._sealer.seal(records.TYPE_MESSAGE, plaintext)
            self._outgoing.append(record)
            size_bytes += len(record)
        return size_bytes

    def _install(self, sending: bytes, receiving: bytes) -> None:
        self._sealer = RecordSealer(sending)
        self._opener = RecordOpener(receiving)

    # Messages

    def send(self, message: Message, tensors: Sequence[np.ndarray] = ()) -> int:
        """Check, encode, seal and queue one message.

        Args:
            message: Any message this side may send; `Auth` and `Pong` are sent by themselves.
            tensors: What the message's `tensors` describe (see `nearfar.wire.codec.describe`).

        Returns:
            Size on the wire, sealed, in bytes.

        Raises:
            LocalProtocolError: The message is illegal now, or too large; nothing was queued and
                the session goes on.
            InvalidInput: A tensor's dtype cannot be sent; likewise.
        """
        if self.is_closed:
            raise LocalProtocolError(
                f"{type(message).__name__} cannot be sent: the session is closed",
                fix="Check is_closed, and connect again",
            )
        if self._sealer is None:
            raise LocalProtocolError(
                f"{type(message).__name__} cannot be sent before the handshake is over",
                fix="Wait until is_ready",
            )
        self._connection.send(message, tensors)
        return self._flush_connection()

    def close(self, problem: NearfarError | None = None) -> None:
        """End the session at once; open streams are abandoned.

        Args:
            problem: Why. A server tells its client (`Error` on stream 0), if the channel stands.
        """
        # Before the handshake is over nothing can be told.
        self._connection.close(problem if self._sealer is not None else None)
        self._flush_connection()
        # Keys go as soon as nothing more is sealed or opened with them.
        self._sealer = self._opener = None
        self.exporter = b""

    # State

    @property
    def is_ready(self) -> bool:
        """Whether requests can flow: client, `Ready` came; server, `Ready` was sent."""
        return self._connection.state in (ConnectionState.OPEN, ConnectionState.DRAINING)

    @property
    def is_closed(self) -> bool:
        """Whether the session is dead: failed, closed, or ended by `Error` on stream 0."""
        return self._connection.state is ConnectionState.CLOSED

    @property
    def open_streams(self) -> tuple[int, ...]:
        """Streams that have not ended, in the order of opening; a cancelled one is still open."""
        return self._connection.open_streams

    def is_open(self, stream: int) -> bool:
        """Whether the stream was opened and has not ended."""
        return stream in self._connection.open_streams

    def credit(self, stream: int) -> int:
        """Tokens the server may still send on an open stream.

        Raises:
            LocalProtocolError: The stream is not open.
        """
        return self._connection.credit(stream)

    def token_count(self, stream: int) -> int:
        """Tokens so far on an open stream: the next `Token.index`, and `Fin.count`.

        Raises:
            LocalProtocolError: The stream is not open.
        """
        return self._connection.token_count(stream)

    def digest(self, stream: int) -> bytes:
        """SHA-256 of all texts so far on an open stream: `Fin.digest`.

        Raises:
            LocalProtocolError: The stream is not open.
        """
        return self._connection.digest(stream)

    def digest_state(self, stream: int) -> hashlib._Hash:
        """The running digest of a stream, for `carry_over`; also after the session was closed.

        Raises:
            LocalProtocolError: The stream was not open.
        """
        return self._connection.digest_state(stream)

    def carry_over(self, stream: int, digest: hashlib._Hash) -> None:
        """Give a stream opened by `Resume` the digest of the part before it; before any token.

        Raises:
            LocalProtocolError: The stream takes no digest over.
        """
        self._connection.carry_over(stream, digest)


class ClientSession(_Session):
    """The client's end. Answers the handshake, then sends `Auth` by itself.

    Args:
        pin: Identity the server must prove; several while it is being rotated.
        token: An API key; goes into `Auth`, inside the channel.
        credentials: Instead of `token`: what to authenticate with.
        verifier: Demands and checks the server's attestation.
        client: Name and version of the caller, for the server's logs.
        limits: What to accept; `Ready` may lower it.
        now_s: Wall clock (`time.time()`); validity is judged by that of `receive`.

    Raises:
        ConfigError: The pin does not parse, or token and client name do not fit into `Auth`.
    """

    def __init__(
        self,
        *,
        pin: Pin | str | Sequence[Pin],
        token: str = "",
        credentials: Credentials | None = None,
        verifier: Verifier | None = None,
        client: str = "",
        limits: Limits = Limits(),  # noqa: B008
        now_s: float,
    ) -> None:
        super().__init__(Role.CLIENT, limits)
        self._handshake = ClientHandshake(
            Pin.parse(pin) if isinstance(pin, str) else pin, verifier=verifier
        )
        self._said_hello = False
        self._credentials = credentials or ApiKeyCredentials(token)
        self._auth = Auth(token=self._credentials.token, client=client, proof=bytes(PROOF_BYTES))
        try:
            size_bytes = sum(len(part) for part in encode(self._auth))
        except LocalProtocolError as exc:
            raise ConfigError("The token is not valid Unicode", field="credentials") from exc
        if size_bytes > limits.max_unauthenticated_bytes:
            raise ConfigError(
                f"Token and client name are {size_bytes} bytes long, "
                f"{limits.max_unauthenticated_bytes} are allowed",
                field="credentials",
                fix="Check that `credentials` names the API key and not another file",
            )

    def _shake_hands(self, data: bytes, now_s: float) -> None:
        if not self._said_hello:
            self._outgoing.append(self._handshake.receive_configuration(data, now_s=now_s))
            self._said_hello = True
            return
        secrets: ChannelSecrets = self._handshake.receive_welcome(data)
        self._install(secrets.client_traffic, secrets.server_traffic)
        proof = self._credentials.prove(secrets.exporter)
        self.send(structs.replace(self._auth, proof=proof))

    @property
    def attested(self) -> AttestedFacts | None:
        """What the server's evidence showed; `None` without a verifier."""
        return self._handshake.attested

    @property
    def next_stream(self) -> int:
        """Id for the next request; it counts up when that request is sent."""
        return self._connection.next_stream

    @property
    def can_open(self) -> bool:
        """Whether one more request may be sent now: ready, not going away, a stream is free."""
        return self._connection.can_open


class ServerSession(_Session):
    """The server's end. Queues the signed key configuration at once.

    The shell checks `Auth.token` and `Auth.proof` (with `exporter`) itself and answers `Ready`, or
    refuses with `close(SecurityError(…))`.

    Args:
        keys: Key configurations of this server; shared by all its sessions.
        limits: What to accept.
        now_s: Wall clock (`time.time()`).
    """

    _max_handshake_bytes = MAX_HELLO_BYTES

    def __init__(
        self,
        *,
        keys: KeyRing,
        limits: Limits = Limits(),  # noqa: B008
        now_s: float,
    ) -> None:
        super().__init__(Role.SERVER, limits)
        self._handshake = ServerHandshake(keys, now_s=now_s)
        self._outgoing.append(self._handshake.configuration.message)

    def _shake_hands(self, data: bytes, now_s: float) -> None:
        welcome, secrets = self._handshake.receive_hello(data, now_s=now_s)
        self._outgoing.append(welcome)
        self._install(secrets.server_traffic, secrets.client_traffic)
        self.exporter = secrets.exporter
