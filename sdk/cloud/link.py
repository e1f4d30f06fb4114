"""The link to one cloud: connects when first needed, reconnects, and knows how good it is.

A `CloudLink` belongs to one event loop. Its `state` may be read from any thread: it is an
immutable value that is replaced as a whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from nearfar import __version__
from nearfar.errors import (
    DeadlineExceeded,
    InvalidInput,
    LocalProtocolError,
    NearfarError,
    RemoteProtocolError,
)
from nearfar.units import Deadline
from nearfar.wire import messages as wire
from sdk.cloud.connection import CREDIT_TOKENS, Connection, Stream, TensorReply
from sdk.cloud.failures import translate
from sdk.cloud.resumption import ResumableStream

if TYPE_CHECKING:
    import numpy as np

    from nearfar.generation import GenerationOptions, Prompt
    from sdk.cloud.egress import Permit
    from sdk.config import CloudConfig

logger = logging.getLogger(__name__)

#: TCP, TLS, websocket, secure channel, authentication and the list of models, together. Six round
#: trips: 5 s bears a bad mobile link; a dead one is noticed soon enough to answer on the device.
CONNECT_TIMEOUT_S = 5.0
#: How long closing waits for what was cancelled, and how often it cancels.
_CANCEL_S, _MOST_CANCELS = 0.2, 5
#: Between measurements of the round trip on a connection in use.
_RTT_INTERVAL_S = 5.0
_RTT_TIMEOUT_S = 10.0
#: After this time the list of models is asked for again before it is used.
_OFFERS_LIFETIME_S = 300.0


class LinkState(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about the link; a snapshot.

    Attributes:
        is_connected: Whether a request could be sent at once.
        offers: What the cloud serves, by name; `None` before the first connection.
        offers_at_s: When `offers` came, `time.monotonic()`.
        region: Where the cloud says it stands; `None` when it does not say.
        server: Name and version of the cloud; ``""`` before the first connection.
        rtt_ms: Round trip; `None` before the first measurement.
        upload_bytes_per_s: Rough bandwidth towards the cloud; `None` when not measured.
        in_flight: Requests of this client that are open.
    """

    is_connected: bool = False
    offers: Mapping[str, wire.ModelOffer] | None = None
    offers_at_s: float = 0.0
    region: str | None = None
    server: str = ""
    rtt_ms: float | None = None
    upload_bytes_per_s: float | None = None
    in_flight: int = 0


