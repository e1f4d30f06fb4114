"""One client's connection: an asyncio shell around `ServerSession`.

The session decides what is legal; this module moves bytes, starts and stops work, and turns errors
into messages. Nothing that a client sent, and no text of an unexpected exception, is ever logged:
an access line holds ids, sizes, durations, the served model and a status.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from cloud_runtime.answers import Answers, Reader, too_late
from cloud_runtime.auth import Authenticator
from cloud_runtime.caller import ANONYMOUS, Caller, NotAdmitted, permit, permit_model, visible
from cloud_runtime.models import ServedModels
from cloud_runtime.recent import RecentRuns
from cloud_runtime.relay import Completion, TokenRelay
from cloud_runtime.requests import OpenStream, access_log, deadline_of, work_of
from cloud_runtime.settings import ServerSettings
from nearfar import __version__
from nearfar.errors import (
    Cancelled,
    InvalidInput,
    LocalProtocolError,
    NearfarError,
    RemoteProtocolError,
    SecurityError,
)
from nearfar.secure.keys import KeyRing
from nearfar.session import Received, ServerSession
from nearfar.transport import TextReceived, Transport
from nearfar.websocket import DirectConnection
from nearfar.wire.checks import TICKET_BYTES
from nearfar.wire.codec import describe
from nearfar.wire.messages import (
    PROTOCOL_VERSION,
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
    Ready,
    Result,
    Resume,
    Token,
)
from nearfar.wire.retention import ticket_for

logger = logging.getLogger(__name__)

_CLOSE_NORMAL = 1000
_CLOSE_GOING_AWAY = 1001
_CLOSE_PROTOCOL_ERROR = 1002
_CLOSE_UNSUPPORTED = 1003
_CLOSE_POLICY = 1008
_CLOSE_INTERNAL = 1011

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What all connections of a server share."""

    models: ServedModels
    keys: KeyRing
    authenticator: Authenticator
    recent: RecentRuns
    answers: Answers
    settings: ServerSettings


class ServerWebsocket(DirectConnection, ServerConnection):
    """The server's end of a websocket."""


