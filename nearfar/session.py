"""One nearfar connection without a socket: secure channel and wire protocol joined.

The shells (asyncio, websockets) move bytes; everything else happens here::

    session = ClientSession(pin="nf1:…", token=token, now_s=time.time())
    for message in websocket:                     # each one binary websocket message
        for received in session.receive(message, now_s=time.time()):
            ...
        while (data := session.next_to_send(clock())) is not None:
            websocket.send(data)                  # after every receive, send and close,
    # … and at session.next_flush_s(), which is set while traffic is shaped.

A session is not thread-safe. Once `is_closed` is true, also after `receive` raised, the shell
flushes `data_to_send` and closes the socket. Bytes on the wire: docs/reference/secure-channel.md
and docs/reference/wire.md.
"""

from __future__ import annotations

import abc
import functools
import hashlib
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

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
from nearfar.secure.frames import Assembler, max_record_bytes
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
from nearfar.secure.outbox import PLAIN, Outbox, Traits
from nearfar.secure.records import Buffer, RecordOpener, RecordSealer
from nearfar.secure.shaping import LEVELS, Shaping, strongest
from nearfar.wire.connection import OPENERS, Connection, ConnectionState, Role
from nearfar.wire.limits import Limits
from nearfar.wire.messages import (
    Auth,
    Credit,
    Error,
    Fin,
    GoAway,
    Message,
    Ready,
    Token,
)

__all__ = ["ClientSession", "Limits", "Received", "ServerSession", "max_sealed_bytes"]


#: Of `Auth` beside the texts of its sender, at most.
_AUTH_BYTES = 256

_CLOSED = ConnectionState.CLOSED  # as in `nearfar.wire.connection`

#: Kept, as a client connects to the same server again and again.
_pin_of = functools.lru_cache(maxsize=16)(Pin.parse)


class Received(NamedTuple):
    """One message from the peer.

    Attributes:
        message: The decoded header.
        tensors: Read-only views into the received data, in the order of the header.
        size_bytes: Size on the wire, sealed; of a record that brought several, this one's part.
    """

    message: Message
    tensors: tuple[np.ndarray, ...]
    size_bytes: int


def max_sealed_bytes(limits: Limits) -> int:
    """Largest websocket message a session with these limits accepts: the shell's `max_size`.

    Longer messages of the wire protocol come in pieces, so it is small.
    """
    return max_record_bytes(limits.max_message_bytes)


#: Shorter records are not worth a look at where their plaintext belongs.
_LONG_BYTES = 4096
#: Nor at how long they may be: no limit is below what shaping adds.
_SHORT_BYTES = max_record_bytes(0)


#: What the queue must know about a message; nothing of its contents.
TRAITS: dict[type[Message], Traits] = {
    **dict.fromkeys(OPENERS, Traits(opens=True)),
    **dict.fromkeys((Token, Credit), Traits(is_paced=True)),
    **dict.fromkeys((Fin, Error), Traits(ends=True)),
    GoAway: Traits(is_barrier=True),
}


