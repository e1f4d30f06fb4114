"""The wire protocol's rules, without a socket: who may say what when.

`TRANSITIONS` is the protocol; the class below it keeps the few numbers that a table cannot
(credit, token indices, digests). Both ends run the same code and judge each message alike: an
illegal one of ours is a `LocalProtocolError`, one of the peer's a `RemoteProtocolError`.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Union

import numpy as np

from nearfar.errors import LocalProtocolError, NearfarError, RemoteProtocolError
from nearfar.wire.checks import CHECKS, MAX_CREDIT, MAX_STREAM, problem_in
from nearfar.wire.codec import decode, encode
from nearfar.wire.limits import Limits
from nearfar.wire.messages import (
    Auth,
    Cancel,
    Credit,
    Error,
    Fin,
    Generate,
    GoAway,
    Infer,
    ListModels,
    Message,
    Models,
    Ping,
    Pong,
    Ready,
    Result,
    Resume,
    Token,
)


class Role(enum.Enum):
    """Which end of the connection."""

    # Members are singletons. Enum's own hash is a Python function; every message looks them up.
    __hash__ = object.__hash__

    CLIENT = "client"
    SERVER = "server"


class ConnectionState(enum.Enum):
    """What the connection has seen."""

    __hash__ = object.__hash__  # as in `Role`

    NEW = "new"
    AUTHENTICATING = "authenticating"
    OPEN = "open"
    DRAINING = "going away"
    CLOSED = "closed"


class StreamState(enum.Enum):
    """What one request has seen; a cancelled one still awaits its end."""

    __hash__ = object.__hash__  # as in `Role`

    IDLE = "idle"
    LISTING = "listing"
    INFERRING = "inferring"
    GENERATING = "generating"
    LISTING_CANCELLED = "listing, cancelled"
    INFERRING_CANCELLED = "inferring, cancelled"
    GENERATING_CANCELLED = "generating, cancelled"
    ENDED = "ended"


State = Union[ConnectionState, StreamState]

_CLIENT, _SERVER = Role.CLIENT, Role.SERVER
_C, _S = ConnectionState, StreamState
# In Python 3.11 looking a member up in its class takes as long as a call.
_OPEN, _DRAINING, _CLOSED = _C.OPEN, _C.DRAINING, _C.CLOSED
_IDLE, _ENDED = _S.IDLE, _S.ENDED

#: (who sends, state, message) -> next state. What is not here is illegal.
TRANSITIONS: dict[tuple[Role, State, type[Message]], State] = {
    # The connection (stream 0).
    (_CLIENT, _C.NEW, Auth): _C.AUTHENTICATING,
    (_SERVER, _C.NEW, Error): _C.CLOSED,
    (_SERVER, _C.AUTHENTICATING, Ready): _C.OPEN,
    (_SERVER, _C.AUTHENTICATING, Error): _C.CLOSED,
    (_CLIENT, _C.OPEN, Ping): _C.OPEN,
    (_CLIENT, _C.OPEN, Pong): _C.OPEN,
    (_SERVER, _C.OPEN, Ping): _C.OPEN,
    (_SERVER, _C.OPEN, Pong): _C.OPEN,
    (_SERVER, _C.OPEN, GoAway): _C.DRAINING,
    (_SERVER, _C.OPEN, Error): _C.CLOSED,
    (_CLIENT, _C.DRAINING, Ping): _C.DRAINING,
    (_CLIENT, _C.DRAINING, Pong): _C.DRAINING,
    (_SERVER, _C.DRAINING, Ping): _C.DRAINING,
    (_SERVER, _C.DRAINING, Pong): _C.DRAINING,
    (_SERVER, _C.DRAINING, GoAway): _C.DRAINING,
    (_SERVER, _C.DRAINING, Error): _C.CLOSED,
    # A stream.
    (_CLIENT, _S.IDLE, ListModels): _S.LISTING,
    (_CLIENT, _S.LISTING, Cancel): _S.LISTING_CANCELLED,
    (_SERVER, _S.LISTING, Models): _S.ENDED,
    (_SERVER, _S.LISTING, Error): _S.ENDED,
    (_SERVER, _S.LISTING_CANCELLED, Models): _S.ENDED,
    (_SERVER, _S.LISTING_CANCELLED, Error): _S.ENDED,
    (_CLIENT, _S.IDLE, Infer): _S.INFERRING,
    (_CLIENT, _S.INFERRING, Cancel): _S.INFERRING_CANCELLED,
    (_SERVER, _S.INFERRING, Result): _S.ENDED,
    (_SERVER, _S.INFERRING, Error): _S.ENDED,
    (_SERVER, _S.INFERRING_CANCELLED, Result): _S.ENDED,
    (_SERVER, _S.INFERRING_CANCELLED, Error): _S.ENDED,
    (_CLIENT, _S.IDLE, Generate): _S.GENERATING,
    (_CLIENT, _S.IDLE, Resume): _S.GENERATING,
    (_CLIENT, _S.GENERATING, Credit): _S.GENERATING,
    (_CLIENT, _S.GENERATING, Cancel): _S.GENERATING_CANCELLED,
    (_SERVER, _S.GENERATING, Token): _S.GENERATING,
    (_SERVER, _S.GENERATING, Fin): _S.ENDED,
    (_SERVER, _S.GENERATING, Error): _S.ENDED,
    (_SERVER, _S.GENERATING_CANCELLED, Token): _S.GENERATING_CANCELLED,
    (_SERVER, _S.GENERATING_CANCELLED, Fin): _S.ENDED,
    (_SERVER, _S.GENERATING_CANCELLED, Error): _S.ENDED,
}

#: Legal to receive, and ignored, because the sender could not know that the stream had ended:
#: its message and the end crossed. Never legal to send knowingly.
CROSSINGS: frozenset[tuple[Role, State, type[Message]]] = frozenset(
    {
        (_CLIENT, _S.ENDED, Cancel),
        (_CLIENT, _S.ENDED, Credit),
    }
)

StreamMessage = Union[
    ListModels, Models, Infer, Result, Generate, Token, Fin, Cancel, Credit, Error, Resume
]
#: Messages of the client that open a stream.
OPENERS = (ListModels, Infer, Generate, Resume)
_CANCELLED_STATES = (_S.LISTING_CANCELLED, _S.INFERRING_CANCELLED, _S.GENERATING_CANCELLED)
#: What the connection itself asked for, must answer or keeps from its caller.
_NOTED = frozenset((Token, Ping, Pong))
_MAX_UNANSWERED_PINGS = 64
_MAX_ERROR_CHARACTERS = 2000


def _sendable(text: str) -> str:
    """An error's text as it fits any message: bounded, valid Unicode."""
    return text[:_MAX_ERROR_CHARACTERS].encode(errors="replace").decode()