class CloudLink:
    """Requests to one cloud over one websocket, multiplexed.

    Args:
        config: Address, pin, credentials.

    Attributes:
        on_round_trip: Told every measured round trip, in milliseconds.
        on_reached: Told how each attempt to connect ended; `None` for well.
        reaching_since_s: Since when a connection is being made, `time.monotonic()`; `None` when
            none is.
        is_away: Whether the last attempt to connect failed.
    """

    def __init__(self, config: CloudConfig) -> None:
        self.config = config
        self.state = LinkState()
        self.on_round_trip: Callable[[float], None] | None = None
        self.on_reached: Callable[[NearfarError | None], None] | None = None
        self.reaching_since_s: float | None = None
        self.is_away = False
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[Connection] | None = None
        self._draining: list[Connection] = []
        self._keeper: asyncio.Task[None] | None = None
        self._rtt_at_s = 0.0
        self._is_closed = False

    @property
    def in_flight(self) -> int:
        """How many requests are open there now, streams included."""
        connection = self._connection
        return 0 if connection is None else connection.in_flight

    @property
    def is_leaving(self) -> bool:
        """Whether the cloud said that it takes no new requests."""
        connection = self._connection
        return connection is not None and connection.is_leaving

    def at(self, _: str) -> CloudLink:
        """The link to the endpoint of that name: a client with one cloud has no other."""
        return self

    async def connect(self, deadline: Deadline, _: Sequence[str] = ()) -> LinkState:
        """Make sure that a request can be sent; nothing of any request leaves.

        Callers that come while a connection is being made share it.

        Raises:
            DeadlineExceeded: The deadline passed first; connecting goes on for the next request.
            SecurityError, ConfigError, CloudUnavailable: As `Connection.open`.
        """
        await self._usable(deadline)
        return self.state

    def reach(self, _: Sequence[str] = ()) -> None:
        """Begin to connect; nobody waits for it."""
        if not self.state.is_connected and not self._is_closed:
            self._begin()

    async def refresh(self, deadline: Deadline) -> LinkState:
        """Ask the cloud again what it serves.

        Raises:
            As `connect`.
        """
        connection = await self._usable(deadline)
        await self._list_models(connection, deadline)
        return self.state

    async def infer(
        self,
        permit: Permit,
        *,
        model: str,
        form: wire.InputForm,
        tensors: Mapping[str, np.ndarray],
        deadline: Deadline,
        version: str | None = None,
        variant: str | None = None,
        priority: int = 5,
        request_id: bytes | None = None,
        trace: bytes = b"",
    ) -> TensorReply:
        """Run one batch on the cloud.

        Args:
            request_id: 16 bytes; the same for a repetition, which the cloud then computes only
                once. `None` draws one.
            trace: `Infer.trace`.

        Raises:
            DeadlineExceeded, CloudUnavailable, Overloaded, InvalidInput: Typed; see `Stream`.
        """
        from nearfar.wire.codec import describe, named

        arrays = tuple(tensors.values())
        stream, connection = await self._open(
            wire.Infer,
            {
                "request_id": request_id or os.urandom(16),
                "model": model,
                "tensors": describe(tensors),
                "form": form,
                "version": version,
                "variant": variant,
                "priority": priority,
                "trace": trace,
            },
            arrays,
            permit=permit,
            deadline=deadline,
        )
        started_s = time.perf_counter()
        try:
            received = await stream.reply(deadline)
        finally:
            self._note_in_flight(connection)
        message = received.message
        if not isinstance(message, wire.Result):
            raise RemoteProtocolError(f"{self.config.url} answered an Infer with another message")
        elapsed_s = time.perf_counter() - started_s
        self._measure_bandwidth(elapsed_s, permit.bytes_sent + received.size_bytes, message)
        # Received tensors are views into one websocket message; copies let it go and are writable.
        outputs = {
            name: array.copy() for name, array in named(message.tensors, received.tensors).items()
        }
        return TensorReply(message, outputs, bytes_received=received.size_bytes)

    async def generate(
        self,
        permit: Permit,
        *,
        model: str,
        prompt: Prompt,
        options: GenerationOptions,
        deadline: Deadline,
        version: str | None = None,
        variant: str | None = None,
        priority: int = 5,
        request_id: bytes | None = None,
        trace: bytes = b"",
    ) -> ResumableStream:
        """Begin an answer on the cloud; its tokens come through the returned stream.

        Args:
            request_id: As for `infer`.
            trace: As for `infer`.

        Raises:
            DeadlineExceeded, CloudUnavailable, Overloaded: It could not be begun.
        """
        request_id = request_id or os.urandom(16)
        fields: dict[str, object] = {
            "request_id": request_id,
            "model": model,
            "prompt": prompt,
            "options": options,
            "credit": CREDIT_TOKENS,
            "version": version,
            "variant": variant,
            "priority": priority,
            "trace": trace,
        }

        def again(connection: Connection) -> Stream:
            fields["deadline_ms"] = deadline.remaining_ms()
            return connection.open_stream(wire.Generate, fields, permit=permit)

        stream, _ = await self._open(wire.Generate, fields, permit=permit, deadline=deadline)
        return ResumableStream(stream, permit, request_id, connect=self._with_room, again=again)

    async def ping(self, timeout_s: float = _RTT_TIMEOUT_S) -> float:
        """Measure the round trip now, in milliseconds; connects if need be."""
        connection = await self._usable(Deadline.after_ms(CONNECT_TIMEOUT_S * 1000))
        return await self._measure_round_trip(connection, timeout_s)

    async def close(self) -> None:
        """Close all connections; idempotent. Open requests fail with `Cancelled`."""
        self._is_closed = True
        tasks = [task for task in (self._keeper, self._connecting) if task is not None]
        # uvloop may lose a cancellation that comes while a connection is made: once more, then.
        for _ in range(_MOST_CANCELS):
            pending = [task for task in tasks if not task.done()]
            if not pending:
                break
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=_CANCEL_S)
        connections = [c for c in (self._connection, *self._draining) if c is not None]
        self._connection, self._draining = None, []
        await asyncio.gather(*(c.close() for c in connections), return_exceptions=True)
        self._publish(is_connected=False, in_flight=0)

    async def _usable(self, deadline: Deadline) -> Connection:
        if self._is_closed:
            raise InvalidInput(
                "This client is closed", field="client", fix="Make a new one, or close it later"
            )
        connection = self._connection
        if connection is not None and connection.is_usable and not connection.is_leaving:
            return connection
        connecting = self._begin()
        try:
            return await asyncio.wait_for(asyncio.shield(connecting), deadline.timeout_s())
        except (TimeoutError, asyncio.TimeoutError):
            raise DeadlineExceeded(
                f"The deadline passed while connecting to {self.config.url}",
                tried=("cloud",),
                fix="Call warm_up() before the first request, or allow more time",
            ) from None

    def _begin(self) -> asyncio.Task[Connection]:
        """The attempt to connect that is under way; all who want a connection share it."""
        if self._connecting is None or self._connecting.done():
            self.reaching_since_s = time.monotonic()
            self._connecting = asyncio.ensure_future(self._reconnect())
            self._connecting.add_done_callback(self._reached)
        return self._connecting

    def _reached(self, task: asyncio.Task[Connection]) -> None:
        self.reaching_since_s = None
        # Reading the error also keeps asyncio from reporting it when every caller has given up.
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            return
        self.is_away = error is not None
        if self.on_reached is not None and (error is None or isinstance(error, NearfarError)):
            self.on_reached(error)

    async def _reconnect(self) -> Connection:
        old, self._connection = self._connection, None
        if old is not None:
            await self._retire(old)
        started_s = time.monotonic()
        connection = await Connection.open(
            self.config,
            client=f"nearfar-python/{__version__}",
            timeout_s=CONNECT_TIMEOUT_S,
            on_end=self._lost,
        )
        try:
            left = Deadline(started_s + CONNECT_TIMEOUT_S)
            await self._list_models(connection, left)
            await self._measure_round_trip(connection, left.remaining_s())
        except DeadlineExceeded as exc:
            await connection.close()
            raise translate(TimeoutError(), self.config.url) from exc
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        ready = connection.ready
        assert ready is not None
        self._publish(is_connected=True, region=ready.region or None, server=ready.server)
        logger.info("connected to cloud %s in %.0f ms, round trip %.1f ms", self.config.name,
                    (time.monotonic() - started_s) * 1000.0, connection.rtt_ms or 0.0)  # fmt: skip
        return connection

    async def _retire(self, old: Connection) -> None:
        """A server that goes away still answers what it took; wait for that in the background."""
        self._draining = [c for c in self._draining if c.is_usable and not c.is_idle]
        if old.is_usable and not old.is_idle:
            self._draining.append(old)
        else:
            await old.close()

    async def _list_models(self, connection: Connection, deadline: Deadline) -> None:
        stream = connection.open_stream(wire.ListModels, {})
        received = await stream.reply(deadline)
        message = received.message
        if not isinstance(message, wire.Models):
            raise RemoteProtocolError(f"{self.config.url} did not say which models it serves")
        offers = {offer.manifest.name: offer for offer in message.models}
        self._publish(offers=offers, offers_at_s=time.monotonic())

    async def _measure_round_trip(self, connection: Connection, timeout_s: float) -> float:
        rtt_ms = await connection.ping(timeout_s)
        self._rtt_at_s = time.monotonic()
        self._publish(rtt_ms=rtt_ms)
        if self.on_round_trip is not None:
            self.on_round_trip(rtt_ms)
        return rtt_ms

    def _upkeep(self, connection: Connection) -> None:
        """Measure the round trip and ask for the models again, beside requests and when it is due.

        An idle link is left alone: on a mobile device every packet wakes the radio.
        """
        if self._keeper is not None and not self._keeper.done():
            return
        now_s = time.monotonic()
        rtt_due = now_s - self._rtt_at_s >= _RTT_INTERVAL_S
        offers_due = now_s - self.state.offers_at_s >= _OFFERS_LIFETIME_S
        if rtt_due or offers_due:
            self._keeper = asyncio.ensure_future(self._keep_up(connection, offers_due))

    async def _keep_up(self, connection: Connection, offers_due: bool) -> None:
        with contextlib.suppress(NearfarError):  # the connection itself reports its end
            await self._measure_round_trip(connection, _RTT_TIMEOUT_S)
            if offers_due:
                await self._list_models(connection, Deadline.after_ms(_RTT_TIMEOUT_S * 1000))

    def _lost(self, connection: Connection) -> None:
        """Called by a connection when it ends."""
        if connection is self._connection:
            logger.info("connection to cloud %s ended: %s", self.config.name, connection.error)
            self._publish(is_connected=False, in_flight=0)

    async def _open(
        self,
        make: type[wire.Infer] | type[wire.Generate],
        fields: dict[str, object],
        tensors: Sequence[np.ndarray] = (),
        *,
        permit: Permit,
        deadline: Deadline,
    ) -> tuple[Stream, Connection]:
        """Send a request, as soon as the server takes one more."""
        connection = await self._with_room(deadline)
        fields["deadline_ms"] = deadline.remaining_ms()
        try:
            stream = connection.open_stream(make, fields, tensors, permit=permit)
        except LocalProtocolError as exc:
            # The one refusal a caller can cause here is a message beyond the agreed size.
            raise LocalProtocolError(
                exc.problem, fix=exc.fix or "Send a smaller batch or a shorter prompt"
            ) from exc
        self._note_in_flight(connection)
        self._upkeep(connection)
        return stream, connection

    async def _with_room(self, deadline: Deadline) -> Connection:
        """A connection on which one more request may be sent at once."""
        connection = await self._usable(deadline)
        while not connection.can_open:
            await connection.room(deadline)
            connection = await self._usable(deadline)
        return connection

    def _measure_bandwidth(self, elapsed_s: float, size_bytes: int, result: wire.Result) -> None:
        rtt_s = (self.state.rtt_ms or 0.0) / 1000.0
        moving_s = elapsed_s - (result.queue_ms + result.compute_ms) / 1000.0 - rtt_s
        if size_bytes < 64 * 1024 or moving_s <= 0.001:
            return  # too small to tell bandwidth from latency
        rate, old = size_bytes / moving_s, self.state.upload_bytes_per_s
        self._publish(upload_bytes_per_s=rate if old is None else 0.7 * old + 0.3 * rate)

    def _note_in_flight(self, connection: Connection) -> None:
        if connection is self._connection:
            self._publish(in_flight=connection.in_flight)

    def _publish(self, **changes: object) -> None:
        self.state = msgspec.structs.replace(self.state, **changes)