class _Session(abc.ABC):
    """What both ends share; subclasses add their half of the handshake."""

    _max_handshake_bytes = MAX_HANDSHAKE_MESSAGE_BYTES

    def __init__(self, role: Role, limits: Limits) -> None:
        self._limits = limits
        self._connection = Connection(role, limits)
        self._sealer: RecordSealer | None = None
        self._opener: RecordOpener | None = None
        self._assembler = Assembler()
        self._outbox = Outbox()
        self._outgoing: deque[Buffer] = deque()  # sealed, or of the handshake
        self._unsent_replies = 0
        self._failure: NearfarError | None = None
        #: A server's, while the channel stands: the client's proof is checked with it.
        self.exporter = b""

    # Bytes

    def receive(self, data: Buffer, *, now_s: float) -> list[Received]:
        """Take one websocket binary message.

        Pings are answered and not returned; tokens of a cancelled stream are checked and not
        returned. An `Error` on stream 0 is returned like any other message, and `is_closed` is
        true from then on. What comes after a clean end is ignored.

        Args:
            data: The whole message; not kept.
            now_s: Wall clock (`time.time()`).

        Raises:
            SecurityError: Pin, signature, validity or decryption failed; nothing is told the peer.
            RemoteProtocolError: The peer broke the wire protocol; a server has queued `Error`.
        """
        if self._failure is not None:
            raise self._failure
        if self._connection.state is _CLOSED:
            return []
        try:
            if self._opener is None:
                self._receive_handshake(bytes(data), now_s)
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

    def _receive_record(self, opener: RecordOpener, data: Buffer) -> list[Received]:
        connection, assembler = self._connection, self._assembler
        max_message_bytes = connection.max_message_bytes
        record_bytes = len(data)
        # Checked before decryption spends memory on it.
        if record_bytes > _SHORT_BYTES and record_bytes > max_record_bytes(max_message_bytes):
            raise RemoteProtocolError(
                f"The peer sent a record of {record_bytes} bytes where "
                f"{max_record_bytes(max_message_bytes)} are allowed",
                fix="Check that both sides run compatible nearfar versions",
            )
        arrived = None
        if record_bytes > _LONG_BYTES and (opened := assembler.open_piece(opener, data)):
            record_type, plaintext, arrived = opened
        else:
            record_type, plaintext = opener.open(data)
        if record_type != records.TYPE_MESSAGE:
            raise RemoteProtocolError(
                f"The peer sent a record of unknown type {record_type}",
                fix="Update nearfar on the older side",
            )
        if arrived is None:
            arrived = assembler.feed(plaintext, max_message_bytes=max_message_bytes)
        received: list[Received] = []
        for data_of, size_bytes, announced_stream in arrived:
            if data_of is None:
                connection.announce(announced_stream or 0)
                continue
            incoming = connection.receive(data_of, announced_stream=announced_stream)
            if connection.outgoing:
                self._flush_connection()
                self._count_reply()
            if incoming is not None:
                message, tensors = incoming
                if type(message) in self._heeded:
                    self._heed(message)
                received.append(Received(message, tensors, size_bytes))
        return received

    def _count_reply(self) -> None:
        self._unsent_replies += 1
        if self._unsent_replies > self._limits.max_unsent_replies:
            raise RemoteProtocolError(
                f"The peer sent more than {self._limits.max_unsent_replies} pings without "
                "reading the answers",
                fix="Ping once at a time",
            )

    #: What `_heed` is asked about; most messages say nothing about the session.
    _heeded: tuple[type[Message], ...]

    @abc.abstractmethod
    def _heed(self, message: Message) -> None:
        """Take note of what a message says about the session itself."""

    def next_to_send(
        self, now_s: float | None = None, room: memoryview | None = None
    ) -> Buffer | None:
        """The websocket binary message that leaves next; `None` when none does now.

        Sealed only now, so that what is queued while the one before is being sent can overtake
        long messages. What this returns must be sent, in the order of the calls.

        Args:
            now_s: Any steady clock (`time.monotonic()`), always the same one; `None` does not wait
                for ticks of shaped traffic.
            room: Where a long record may be sealed; it then is a view of that.
        """
        if self._outgoing:
            return self._outgoing.popleft()
        if self._sealer is not None:
            outbox = self._outbox
            is_busy = outbox.shaping == "strict" and self._connection.in_flight > 0
            plaintext = outbox.next(now_s, is_busy=is_busy)
            if self._unsent_replies and not outbox.has_ready:
                self._unsent_replies = 0
            if plaintext is not None:
                return self._sealer.seal(records.TYPE_MESSAGE, plaintext, now_s=now_s, room=room)
        return None

    @property
    def is_quiet(self) -> bool:
        """Whether nothing will leave before the next `receive`, `send` or `close`."""
        return self._outbox.is_idle and not self._outgoing

    def data_to_send(self, now_s: float | None = None) -> list[Buffer]:
        """All websocket binary messages that may leave now, in order: `next_to_send` until `None`.

        Look again after every `receive` (also when it raised), `send` and `close`.
        """
        return list(iter(lambda: self.next_to_send(now_s), None))

    def next_flush_s(self) -> float | None:
        """When to call `next_to_send` again even if nothing happens, on its clock.

        `None` when only `receive`, `send` and `close` can give something to send. Ask after
        `next_to_send` returned `None`.
        """
        return None if self.is_closed else self._outbox.next_flush_s()

    def own_borrowed(self) -> None:
        """Copy what `send` borrowed and what has not left: from now on its arrays may change."""
        self._outbox.own()

    def _flush_connection(self) -> None:
        """Queue what the connection itself has for the peer."""
        for message, parts, size_bytes in self._connection.take():
            traits = TRAITS.get(type(message), PLAIN)
            self._outbox.put(parts, size_bytes, getattr(message, "stream", 0), traits)

    def _seal_all(self) -> None:
        """Seal what was queued, but no pieces: nobody waits for the rest of a long message."""
        if self._sealer is not None:
            while (plaintext := self._outbox.next(None, bulk=False)) is not None:
                self._outgoing.append(self._sealer.seal(records.TYPE_MESSAGE, plaintext))

    def _install(self, sending: bytes, receiving: bytes, suite: int) -> None:
        self._sealer = RecordSealer(sending, suite=suite)
        self._opener = RecordOpener(receiving, suite=suite)

    # Messages

    def send(
        self, message: Message, tensors: Sequence[np.ndarray] = (), *, borrow: bool = False
    ) -> int:
        """Check, encode, seal and queue one message.

        Args:
            message: Any message this side may send; `Auth` and `Pong` are sent by themselves.
            tensors: What the message's `tensors` describe (see `nearfar.wire.codec.describe`);
                copied, so they may change afterwards.
            borrow: Do not copy them yet. The shell calls `next_to_send` as often as it can at
                once, and then `own_borrowed`, before anybody else may change them.

        Returns:
            Size on the wire, sealed, in bytes; of a message that shares a record, its own part.

        Raises:
            LocalProtocolError: The message is illegal now, or too large; nothing was queued and
                the session goes on.
            InvalidInput: A tensor's dtype cannot be sent; likewise.
        """
        connection = self._connection
        if self._sealer is None or connection.state is _CLOSED:
            name = type(message).__name__
            if self.is_closed:
                raise LocalProtocolError(
                    f"{name} cannot be sent: the session is closed",
                    fix="Check is_closed, and connect again",
                )
            raise LocalProtocolError(
                f"{name} cannot be sent before the handshake is over", fix="Wait until is_ready"
            )
        parts, size_bytes = connection.prepare(message, tensors)
        outbox = self._outbox
        outbox.max_unfinished_bytes = connection.max_message_bytes
        traits = TRAITS.get(type(message), PLAIN)
        stream: int = getattr(message, "stream", 0)
        return outbox.put(parts, size_bytes, stream, traits, borrow=borrow)

    def close(self, problem: NearfarError | None = None) -> None:
        """End the session at once; open streams are abandoned.

        Args:
            problem: Why. A server tells its client (`Error` on stream 0), if the channel stands.
        """
        self._seal_all()
        # Before the handshake is over nothing can be told.
        self._connection.close(problem if self._sealer is not None else None)
        self._flush_connection()
        self._seal_all()
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
        return self._connection.state is _CLOSED

    @property
    def oldest_unfinished(self) -> tuple[int, int] | None:
        """Number and announced bytes of the message whose pieces began to come first.

        `None` when no message is unfinished. The shell watches that it does not stay the same for
        long.
        """
        return self._assembler.oldest

    @property
    def open_streams(self) -> tuple[int, ...]:
        """Streams that have not ended, in the order of opening; a cancelled one is still open."""
        return self._connection.open_streams

    @property
    def in_flight(self) -> int:
        """How many streams have not ended."""
        return self._connection.in_flight

    def is_open(self, stream: int) -> bool:
        """Whether the stream was opened and has not ended."""
        return self._connection.is_open(stream)

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
        shaping: How both directions shall hide sizes and times, at least. Other than ``off`` it
            needs a shell that looks at `next_flush_s`.
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
        shaping: Shaping = "off",
        now_s: float,
    ) -> None:
        super().__init__(Role.CLIENT, limits)
        self._shaping = shaping
        self._handshake = ClientHandshake(
            _pin_of(pin) if isinstance(pin, str) else pin, verifier=verifier
        )
        self._said_hello = False
        self._credentials = credentials or ApiKeyCredentials(token)
        self._auth = Auth(
            token=self._credentials.token,
            client=client,
            proof=bytes(PROOF_BYTES),
            shaping=shaping,
        )
        try:
            size_bytes = _AUTH_BYTES + len(self._auth.token.encode()) + len(client.encode())
        except UnicodeEncodeError as exc:
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
        self._install(secrets.client_traffic, secrets.server_traffic, secrets.suite)
        if self._shaping != "off":
            self._outbox.shaping = "balanced"  # pads; ticks begin when both ends agree
        proof = self._credentials.prove(secrets.exporter)
        self.send(msgspec.structs.replace(self._auth, proof=proof))

    @property
    def shaping(self) -> Shaping:
        """How what is sent now is shaped."""
        return self._outbox.shaping

    @property
    def attested(self) -> AttestedFacts | None:
        """What the server's evidence showed; `None` without a verifier."""
        return self._handshake.attested

    _heeded = (Token, Fin, Error, Ready)

    def _heed(self, message: Message) -> None:
        if isinstance(message, Ready):
            if LEVELS.index(message.shaping) < LEVELS.index(self._shaping):
                raise SecurityError(
                    f"The server shapes its traffic as '{message.shaping}', "
                    f"'{self._shaping}' was asked for",
                    fix="Update the server, or lower `shaping` of this cloud",
                )
            self._outbox.shaping = message.shaping
        elif isinstance(message, Token):
            self._outbox.answer_began(message.stream)
        elif isinstance(message, (Fin, Error)):
            self._outbox.answer_ended(message.stream)

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
        min_shaping: The least that clients get, whatever they ask for.
        now_s: Wall clock (`time.time()`).
    """

    _max_handshake_bytes = MAX_HELLO_BYTES

    def __init__(
        self,
        *,
        keys: KeyRing,
        limits: Limits = Limits(),  # noqa: B008
        min_shaping: Shaping = "off",
        now_s: float,
    ) -> None:
        super().__init__(Role.SERVER, limits)
        self._shaping = min_shaping
        self._handshake = ServerHandshake(keys, now_s=now_s)
        self._outgoing.append(self._handshake.configuration.message)

    def _shake_hands(self, data: bytes, now_s: float) -> None:
        welcome, secrets = self._handshake.receive_hello(data, now_s=now_s)
        self._outgoing.append(welcome)
        self._install(secrets.server_traffic, secrets.client_traffic, secrets.suite)
        self.exporter = secrets.exporter

    _heeded = (Auth,)

    def _heed(self, message: Message) -> None:
        if isinstance(message, Auth):
            self._shaping = strongest(self._shaping, message.shaping)

    def expect_speed(self, tokens_per_s: float) -> None:
        """As `Outbox.expect_speed`: the pace of shaped answers, known before their first token."""
        self._outbox.expect_speed(tokens_per_s)

    def send(
        self, message: Message, tensors: Sequence[np.ndarray] = (), *, borrow: bool = False
    ) -> int:
        """As `_Session.send`; `Ready.shaping` is filled in: the client's wish or our minimum."""
        if type(message) is Ready:
            message = msgspec.structs.replace(message, shaping=self._shaping)
            self._outbox.shaping = self._shaping
        return super().send(message, tensors, borrow=borrow)
