"""A streamed answer that outlives its connection.

`ResumableStream` stands where a `Stream` stands and reads one. When that one's connection is lost,
it connects again and takes the answer up where it stopped; whoever reads sees one answer, only a
pause. When the cloud no longer keeps the answer, or cannot be reached soon, the stream fails as it
would have at once, and the caller goes on elsewhere with the text it has.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from nearfar.errors import (
    Cancelled,
    CloudUnavailable,
    DeadlineExceeded,
    NearfarError,
    ResumeMissed,
    StreamInterrupted,
)
from nearfar.eventloop import mark_seen
from nearfar.units import Deadline
from nearfar.wire import messages as wire
from nearfar.wire.retention import ticket_for

if TYPE_CHECKING:
    from sdk.cloud.connection import Connection, Stream
    from sdk.cloud.egress import Permit

logger = logging.getLogger(__name__)

#: Pauses before the tries to connect again. A reset connection is mostly back at the first; where
#: nothing listens, all three have failed after 0.4 s, and the device can take over.
_PAUSES_S = (0.0, 0.1, 0.3)
#: For all tries together: after that, another route is sooner there than this one.
_WITHIN_S = 6.0


class ResumableStream:
    """One generation on the cloud, across connections.

    Args:
        stream: As it was opened.
        permit: For this request; taking up an answer sends nothing of its content.
        request_id: Of the `Generate`.
        connect: Gives a connection that can be used, by a deadline.
        again: Sends the same `Generate`, with the same id, on a connection.

    Attributes:
        resumed: How often it went on on another connection.
        away_ms: How long it was without one, in sum.
        pause_s: The longest wait for tokens after the first ones.
    """

    def __init__(
        self,
        stream: Stream,
        permit: Permit,
        request_id: bytes,
        *,
        connect: Callable[[Deadline], Awaitable[Connection]],
        again: Callable[[Connection], Stream],
    ) -> None:
        self._stream = stream
        self._permit = permit
        self._request_id = request_id
        self._connect = connect
        self._again = again
        self._region = _region_of(stream.connection)
        # A `Resume` may be lost like anything else, so the server may hold any of these tickets:
        # that of the last connection on which something came, or of one tried since; newest last.
        self._keys = [_key_of(stream.connection)]
        self._unconfirmed = False
        self._cut: StreamInterrupted | None = None
        self._is_cancelled = False
        self._reconnecting: asyncio.Future[None] | None = None
        self.resumed = 0
        self.away_ms = 0.0
        self.pause_s = 0.0
        self._had_first = False
        self._limit_s: float | None = None
        self._on_silence: Callable[[], None] = lambda: None

    @property
    def fin(self) -> wire.Fin | None:
        """The server's last word on an answer that ended well."""
        return self._stream.fin

    @property
    def received_tokens(self) -> int:
        """Tokens that arrived so far, on all connections."""
        return self._stream.received_tokens

    async def tokens(self, deadline: Deadline) -> list[wire.Token]:
        """As `Stream.tokens`.

        Raises:
            DeadlineExceeded, StreamInterrupted, NearfarError: As `Stream.tokens`; a lost connection
                only when the answer could not be taken up on another.
        """
        # The first tokens are waited for by who may have another route begin as well.
        limit_s = self._limit_s if self._had_first else None
        while True:
            asked_s = time.monotonic()
            due_s = math.inf if limit_s is None else asked_s + limit_s
            try:
                batch = await self._stream.tokens(
                    deadline if due_s >= deadline.at_s else Deadline(due_s)
                )
            except StreamInterrupted as cut:
                await self._go_on(cut, deadline)
                continue
            except DeadlineExceeded:
                if due_s >= deadline.at_s:
                    raise
                raise self._silent(time.monotonic() - asked_s) from None
            if self._unconfirmed:
                self._keys = self._keys[-1:]
                self._unconfirmed = False
                self._cut = None
            if self._had_first:
                self.pause_s = max(self.pause_s, time.monotonic() - asked_s)
            self._had_first = True
            return batch

    def limit_pauses(self, limit_s: float | None, tell: Callable[[], None]) -> None:
        """Take a long silence in the middle of the answer for a stall.

        Args:
            limit_s: Longest wait for tokens after the first; `None` waits as long as it takes.
            tell: Called when one was longer.
        """
        self._limit_s = limit_s
        self._on_silence = tell

    def _silent(self, silent_s: float) -> StreamInterrupted:
        self._on_silence()
        return StreamInterrupted(
            f"The cloud has been silent for {silent_s * 1000.0:.0f} ms in the middle of the answer",
            received_tokens=self.received_tokens,
        )

    def cancel(self) -> None:
        """As `Stream.cancel`; also ends the search for a new connection."""
        self._is_cancelled = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        self._stream.cancel()

    async def _go_on(self, cut: StreamInterrupted, deadline: Deadline) -> None:
        """Have a stream on a living connection, or raise why there is none."""
        if isinstance(cut.__cause__, ResumeMissed):
            await self._after_miss(cut)
            return
        if not self._keys[0] or not _is_lost(self._stream.connection):
            raise self._cut or cut
        if self._cut is None:
            self._cut = cut
        reconnecting = asyncio.ensure_future(self._reconnect(self._cut, deadline))
        self._reconnecting = reconnecting
        try:
            # Not awaited itself: who is cancelled here, this task or that one, would not be told.
            await asyncio.wait([reconnecting])
        except asyncio.CancelledError:
            self.cancel()
            reconnecting.add_done_callback(mark_seen)
            raise
        finally:
            self._reconnecting = None
        if reconnecting.cancelled():
            raise Cancelled("The request was cancelled")
        reconnecting.result()

    async def _reconnect(self, cut: StreamInterrupted, deadline: Deadline) -> None:
        started_s = time.monotonic()
        within = Deadline(min(deadline.at_s, started_s + _WITHIN_S))
        for pause_s in _PAUSES_S:
            await asyncio.sleep(min(pause_s, within.remaining_s()))
            try:
                connection = await self._connect(within)
                self._take_up(connection, self._keys[-1])
            except CloudUnavailable:
                continue
            except NearfarError as error:  # too late, closed, refused: trying again is no use
                deadline.check("cloud")
                raise cut from error
            self._keys.append(_key_of(connection))
            self._unconfirmed = True
            self.resumed += 1
            away_ms = (time.monotonic() - started_s) * 1000.0
            self.away_ms += away_ms
            logger.info("an answer goes on at token %d on a new connection after %.0f ms",
                        self.received_tokens, away_ms)  # fmt: skip
            return
        raise cut

    def _take_up(self, connection: Connection, key: bytes) -> None:
        self._stream = connection.resume(
            self._stream,
            request_id=self._request_id,
            ticket=ticket_for(key, self._request_id),
            permit=self._permit,
        )

    async def _after_miss(self, miss: StreamInterrupted) -> None:
        """Try an older ticket; or, when nothing had come, the request itself with its old id."""
        cut = self._cut or miss
        connection = self._stream.connection
        # The newest key belongs to this connection and the one before it was tried just now.
        self._keys = [*self._keys[:-2], self._keys[-1]]
        try:
            if len(self._keys) > 1:
                self._take_up(connection, self._keys[-2])
            elif self.received_tokens == 0 and _region_of(connection) == self._region:
                self._stream = self._again(connection)
            else:
                raise cut from miss
        except StreamInterrupted:
            raise
        except NearfarError as error:
            raise cut from error


def _key_of(connection: Connection) -> bytes:
    return connection.ready.resume_key if connection.ready is not None else b""


def _region_of(connection: Connection) -> str:
    return connection.ready.region if connection.ready is not None else ""


def _is_lost(connection: Connection) -> bool:
    """Whether the connection broke, and not because one side did something wrong or closed it."""
    return type(connection.error) is CloudUnavailable
