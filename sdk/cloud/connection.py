"""One open websocket to the cloud: matches answers to requests, fails as a whole.

All protocol lives in `nearfar.session.ClientSession`, and `nearfar.transport` moves its bytes.
Everything here runs on one event loop and without a task, so a request that is cancelled can never
leave half a message behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nearfar.errors import (
    Cancelled,
    CloudUnavailable,
    DeadlineExceeded,
    NearfarError,
    Overloaded,
    RemoteProtocolError,
    StreamInterrupted,
    from_code,
)
from nearfar.transport import TextReceived, Transport
from nearfar.units import Deadline
from nearfar.wire import messages as wire
from sdk.cloud import egress
from sdk.cloud.failures import translate

if TYPE_CHECKING:
    import numpy as np
    from websockets.exceptions import ConnectionClosed

    from nearfar.session import ClientSession, Received
    from nearfar.websocket import DirectConnection
    from sdk.cloud.egress import Permit
    from sdk.config import CloudConfig

#: Tokens the cloud may send ahead of the app: some seconds of answer, a few KB. Shaped traffic
#: grants more twice a second only.
CREDIT_TOKENS = 256
#: How long a goodbye may take; the peer gains nothing by stretching it.
_CLOSE_TIMEOUT_S = 2.0
#: Keepalive, below the 30 to 60 s after which home routers forget a quiet flow; an unanswered one
#: closes the connection (for networks that swallow packets; a reset is noticed at once).
_PING_INTERVAL_S, _PING_TIMEOUT_S = 20.0, 15.0
#: From the first fragment, or piece, of a message to its last; see `nearfar.transport`.
_MESSAGE_TIMEOUT_S = 30.0


class TensorReply:
    """The answer to `Connection.infer`, with the sizes it took on the wire.

    Attributes:
        message: The server's `Result`.
        outputs: Output name to array, as the model gave them; they belong to the caller.
        bytes_received: Sealed size of the answer.
    """

    __slots__ = ("bytes_received", "message", "outputs")

    def __init__(
        self,
        message: wire.Result,
        outputs: dict[str, np.ndarray],
        *,
        bytes_received: int,
    ) -> None:
        self.message = message
        self.outputs = outputs
        self.bytes_received = bytes_received


class Stream:
    """One request on a connection: what came for it, and what ended it.

    Attributes:
        connection: Where it is.
        fin: The server's last word on a generation that ended well.
        received_tokens: Tokens of the answer that arrived so far, also on earlier connections.
    """

    def __init__(self, connection: Connection, stream_id: int, permit: Permit | None) -> None:
        self.connection = connection
        self._id = stream_id
        self._permit = permit
        self._arrived: deque[Received] = deque()
        self._waiter: asyncio.Future[bool] | None = None
        self._error: NearfarError | None = None
        self._ended = False
        self._ungranted_tokens = 0
        self.fin: wire.Fin | None = None
        self.received_tokens = 0
        self._first_index = 0
        self._digest_before: hashlib._Hash = hashlib.sha256()  # of the tokens before `_first_index`

    def continues(self, lost: Stream) -> None:
        """Make this stream, just opened by `Resume`, the continuation of one that was lost."""
        self.received_tokens = self._first_index = lost.received_tokens
        self._digest_before = lost.digest_so_far()
        self.connection.carry_over(self._id, self._digest_before)

    def digest_so_far(self) -> hashlib._Hash:
        """Running SHA-256 of everything received; also when the connection has ended."""
        if self.received_tokens == self._first_index:
            return self._digest_before
        return self.connection.digest_state(self._id)

    def deliver(self, received: Received) -> None:
        """Take a message for this stream (from the connection's reader)."""
        message = received.message
        if isinstance(message, wire.Error):
            self.fail(from_code(message.code, message.problem, message.fix))
            return
        if isinstance(message, wire.Token):
            self.received_tokens += 1
        elif isinstance(message, wire.Fin):
            self.fin = message
        self._arrived.append(received)
        if not isinstance(message, wire.Token):
            self._ended = True
        self._rouse(is_news=True)

    def fail(self, error: NearfarError) -> None:
        """End the stream with an error; what arrived before is still given out first."""
        if not self._ended:
            self._error = error
            self._ended = True
            self._rouse(is_news=True)

    async def reply(self, deadline: Deadline) -> Received:
        """Wait for the one answer of a request that is not streamed.

        Raises:
            DeadlineExceeded: It did not come in time; the cloud was told to stop.
            NearfarError: What the server said, or how the connection failed.
        """
        await self._wait(deadline)
        if self._arrived:
            return self._arrived.popleft()
        raise self._error or CloudUnavailable("The connection was closed")

    async def tokens(self, deadline: Deadline) -> list[wire.Token]:
        """Wait for tokens; gives all that have come, and grants the cloud credit for as many.

        Returns:
            At least one token, or an empty list when `fin` is set and all were given out.

        Raises:
            DeadlineExceeded: The next one did not come in time; the cloud was told to stop.
            StreamInterrupted: The answer was cut before its `Fin`.
            NearfarError: What the server said.
        """
        if self._ungranted_tokens >= CREDIT_TOKENS // 2 and not self._ended:
            # Credit follows what the app consumed: asking for more proves that it did.
            self._send(
                wire.Credit(
                    stream=self._id,
                    tokens=self._ungranted_tokens,
                    received=self.received_tokens,
                )
            )
            self._ungranted_tokens = 0
        await self._wait(deadline)
        batch = [r.message for r in self._arrived if isinstance(r.message, wire.Token)]
        self._arrived.clear()
        self._ungranted_tokens += len(batch)
        if batch or self.fin is not None:
            return batch
        error = self._error or CloudUnavailable("The connection was closed")
        if isinstance(error, CloudUnavailable):
            raise StreamInterrupted(
                error.problem,
                received_tokens=self.received_tokens,
                fix=error.fix,
            ) from error
        raise error

    def cancel(self) -> None:
        """Tell the cloud to stop, unless it has ended; idempotent."""
        if not self._ended:
            self.fail(Cancelled("The request was cancelled"))
            with contextlib.suppress(NearfarError):  # a dead connection has nothing to stop
                self._send(wire.Cancel(stream=self._id))
        self.connection.forget(self._id)

    def _send(self, message: wire.ClientMessage) -> None:
        self.connection.send(message, permit=self._permit)

    async def _wait(self, deadline: Deadline) -> None:
        # A bare future and a timer: before Python 3.12 `wait_for` makes a task for each wait, which
        # takes the loop three turns instead of one.
        loop = asyncio.get_running_loop()
        while not self._arrived and not self._ended:
            self._waiter = loop.create_future()
            timeout_s = deadline.timeout_s()
            timer = None
            if timeout_s is not None:
                timer = loop.call_later(timeout_s, lambda: self._rouse(is_news=False))
            try:
                is_news = await self._waiter
            except asyncio.CancelledError:
                self.cancel()
                raise
            finally:
                if timer is not None:
                    timer.cancel()
            if not is_news:
                self.cancel()
                raise DeadlineExceeded(
                    "The deadline passed while the cloud was working",
                    tried=("cloud",),
                    fix="Allow more time with deadline_ms, or ask for a shorter answer",
                )

    def _rouse(self, *, is_news: bool) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(is_news)


class Connection:
    """One websocket and its secure session. Make one with `Connection.open`.

    Attributes:
        ready: The server's `Ready`.
        rtt_ms: Last measured round trip; `None` before the first.
        is_leaving: Whether the server said that it takes no new requests.
        error: Why the connection ended; `None` while it lives.
    """

    def __init__(
        self,
        websocket: DirectConnection,
        session: ClientSession,
        url: str,
        on_end: Callable[[Connection], None] | None = None,
    ) -> None:
        self._websocket = websocket
        self._session = session
        self._url = url
        self._on_end = on_end
        self._streams: dict[int, Stream] = {}
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pings: dict[int, tuple[float, asyncio.Future[float]]] = {}
        self._next_ping = 1
        self.ready: wire.Ready | None = None
        self.rtt_ms: float | None = None
        self.is_leaving = False
        self._line: deque[asyncio.Future[None]] = deque()
        self.error: NearfarError | None = None
        self._goodbye: asyncio.Task[None] | None = None
        self._transport = Transport(websocket, session, self, message_timeout_s=_MESSAGE_TIMEOUT_S)
        self._transport.start()

    @classmethod
    async def open(
        cls,
        config: CloudConfig,
        *,
        client: str,
        timeout_s: float,
        on_end: Callable[[Connection], None] | None = None,
    ) -> Connection:
        """Connect, prove the server's identity, authenticate.

        Args:
            config: Address, pin, credentials.
            client: Name and version of this client, for the server's log.
            timeout_s: For all of it together.
            on_end: Told once when the connection ends, however it does.

        Raises:
            ConfigError: The pin, the CA file or the credentials cannot be used.
            SecurityError: Certificate, identity or credentials were not accepted.
            CloudUnavailable: It cannot be reached.
        """
        from websockets.asyncio.client import connect

        from nearfar.session import ClientSession, max_sealed_bytes
        from nearfar.wire.limits import Limits
        from sdk.cloud.credentials import credentials_of, verifier_of
        from sdk.cloud.websocket import ClientWebsocket

        limits = Limits()
        ends_s = time.monotonic() + timeout_s
        try:
            credentials = await asyncio.wait_for(credentials_of(config), timeout_s)
        except (TimeoutError, asyncio.TimeoutError) as exc:
            raise translate(exc, config.url, during="connect") from exc
        session = ClientSession(
            pin=config.pins(time.time()),
            credentials=credentials,
            verifier=await verifier_of(config),
            client=client,
            limits=limits,
            shaping=config.shaping,
            now_s=time.time(),
        )
        try:
            websocket = await connect(
                config.url,
                create_connection=ClientWebsocket,
                ssl=tls_context(config),
                compression=None,  # ciphertext does not compress
                max_size=max_sealed_bytes(limits),
                open_timeout=timeout_s,
                ping_interval=_PING_INTERVAL_S,
                ping_timeout=_PING_TIMEOUT_S,
                close_timeout=_CLOSE_TIMEOUT_S,
            )
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            raise translate(exc, config.url, during="connect") from exc
        assert isinstance(websocket, ClientWebsocket)
        connection = cls(websocket, session, config.url, on_end)
        try:
            left_s = max(0.01, ends_s - time.monotonic())
            await asyncio.wait_for(asyncio.shield(connection._opened), left_s)
        except BaseException as exc:
            await connection.close()
            if isinstance(exc, (NearfarError, asyncio.CancelledError)):
                raise
            raise translate(exc, config.url, during="connect") from exc
        return connection

    @property
    def is_usable(self) -> bool:
        """Whether a request may be sent: alive, not draining."""
        return self.error is None and self.ready is not None and not self._session.is_closed

    @property
    def can_open(self) -> bool:
        """Whether one more stream may be opened now."""
        return self.is_usable and self._session.can_open

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting for anything."""
        return not self._streams

    @property
    def in_flight(self) -> int:
        """How many requests are open."""
        return len(self._streams)

    def send(
        self,
        message: wire.ClientMessage,
        tensors: Sequence[np.ndarray] = (),
        *,
        permit: Permit | None = None,
    ) -> int:
        """Queue one message through the door in `sdk.cloud.egress`; returns its sealed size.

        Raises:
            PolicyDenied: No permit, or this connection is not what policy demands.
            CloudUnavailable: The connection has ended.
            LocalProtocolError: The message is not allowed now, or too large.
        """
        if self.error is not None:
            raise self.error
        return egress.send(self._transport, permit, message, tensors, self._session, self.ready)

    def open_stream(
        self,
        make: type[wire.ListModels | wire.Infer | wire.Generate | wire.Resume],
        fields: dict[str, object],
        tensors: Sequence[np.ndarray] = (),
        *,
        permit: Permit | None = None,
    ) -> Stream:
        """Send a request and return the stream on which its answer comes.

        Raises:
            Overloaded: As many requests are open as the server allows.
            PolicyDenied, CloudUnavailable, LocalProtocolError: As `send`.
        """
        if self.error is None and not self._session.can_open:
            raise Overloaded(
                f"{self._url} takes no further request on this connection",
                fix="Wait for an answer, then ask again",
            )
        stream_id = self._session.next_stream
        stream = Stream(self, stream_id, permit)
        self.send(
            make(stream=stream_id, **fields),  # type: ignore[arg-type]
            tensors,
            permit=permit,
        )
        self._streams[stream_id] = stream
        return stream

    def resume(self, lost: Stream, *, request_id: bytes, ticket: bytes, permit: Permit) -> Stream:
        """Take up, on this connection, an answer whose own connection was lost.

        Args:
            lost: Its stream there; everything that came on it was read.
            request_id: Of the `Generate`.
            ticket: From `nearfar.wire.retention.ticket_for`.
            permit: That of the request.

        Returns:
            A stream that begins with the token that `lost` wanted next, or with `ResumeMissed`.

        Raises:
            Overloaded, CloudUnavailable: As `open_stream`.
        """
        index = lost.received_tokens
        stream = self.open_stream(
            wire.Resume,
            {
                "request_id": request_id,
                "ticket": ticket,
                "next_index": index,
                "credit": CREDIT_TOKENS,
            },
            permit=permit,
        )
        stream.continues(lost)
        return stream

    def digest_state(self, stream_id: int) -> hashlib._Hash:
        """Running SHA-256 of a stream's texts; also after the connection was lost."""
        return self._session.digest_state(stream_id)

    def carry_over(self, stream_id: int, digest: hashlib._Hash) -> None:
        """Give a stream opened by `Resume` the digest of what came before it."""
        self._session.carry_over(stream_id, digest)

    async def room(self, deadline: Deadline) -> None:
        """Wait in line until the server may take one more request, or until it never will.

        Raises:
            DeadlineExceeded: The deadline passed first.
            CloudUnavailable: The connection ended.
        """
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(place)
        try:
            await asyncio.wait_for(place, deadline.timeout_s())
        except (TimeoutError, asyncio.TimeoutError):
            raise DeadlineExceeded(
                f"The deadline passed while {self.in_flight} earlier requests were open",
                tried=("cloud",),
                fix="Allow more time with deadline_ms, or ask for less at once",
            ) from None
        finally:
            if not place.done() or place.cancelled():
                with contextlib.suppress(ValueError):
                    self._line.remove(place)

    def _let_in(self) -> None:
        """Wake as many as there is room for; a late-comer may be faster, so they look again."""
        if self.error is not None or self.is_leaving:
            woken = len(self._line)
        else:
            woken = min(len(self._line), self._room_left())
        for _ in range(woken):
            place = self._line.popleft()
            if not place.done():
                place.set_result(None)

    def _room_left(self) -> int:
        if not self.can_open or self.ready is None:
            return 0
        return self.ready.max_streams - len(self._session.open_streams)

    def forget(self, stream_id: int) -> None:
        """Stop listening on a stream."""
        self._streams.pop(stream_id, None)

    async def ping(self, timeout_s: float) -> float:
        """Measure the round trip through both ends' whole stack, in milliseconds.

        Raises:
            CloudUnavailable: No answer came.
        """
        number = self._next_ping
        self._next_ping += 1
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._pings[number] = (time.perf_counter(), future)
        try:
            self.send(wire.Ping(id=number))
            self.rtt_ms = await asyncio.wait_for(future, timeout_s)
        except (TimeoutError, asyncio.TimeoutError) as exc:
            raise translate(exc, self._url) from exc
        finally:
            self._pings.pop(number, None)
        return self.rtt_ms

    async def close(self) -> None:
        """Say goodbye; idempotent. Open streams fail."""
        self._end(Cancelled("The client was closed before the answer was complete"))
        if self._goodbye is not None:
            await self._goodbye

    # Called by the transport (`nearfar.transport.Owner`)

    def on_received(self, received: Received) -> None:
        """A message came."""
        self._dispatch(received)
        if self._line:
            self._let_in()

    def on_failed(self, error: Exception) -> None:
        """The cloud broke a rule."""
        if isinstance(error, TextReceived):
            error = RemoteProtocolError(f"{self._url} sent text instead of bytes")
        self._end(translate(error, self._url))

    def on_late(self, _: str) -> None:
        """The cloud began a message and does not end it."""
        self._end(
            CloudUnavailable(f"{self._url} sent a message too slowly", fix="Check the network")
        )
        self._websocket.transport.abort()

    def on_ended(self, problem: ConnectionClosed) -> None:
        """The websocket has ended."""
        self._end(translate(problem, self._url))

    def _dispatch(self, received: Received) -> None:
        message = received.message
        if isinstance(message, wire.Ready):
            self.ready = message
            if not self._opened.done():
                self._opened.set_result(None)
        elif isinstance(message, wire.Pong):
            waiting = self._pings.get(message.id)
            if waiting is not None and not waiting[1].done():
                waiting[1].set_result((time.perf_counter() - waiting[0]) * 1000.0)
        elif isinstance(message, wire.GoAway):
            self.is_leaving = True
            for stream_id in [s for s in self._streams if s > message.last_stream]:
                self._streams.pop(stream_id).fail(
                    CloudUnavailable(f"{self._url} is going away: {message.reason}".rstrip(": "))
                )
        elif isinstance(message, wire.Error) and message.stream == 0:
            self._end(from_code(message.code, message.problem, message.fix))
        else:
            stream_id = getattr(message, "stream", 0)
            stream = self._streams.get(stream_id)
            if stream is not None:
                if not isinstance(message, wire.Token):
                    self.forget(stream_id)
                stream.deliver(received)

    def _end(self, error: NearfarError) -> None:
        """Everything that waits for this connection fails with its first error."""
        if self.error is not None:
            return
        self.error = error
        if not self._opened.done():
            self._opened.set_exception(error)
            self._opened.exception()  # mark as seen: nobody may be waiting any more
        for _, future in self._pings.values():
            if not future.done():
                future.set_exception(error)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)
        self._let_in()
        if self._on_end is not None:
            self._on_end(self)
        self._goodbye = asyncio.ensure_future(self._part())

    async def _part(self) -> None:
        """Close the websocket; the server's half may still come, but nobody waits for it."""
        self._transport.flush()  # a last Cancel or Credit
        self._transport.close()
        with contextlib.suppress(Exception):  # whatever the goodbye meets, the socket is gone
            await self._websocket.close()


def tls_context(config: CloudConfig) -> ssl.SSLContext:
    """TLS 1.3 with certificate and host name checks, trusting `ca_file` or the system's CAs.

    Raises:
        ConfigError: The CA file cannot be read.
    """
    from nearfar.errors import ConfigError

    try:
        context = ssl.create_default_context(
            cafile=str(config.ca_file) if config.ca_file is not None else None
        )
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(
            f"The CA file {config.ca_file} of cloud {config.name!r} cannot be read: {exc}",
            field="ca_file",
            fix="Give the path of a PEM file, such as ca.pem of nearfar cloud init",
        ) from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
