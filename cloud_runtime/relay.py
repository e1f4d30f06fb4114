"""Bring an answer from the thread that generates it to the event loop that sends it.

One wake-up of the loop carries every token that came since the last one, so the generating thread
pays a lock and, at most once per wake-up, one `call_soon_threadsafe`. It runs ahead of a slow
reader by a bounded number of tokens and then waits; a reader that takes nothing for long loses its
stream, because it would otherwise hold an engine slot that others wait for.

An engine that computes with Python's global lock held would let a token lie here until the next one
is computed; one that keeps every core busy may do so too. So the generating thread gives way after
each token until the loop has sent it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass

from nearfar.engines.base import CancelToken
from nearfar.errors import Overloaded
from nearfar.generation import FinishReason, GenerationChunk, Usage
from nearfar.units import Deadline

#: How far generation may run ahead of the client: some seconds of an answer, a few KB.
AHEAD_TOKENS = 256

#: Longest pause per token for the event loop. It mostly needs 0.2 ms; a busy one gets this much.
GIVE_WAY_S = 0.005

#: How long a client may take nothing while the thread waits for room.
STALL_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """How an answer ended well, and what it took."""

    finish_reason: FinishReason
    usage: Usage
    queue_ms: float
    prefill_ms: float
    decode_ms: float


class TokenRelay:
    """A bounded queue of chunks with one writing thread and one reading coroutine.

    Args:
        loop: Where `read` is awaited.
        deadline: A waiting writer gives up then.
        ahead_tokens: Chunks that may wait unread.
        stall_s: How long the writer waits for room.

    Attributes:
        cancel: Looked at by the engine between tokens; set by `abort`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        deadline: Deadline = Deadline(),  # noqa: B008 (frozen)
        ahead_tokens: int = AHEAD_TOKENS,
        stall_s: float = STALL_S,
    ) -> None:
        self.cancel = CancelToken()
        self._loop = loop
        self._deadline = deadline
        self._ahead_tokens = ahead_tokens
        self._stall_s = stall_s
        self._room = threading.Condition()
        self._changed = asyncio.Event()
        self._nudges = 0
        # Below: guarded by _room.
        self._chunks: deque[GenerationChunk] = deque()
        self._outcome: Completion | BaseException | None = None
        self._woken = False
        self._is_reader_idle = False

    # The generating thread's side.

    def put(self, chunk: GenerationChunk) -> bool:
        """Hand over one chunk; says whether the reader still wants more.

        Raises:
            Overloaded: The reader took nothing for `stall_s`.
        """
        with self._room:
            if len(self._chunks) >= self._ahead_tokens:
                self._wait_for_room()
            if self._outcome is not None:
                return False
            self._chunks.append(chunk)
            self._is_reader_idle = False
            self._wake()
            if len(self._chunks) == 1:  # otherwise the reader is behind for want of credit
                self._room.wait_for(self._is_settled, GIVE_WAY_S)
        return True

    def end(self, outcome: Completion | BaseException) -> None:
        """Close the queue: the reader gets what is in it, then the first outcome given."""
        with self._room:
            if self._outcome is None:
                self._outcome = outcome
                self._wake()

    # The event loop's side.

    async def read(self, available: int) -> list[GenerationChunk]:
        """Chunks in order; waits for the first. An empty list is the end, or a `nudge`.

        Args:
            available: At most that many chunks are taken; with 0 only the end is waited for.
        """
        nudges = self._nudges
        while True:
            self._changed.clear()
            with self._room:
                self._woken = False
                count = min(available, len(self._chunks))
                taken = [self._chunks.popleft() for _ in range(count)]
                if taken:
                    self._room.notify()
                    return taken
                if self._outcome is not None and not self._chunks:
                    return []
                self._is_reader_idle = True
                self._room.notify()
            await self._changed.wait()
            if not available or self._nudges != nudges:
                return []

    def nudge(self) -> None:
        """Let a waiting `read` return without chunks: the client gave credit, or reads elsewhere.

        A `read` that begins after it is not disturbed, so one reader can follow another.
        """
        self._nudges += 1
        self._changed.set()

    def abort(self, error: BaseException) -> None:
        """Stop the engine and drop what it made: the outcome is `error`, unless it ended before."""
        self.cancel.cancel()
        with self._room:
            if self._outcome is None or self._chunks:
                self._outcome = error
            self._chunks.clear()
            self._room.notify()
        self._changed.set()

    @property
    def outcome(self) -> Completion | BaseException | None:
        """How the answer ended; `None` while there is more to read."""
        with self._room:
            return None if self._chunks else self._outcome

    def _is_settled(self) -> bool:
        return self._is_reader_idle or self._outcome is not None

    def _wait_for_room(self) -> None:
        limit_s = time.monotonic() + min(self._stall_s, self._deadline.remaining_s())
        while len(self._chunks) >= self._ahead_tokens and self._outcome is None:
            left_s = limit_s - time.monotonic()
            if left_s <= 0:
                raise Overloaded(
                    f"The client took no token for {self._stall_s:.0f} s",
                    fix="Read the answer as it comes, or cancel it",
                )
            self._room.wait(left_s)

    def _wake(self) -> None:
        if self._woken:
            return
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:  # the loop is closed: the server has ended and nobody reads
            self.cancel.cancel()