class Connection:
    """Serves one websocket from its key configuration to its close.

    Args:
        websocket: Open; nothing was sent on it yet.
        services: Shared with the other connections.
        address: Where the client comes from.
        on_ready: Called when the client is admitted.

    Attributes:
        number: Names the connection in logs.
        address: As given.
        key: Who the client is; `None` until it is admitted.
    """

    def __init__(
        self,
        websocket: ServerWebsocket,
        services: Services,
        *,
        address: str = "",
        on_ready: Callable[[], None],
    ) -> None:
        self.number = next(_numbers)
        self.address = address
        self.key: Caller | None = None
        self._websocket = websocket
        self._services = services
        self._settings = services.settings
        self._on_ready = on_ready
        self._session = ServerSession(
            keys=services.keys,
            limits=services.settings.limits,
            min_shaping=services.settings.min_shaping,
            now_s=time.time(),
        )
        self._loop = asyncio.get_running_loop()
        self._transport = Transport(
            websocket,
            self._session,
            self,
            message_timeout_s=self._settings.message_timeout_s,
            write_timeout_s=self._settings.write_timeout_s,
        )
        self._over: asyncio.Future[int] = self._loop.create_future()  # gets the close code
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: dict[int, OpenStream] = {}
        self._last_stream = 0
        self._is_draining = False
        self._drop_reason = ""
        self._resume_key = b""
        self._has_parted = False  # one side ended the connection on purpose

    async def run(self) -> None:
        """Serve until either side closes; raises nothing but `CancelledError`."""
        handshake_timer = self._loop.call_later(
            self._settings.handshake_timeout_s, self._drop_unless_ready
        )
        code = _CLOSE_NORMAL
        try:
            self._transport.start()
            code = await self._over
        finally:
            handshake_timer.cancel()
            await self._end_streams()
        with contextlib.suppress(ConnectionClosed):
            await self._transport.flush_all()
            await self._websocket.close(code)
        self._transport.close()
        access_log.info(
            "conn=%d closed code=%s key=%s%s",
            self.number,
            self._websocket.close_code,
            self.key.name if self.key else "-",
            f" ({self._drop_reason})" if self._drop_reason else "",
        )

    async def drain(self, reason: str = "shutdown") -> None:
        """Announce that no new streams are taken, wait for the open ones, then close."""
        is_first, self._is_draining = not self._is_draining, True
        with contextlib.suppress(ConnectionClosed):
            if self._session.is_ready and not self._session.is_closed:
                if is_first:
                    self._send(GoAway(last_stream=self._last_stream, reason=reason))
                while self._tasks:
                    await asyncio.wait(set(self._tasks))
                await self._transport.flush_all()
        await self.close()

    async def close(self) -> None:
        """Close the websocket as a server that goes away; `run` then returns."""
        self._has_parted = True
        with contextlib.suppress(ConnectionClosed):
            await self._websocket.close(_CLOSE_GOING_AWAY)

    def drop(self, reason: str) -> None:
        """Cut the connection without ceremony; a close handshake would need the peer's help."""
        self._drop_reason = reason
        self._websocket.transport.abort()

    async def withdraw(self) -> None:
        """End the connection because its API key is no longer accepted."""
        error = SecurityError(
            "The API key, or the issuer of the token, was withdrawn",
            fix="Ask the operator of this cloud for a new one",
        )
        self._has_parted = True
        with contextlib.suppress(ConnectionClosed):
            self._session.close(error)
            await self._transport.flush_all()
            await self._websocket.close(_CLOSE_POLICY)

    # Receiving.

    def on_received(self, received: Received) -> None:
        """A message came (`nearfar.transport.Owner`)."""
        self._dispatch(received)
        if self._session.is_closed:
            self._end(_CLOSE_NORMAL if self.key is not None else _CLOSE_POLICY)

    def on_failed(self, error: Exception) -> None:
        """The client broke a rule, or there is a bug here."""
        self._has_parted = True
        if isinstance(error, TextReceived):
            self._drop_reason = "text frame"
            self._end(_CLOSE_UNSUPPORTED)
        elif isinstance(error, RemoteProtocolError):
            self._end(_CLOSE_PROTOCOL_ERROR)
        elif isinstance(error, NearfarError):
            self._end(_CLOSE_POLICY)
        else:  # ends one connection, not the server
            self._has_parted = False
            _log_unexpected(error, f"conn={self.number}")
            self._end(_CLOSE_INTERNAL)

    def on_late(self, reason: str) -> None:
        """The client begins what it does not end."""
        self.drop(reason)

    def on_ended(self, _: ConnectionClosed) -> None:
        """The websocket has ended."""
        self._end(_CLOSE_NORMAL)

    def _end(self, code: int) -> None:
        if not self._over.done():
            self._over.set_result(code)

    def _dispatch(self, received: Received) -> None:
        message = received.message
        if isinstance(message, (Infer, Generate, Resume)):
            self._last_stream = message.stream
            stream = OpenStream(
                connection=self.number,
                stream=message.stream,
                kind=type(message).__name__.lower(),
                in_bytes=received.size_bytes,
                started_s=time.monotonic(),
            )
            self._streams[message.stream] = stream
            self._spawn(self._answer(stream, message, received.tensors))
        elif isinstance(message, Credit):
            found = self._streams.get(message.stream)
            if found is not None and found.on_credit is not None:
                found.on_credit(message.received)
        elif isinstance(message, Cancel):
            found = self._streams.get(message.stream)
            if found is not None:
                found.abort(Cancelled("The client cancelled the request"))
        elif isinstance(message, ListModels):
            self._last_stream = message.stream
            self._spawn(self._list(message))
        elif isinstance(message, Auth):
            self._admit(message)

    def _admit(self, message: Auth) -> None:
        try:
            self.key = self._services.authenticator.authenticate(
                message.token, proof=message.proof, exporter=self._session.exporter
            )
        except NearfarError as error:
            reason = error.__cause__ if isinstance(error.__cause__, NotAdmitted) else error.code
            access_log.info("conn=%d refused: %s", self.number, reason)
            self._session.close(error)
            return
        limits = self._settings.limits
        if self.key is not ANONYMOUS and self._settings.retention.keep_s > 0:
            self._resume_key = secrets.token_bytes(TICKET_BYTES)
        self._send(
            Ready(
                protocol_version=PROTOCOL_VERSION,
                server=f"nearfar/{__version__}",
                max_streams=limits.max_streams,
                max_message_bytes=limits.max_message_bytes,
                region=self._settings.region,
                resume_key=self._resume_key,
            )
        )
        self._on_ready()
        access_log.info("conn=%d open key=%s", self.number, self.key.name)

    # Answering.

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _list(self, request: ListModels) -> None:
        await self._transport.until_idle()
        offers = visible(self.key, self._services.models.offers())
        with contextlib.suppress(LocalProtocolError):  # the connection has ended meanwhile
            self._send(Models(stream=request.stream, models=offers))

    async def _answer(
        self, stream: OpenStream, request: Infer | Generate | Resume, tensors: Sequence[np.ndarray]
    ) -> None:
        """Run one request; whatever goes wrong becomes its `Error`."""
        status = "ok"
        try:
            permit(self.key, request)
            if not self._transport.is_writable:  # streams bound what can wait here
                await self._transport.until_idle()
            if isinstance(request, Infer):
                await self._infer(request, tensors, stream)
            elif isinstance(request, Generate):
                await self._generate(request, stream)
            else:
                await self._resume(request, stream)
        except ConnectionClosed:
            status = "disconnected"
        except asyncio.CancelledError:
            status = "disconnected"
            raise
        except NearfarError as error:
            status = error.code
            self._fail(stream, error)
        except Exception as error:  # noqa: BLE001 (one request's bug must not end the others)
            status = "internal"
            _log_unexpected(error, f"conn={self.number} stream={stream.stream}")
            self._fail(
                stream,
                NearfarError(
                    "The cloud runtime failed on this request",
                    fix="Tell its operator the time; the cause is in the server's log",
                ),
            )
        finally:
            del self._streams[stream.stream]
            stream.log(status)

    def _fail(self, stream: OpenStream, error: NearfarError) -> None:
        if self._session.is_open(stream.stream):
            message = Error(
                stream=stream.stream, code=error.code, problem=error.problem, fix=error.fix
            )
            stream.out_bytes += self._send(message)

    async def _infer(
        self, request: Infer, tensors: Sequence[np.ndarray], stream: OpenStream
    ) -> None:
        deadline = deadline_of(request)
        served = self._services.models.get(request.model, request.version, request.variant)
        stream.model = served.manifest.name
        work = work_of(request, tensors)
        key = (self._scope, request.request_id)
        run = self._services.recent.join(
            key,
            (request.model, request.version, request.variant, request.form, request.tensors),
            lambda ticket: served.infer(
                work, deadline=deadline, ticket=ticket, priority=request.priority
            ),
        )
        try:
            # The client gets its answer or its error in time, even while the engine, which cannot
            # be interrupted, still computes what nobody waits for any more.
            if stream.aborted is None:
                await self._until_settled(run.future, stream, deadline.timeout_s())
        finally:
            self._services.recent.leave(key, run)
        if stream.aborted is not None:
            raise stream.aborted
        if not run.future.done():
            raise too_late()
        outcome = run.future.result()
        stream.queue_ms, stream.compute_ms = outcome.queue_ms, outcome.compute_ms
        result = Result(
            stream=request.stream,
            tensors=describe(outcome.outputs),
            variant=served.variant.id,
            execution_provider=served.execution_provider,
            queue_ms=outcome.queue_ms,
            compute_ms=outcome.compute_ms,
        )
        try:
            stream.out_bytes = self._send(result, tuple(outcome.outputs.values()))
        except LocalProtocolError as error:
            raise InvalidInput(
                f"The result cannot be sent: {error.problem}",
                field="inputs",
                fix="Send a smaller batch",
            ) from error

    async def _until_settled(
        self, future: asyncio.Future[Any], stream: OpenStream, timeout_s: float | None
    ) -> None:
        """Wait for a shared future, the end of this stream, or the time, whichever is first."""
        settled: asyncio.Future[None] = self._loop.create_future()

        def settle(_: object = None) -> None:
            if not settled.done():
                settled.set_result(None)

        stream.on_abort = settle
        future.add_done_callback(settle)
        timer = None if timeout_s is None else self._loop.call_later(timeout_s, settle)
        try:
            await settled
        finally:
            future.remove_done_callback(settle)
            if timer is not None:
                timer.cancel()

    async def _generate(self, request: Generate, stream: OpenStream) -> None:
        deadline = deadline_of(request)
        served = self._services.models.get(request.model, request.version, request.variant)
        stream.model = served.manifest.name
        if stream.aborted is not None:
            raise stream.aborted
        speed = served.executor.tokens_per_s
        if speed is not None:
            self._session.expect_speed(speed)

        def start() -> TokenRelay:
            return served.generate(
                request.prompt, request.options, deadline=deadline, priority=request.priority
            )

        reader = self._services.answers.begin(
            (self._scope, request.request_id),
            request,
            self._ticket(request.request_id),
            start,
            served,
            deadline_s=deadline.timeout_s(),
        )
        await self._tell(reader, stream)

    async def _resume(self, request: Resume, stream: OpenStream) -> None:
        reader = self._services.answers.resume(
            (self._scope, request.request_id),
            request.ticket,
            request.next_index,
            new_ticket=self._ticket(request.request_id),
            permit=lambda model: permit_model(self.key, model),
        )
        stream.model = reader.served.manifest.name
        await self._tell(reader, stream, resumed_at=request.next_index)

    async def _tell(
        self, reader: Reader, stream: OpenStream, *, resumed_at: int | None = None
    ) -> None:
        """Send an answer from the session's next index on, as the client gives credit."""
        number, session = stream.stream, self._session
        stream.on_abort, stream.on_credit = reader.abort, reader.on_credit
        if stream.aborted is not None:
            reader.abort(stream.aborted)
        has_ended = False
        try:
            if resumed_at is not None:
                session.carry_over(number, reader.digest_at(resumed_at))
            while (outcome := reader.outcome(session.token_count(number))) is None:
                first = session.token_count(number)
                texts = await reader.read(first, session.credit(number))
                if not texts:
                    continue
                stream.tokens += len(texts)
                for index, text in enumerate(texts, first):
                    token = Token(stream=number, index=index, text=text)
                    stream.out_bytes += self._transport.send(token, flush=False)
                self._transport.flush()
                await self._transport.until_writable()
            if not isinstance(outcome, Completion):
                has_ended = True
                raise outcome
            stream.queue_ms = outcome.queue_ms
            stream.compute_ms = outcome.prefill_ms + outcome.decode_ms
            served = reader.served
            stream.out_bytes += self._send(
                Fin(
                    stream=number,
                    count=session.token_count(number),
                    digest=session.digest(number),
                    finish_reason=outcome.finish_reason,
                    usage=outcome.usage,
                    variant=served.variant.id,
                    execution_provider=served.execution_provider,
                    queue_ms=outcome.queue_ms,
                    prefill_ms=outcome.prefill_ms,
                    decode_ms=outcome.decode_ms,
                )
            )
        finally:
            # What was sent may never have arrived: even a finished answer is kept for a while.
            reader.leave(is_kept=not has_ended and self._may_return())

    def _ticket(self, request_id: bytes) -> bytes:
        return ticket_for(self._resume_key, request_id)

    def _may_return(self) -> bool:
        """Whether the client may come back for its answers, rather than having left for good."""
        if not self._resume_key or self._has_parted or self._is_draining:
            return False
        goodbye = self._websocket.protocol.close_rcvd
        return goodbye is None or goodbye.code != _CLOSE_NORMAL

    @property
    def _scope(self) -> str:
        """Whose request ids these are; clients without a key share nothing."""
        if self.key is None or not self.key.scope:
            return f"connection {self.number}"
        return self.key.scope

    def _send(self, message: Message, tensors: Sequence[np.ndarray] = ()) -> int:
        """Send a message, or queue it while the client reads too slowly; returns its size.

        Raises:
            LocalProtocolError: As `ServerSession.send`.
        """
        return self._transport.send(message, tensors)

    # Ending.

    def _drop_unless_ready(self) -> None:
        if not self._session.is_ready:
            self.drop("handshake took too long")

    async def _end_streams(self) -> None:
        for task in self._tasks:
            task.cancel()  # ends the work too: see the `finally` of each kind
        if self._tasks:
            await asyncio.wait(set(self._tasks))


def _log_unexpected(error: BaseException, where: str) -> None:
    """Log type and stack of an unexpected exception, but not its text.

    Messages of libraries quote their input (a tokenizer its text, ONNX Runtime its values), and
    inputs are private.
    """
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("unexpected %s, %s\n%s", type(error).__qualname__, where, frames)