class _Violation(Exception):
    """A message is illegal; whose fault that is decides the error it becomes."""

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix


class _Stream:
    """One open request.

    Attributes:
        credit: Tokens the server may still send.
        count: Tokens so far; the next index.
        sha256: Running hash of their texts; made with the first one, as most streams have none.
        resumed_at: First index of this connection's part of the answer; `None` for a whole one.
    """

    __slots__ = ("count", "credit", "resumed_at", "sha256", "state")

    def __init__(self, state: State, credit: int, resumed_at: int | None = None) -> None:
        self.state = state
        self.credit = credit
        self.resumed_at = resumed_at
        self.count = resumed_at or 0
        self.sha256: hashlib._Hash | None = None

    def hashed(self) -> hashlib._Hash:
        if self.sha256 is None:
            self.sha256 = hashlib.sha256()
        return self.sha256

    def add(self, text: str) -> None:
        self.hashed().update(text.encode())
        self.credit -= 1
        self.count += 1


class Outgoing(NamedTuple):
    """One checked and encoded message.

    Attributes:
        message: Its header.
        parts: Its bytes in order; those of tensors are views of the caller's arrays.
        size_bytes: Their length together.
    """

    message: Message
    parts: list[bytes | memoryview]
    size_bytes: int


class Connection:
    """One end's view of the connection: checks and encodes, decodes and checks.

    Args:
        role: Which end this is.
        limits: What to accept.

    Attributes:
        role: As given.
        state: What the connection has seen.
        max_message_bytes: Largest plaintext message that may be sent or received now.
        outgoing: What `take` would give.
    """

    def __init__(self, role: Role, limits: Limits) -> None:
        self.role = role
        self.state = ConnectionState.NEW
        self._peer = Role.SERVER if role is Role.CLIENT else Role.CLIENT
        self._limits = limits
        self.max_message_bytes = limits.max_unauthenticated_bytes
        self._max_streams = limits.max_streams
        self._streams: dict[int, _Stream] = {}
        self._highest_stream = 0
        self._last_stream = MAX_STREAM  # lowered by GoAway
        self._pings_sent: set[int] = set()
        self._arriving: set[int] = set()  # streams announced by the first piece of their request
        self.outgoing: list[Outgoing] = []

    # What is known

    @property
    def open_streams(self) -> tuple[int, ...]:
        """Streams that have not ended, in the order of opening."""
        return tuple(self._streams)

    @property
    def in_flight(self) -> int:
        """How many streams have not ended."""
        return len(self._streams)

    def is_open(self, stream: int) -> bool:
        """Whether the stream was opened and has not ended."""
        return stream in self._streams

    @property
    def next_stream(self) -> int:
        """Id for the client's next request."""
        return self._highest_stream + 1

    @property
    def can_open(self) -> bool:
        """Whether the client may open one more stream now."""
        return self.state is _OPEN and len(self._streams) < self._max_streams

    def credit(self, stream: int) -> int:
        """Tokens the server may still send."""
        return self._generation(stream).credit

    def token_count(self, stream: int) -> int:
        """Tokens so far; the next index."""
        return self._generation(stream).count

    def digest(self, stream: int) -> bytes:
        """SHA-256 of all texts so far."""
        return self._generation(stream).hashed().digest()

    def digest_state(self, stream: int) -> hashlib._Hash:
        """A copy of the running SHA-256 of all texts so far, to carry over to a `Resume`."""
        return self._generation(stream).hashed().copy()

    def carry_over(self, stream: int, digest: hashlib._Hash) -> None:
        """Give a resumed stream the digest of what came before; both ends do so before any token.

        Raises:
            LocalProtocolError: The stream was not opened by `Resume`, or has tokens already.
        """
        entry = self._generation(stream)
        if entry.resumed_at is None or entry.count != entry.resumed_at:
            raise LocalProtocolError(
                f"Stream {stream} takes over no digest",
                field="stream",
                fix="Carry the digest over right after Resume",
            )
        entry.sha256 = digest.copy()

    def _generation(self, stream: int) -> _Stream:
        entry = self._streams.get(stream)
        if entry is None:
            raise LocalProtocolError(
                f"Stream {stream} is not open", field="stream", fix="Check is_open first"
            )
        return entry

    # Sending

    def send(self, message: Message, tensors: Sequence[np.ndarray] = ()) -> None:
        """Check, encode and queue one message.

        Raises:
            LocalProtocolError: It is illegal now or too large; nothing changed.
            InvalidInput: A tensor cannot be sent.
        """
        self.outgoing.append(Outgoing(message, *self.prepare(message, tensors)))

    def prepare(
        self, message: Message, tensors: Sequence[np.ndarray] = (), *, is_own: bool = False
    ) -> tuple[list[bytes | memoryview], int]:
        """As `send`, for a caller that sends the message itself, before anything else.

        Args:
            message: As `send`.
            tensors: As `send`.
            is_own: The connection itself has something to say.

        Returns:
            `Outgoing.parts` and `Outgoing.size_bytes`.

        Raises:
            LocalProtocolError, InvalidInput: As `send`.
        """
        if type(message) is Pong and not is_own:
            raise LocalProtocolError("Pong is sent by the connection itself", field="Pong")
        try:
            next_state = self._judge(self.role, message)
        except _Violation as violation:
            raise LocalProtocolError(
                violation.problem, field=type(message).__name__, fix=violation.fix
            ) from None
        parts = encode(message, tensors)
        size_bytes = sum(map(len, parts))
        if size_bytes > self.max_message_bytes:
            raise LocalProtocolError(
                f"{type(message).__name__} has {size_bytes} bytes, but this connection takes "
                f"messages of up to {self.max_message_bytes} bytes",
                field="tensors",
                fix="Send smaller inputs, or raise max_message_bytes on both sides",
            )
        self._advance(message, next_state)
        if type(message) is Ping:
            self._pings_sent.add(message.id)
        return parts, size_bytes

    def close(self, problem: NearfarError | None = None) -> None:
        """Take part no longer: nothing more can be sent, and what comes is ignored.

        Args:
            problem: Why; a server queues it for the client as `Error` on stream 0.
        """
        if self.state is _CLOSED:
            return
        if problem is not None and self.role is Role.SERVER:
            texts = [_sendable(text) for text in (problem.problem, problem.fix)]
            error = Error(stream=0, code=problem.code, problem=texts[0], fix=texts[1])
            self.outgoing.append(Outgoing(error, *self.prepare(error, is_own=True)))
        self.state = _CLOSED

    def take(self) -> list[Outgoing]:
        """What was queued by `send`, and by this end itself, in order; empties the queue."""
        outgoing, self.outgoing = self.outgoing, []
        return outgoing

    def data_to_send(self) -> list[bytes]:
        """Encoded messages in order, each in one piece; empties the queue."""
        return [b"".join(outgoing.parts) for outgoing in self.take()]

    # Receiving

    def announce(self, stream: int) -> None:
        """The first piece of a message for this stream came.

        A shorter request may overtake it then, although its stream has a higher number.
        """
        if (
            self.role is Role.SERVER
            and self._highest_stream < stream <= MAX_STREAM
            and self.state is _OPEN
        ):
            self._arriving.add(stream)
            self._highest_stream = stream

    def receive(
        self, data: bytes | memoryview, *, announced_stream: int | None = None
    ) -> tuple[Message, tuple[np.ndarray, ...]] | None:
        """Decode and check one message; queues the answer to a `Ping`.

        Args:
            data: The whole message.
            announced_stream: Which stream its first piece named, if it came in pieces.

        Returns:
            The message and its tensors; `None` for what the caller has no use for: pings, tokens
            of cancelled streams, messages that crossed the end of their stream, and everything
            after the connection was closed.

        Raises:
            RemoteProtocolError: The peer broke the rules; the connection is closed, and a server
                has queued the error for its client.
        """
        if self.state is _CLOSED:
            return None
        try:
            if len(data) > self.max_message_bytes:
                raise _Violation(
                    f"a message of {len(data)} bytes where {self.max_message_bytes} are allowed"
                )
            message, tensors = decode(data, self._limits)
            stream: int = getattr(message, "stream", 0)
            if announced_stream is not None and announced_stream != stream:
                raise _Violation(
                    f"a message announced for stream {announced_stream} is for another"
                )
            # An open stream is not over: the usual case.
            if stream not in self._streams and self._is_crossing(message):
                return None
            next_state = self._judge(self._peer, message)
            self._advance(message, next_state)
            if type(message) in _NOTED and not self._concerns_caller(message, next_state):
                return None
            return message, tensors
        except _Violation as violation:
            error = RemoteProtocolError(
                f"The {self._peer.value} broke the wire protocol: {violation.problem}",
                fix="Check that both sides run compatible nearfar versions",
            )
        except RemoteProtocolError as exc:
            error = exc
        self.close(error)
        raise error

    def _concerns_caller(self, message: Message, state: State) -> bool:
        """Take note of what the connection itself asked or must answer."""
        kind = type(message)
        if kind is Token:
            return state not in _CANCELLED_STATES
        if isinstance(message, Ping):
            pong = Pong(id=message.id)
            self.outgoing.append(Outgoing(pong, *self.prepare(pong, is_own=True)))
            return False
        if isinstance(message, Pong):
            self._pings_sent.remove(message.id)
        return True

    def _is_crossing(self, message: Message) -> bool:
        stream: int = getattr(message, "stream", 0)
        if not 0 < stream <= MAX_STREAM:
            return False
        if self.role is Role.SERVER and stream > self._last_stream:
            # The client had not read our GoAway; it learns from there that nothing came of this.
            return isinstance(message, (*OPENERS, Cancel, Credit))
        return (self._peer, self._state_without_entry(stream), type(message)) in CROSSINGS

    # Judging, the same for both directions

    def _state_without_entry(self, stream: int) -> State:
        is_new = stream > self._highest_stream or stream in self._arriving
        return _IDLE if is_new else _ENDED

    def _judge(self, sender: Role, message: Message) -> State:
        """The state the message leads to; changes nothing.

        Raises:
            _Violation: The message is illegal.
        """
        kind = type(message)
        stream: int = getattr(message, "stream", 0)
        # `problem_in`, without a call of its own: this runs for every message, at both ends.
        check = CHECKS.get(kind)
        if not 0 <= stream <= MAX_STREAM or (check is not None and check(message) is not None):
            raise _Violation(problem_in(message) or kind.__name__)
        entry = self._streams.get(stream)
        if entry is not None:
            state = entry.state
        elif stream:
            state = self._state_without_entry(stream)
        else:
            state = self.state
        next_state = TRANSITIONS.get((sender, state, kind))
        if next_state is None:
            where = f"stream {stream}" if stream else "the connection"
            raise _Violation(
                f"{kind.__name__} is not allowed from the {sender.value} "
                f"while {where} is {state.value}"
            )
        if not stream:
            self._judge_connection(sender, message)
        elif self.state is not _OPEN and self.state is not _DRAINING:
            raise _Violation(f"streams cannot be used while the connection is {self.state.value}")
        elif entry is None:
            if len(self._streams) >= self._max_streams or self.state is _DRAINING:
                self._judge_opener()
        elif kind is not Result:
            self._judge_stream(entry, message)  # type: ignore[arg-type]
        return next_state

    def _judge_connection(self, sender: Role, message: Message) -> None:
        if isinstance(message, Ready):
            limits = self._limits
            if sender is self.role and (
                message.max_streams > limits.max_streams
                or message.max_message_bytes > limits.max_message_bytes
            ):
                raise _Violation(
                    "Ready promises more than this side's limits", "Announce the values of Limits"
                )
        elif isinstance(message, GoAway):
            if message.last_stream > self._last_stream:
                raise _Violation("GoAway.last_stream goes up")
            if sender is self.role and message.last_stream < max(self._streams, default=0):
                raise _Violation(
                    "GoAway.last_stream abandons an open stream",
                    "Name the highest open stream, or end it with Error first",
                )
        elif isinstance(message, Ping) and sender is self.role:
            if message.id in self._pings_sent or len(self._pings_sent) >= _MAX_UNANSWERED_PINGS:
                raise _Violation("Ping repeats an id, or too many are unanswered")
        elif isinstance(message, Pong) and sender is not self.role:
            self._judge_pong(message)

    def _judge_pong(self, message: Pong) -> None:
        if message.id not in self._pings_sent:
            raise _Violation("Pong answers no Ping")

    def _judge_opener(self) -> None:
        if self.role is Role.CLIENT and self.state is _DRAINING:
            raise _Violation("the server is going away", "Open a new connection")
        if len(self._streams) >= self._max_streams:
            raise _Violation(
                f"{self._max_streams} streams are open already",
                "Wait until one ends (can_open tells)",
            )

    def _judge_stream(self, entry: _Stream, message: StreamMessage) -> None:
        stream = message.stream
        if isinstance(message, Token):
            if message.index != entry.count:
                raise _Violation(
                    f"stream {stream} has token {message.index} where {entry.count} was due"
                )
            if entry.credit < 1:
                raise _Violation(f"stream {stream} has no credit left", "Wait for Credit")
        elif isinstance(message, Credit):
            if entry.credit + message.tokens > MAX_CREDIT:
                raise _Violation(f"stream {stream} would have more credit than {MAX_CREDIT}")
            if message.received > entry.count:
                raise _Violation(
                    f"stream {stream} had {entry.count} tokens, {message.received} are acknowledged"
                )
        elif isinstance(message, Fin):
            if message.count != entry.count:
                raise _Violation(
                    f"stream {stream} ends after {entry.count} tokens, Fin says {message.count}"
                )
            if message.digest != entry.hashed().digest():
                raise _Violation(f"the texts of stream {stream} do not match the digest of Fin")

    # Following

    def _advance(self, message: Message, next_state: State) -> None:
        if next_state is _ENDED:
            del self._streams[message.stream]  # type: ignore[union-attr]
        elif isinstance(next_state, ConnectionState):
            self._advance_connection(message, next_state)
        else:
            stream: int = message.stream  # type: ignore[union-attr]
            entry = self._streams.get(stream)
            if entry is not None:
                entry.state = next_state
                if isinstance(message, Token):
                    entry.add(message.text)
                elif isinstance(message, Credit):
                    entry.credit += message.tokens
                return
            credit = getattr(message, "credit", 0)  # `Generate` and `Resume` have it
            resumed_at = message.next_index if type(message) is Resume else None
            self._streams[stream] = _Stream(next_state, credit, resumed_at)
            if stream > self._highest_stream:
                self._highest_stream = stream
            else:
                self._arriving.discard(stream)

    def _advance_connection(self, message: Message, next_state: ConnectionState) -> None:
        self.state = next_state
        if isinstance(message, Ready):
            self._max_streams = min(self._limits.max_streams, message.max_streams)
            self.max_message_bytes = min(self._limits.max_message_bytes, message.max_message_bytes)
        elif isinstance(message, GoAway):
            self._last_stream = message.last_stream
            for stream in [s for s in self._streams if s > message.last_stream]:
                del self._streams[stream]
