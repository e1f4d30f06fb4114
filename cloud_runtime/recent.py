"""Requests that were answered a moment ago, so that a repeated one is not computed twice.

A client whose connection broke after it sent an `Infer` cannot know whether it was computed. It
sends the same request again, with the same 128-bit id, and gets the same answer: the one that is
being computed, or that was computed within the last minute. Only successes are remembered; a
request that failed is tried anew. Answers are kept in memory, per API key, and within a bound.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from cloud_runtime.executor import InferOutcome, Ticket
from nearfar.errors import InvalidInput

KEEP_S = 60.0
MAX_FINISHED = 1024
MAX_BYTES = 64 << 20

#: Who asked, and the request's id.
Key = tuple[str, bytes]


@dataclass(slots=True)
class SharedRun:
    """One computation and those who wait for it.

    Attributes:
        future: Its outcome.
        ticket: Cancelled when nobody waits any more and the engine has not begun.
        fingerprint: What the request asked for, but for the tensors' contents.
        waiters: How many wait.
        size_bytes: Of the outputs, once there are any.
        done_s: When they were there.
    """

    future: asyncio.Future[InferOutcome]
    ticket: Ticket
    fingerprint: object
    waiters: int = 0
    size_bytes: int = 0
    done_s: float = 0.0


class RecentRuns:
    """A bounded window of computations by request id. Used from one event loop.

    Attributes:
        held_bytes: Size of the remembered outputs.
    """

    def __init__(
        self,
        *,
        keep_s: float = KEEP_S,
        max_finished: int = MAX_FINISHED,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keep_s = keep_s
        self._max_finished = max_finished
        self._max_bytes = max_bytes
        self._clock = clock
        self._running: dict[Key, SharedRun] = {}
        self._finished: OrderedDict[Key, SharedRun] = OrderedDict()  # oldest first
        self.held_bytes = 0

    def join(
        self,
        key: Key,
        fingerprint: object,
        start: Callable[[Ticket], asyncio.Future[InferOutcome]],
    ) -> SharedRun:
        """Wait for the computation of that id, which is started if there is none.

        Args:
            key: Who asks, and the request's id.
            fingerprint: Equal for equal requests; tells a repetition from a reused id.
            start: Submits the computation.

        Raises:
            InvalidInput: The id belongs to another request of this minute.
        """
        self._forget_old()
        run = self._running.get(key)
        if run is not None and run.future.done():  # its callback is still to come
            self._ended(key, run)
        run = self._running.get(key) or self._finished.get(key)
        if run is None:
            ticket = Ticket()
            run = SharedRun(start(ticket), ticket, fingerprint)
            self._running[key] = run
            started = run
            run.future.add_done_callback(lambda _: self._ended(key, started))
        elif run.fingerprint != fingerprint:
            raise InvalidInput(
                "The request id was used for another request within the last minute",
                field="request_id",
                fix="Draw 16 random bytes for each request",
            )
        run.waiters += 1
        return run

    def leave(self, key: Key, run: SharedRun) -> None:
        """Stop waiting. The last one to leave cancels what has not begun."""
        run.waiters -= 1
        if not run.waiters and run.ticket.cancel() and self._running.get(key) is run:
            del self._running[key]  # a repetition starts anew

    def _ended(self, key: Key, run: SharedRun) -> None:
        if self._running.get(key) is not run:
            return
        del self._running[key]
        if run.future.cancelled() or run.future.exception() is not None:
            return
        run.done_s = self._clock()
        run.size_bytes = sum(array.nbytes for array in run.future.result().outputs.values())
        self.held_bytes += run.size_bytes
        self._finished[key] = run
        self._forget_old()

    def _forget_old(self) -> None:
        now_s = self._clock()
        while self._finished:
            oldest = next(iter(self._finished.values()))
            if (
                now_s - oldest.done_s < self._keep_s
                and len(self._finished) <= self._max_finished
                and self.held_bytes <= self._max_bytes
            ):
                return
            self._finished.popitem(last=False)
            self.held_bytes -= oldest.size_bytes
