"""Stop what the device computes when its deadline passes.

A call that has begun does not look up, so somebody else must keep the time: one thread of a client,
started with the first call that has a deadline. It sleeps until the next deadline; calls that end
before theirs cost it nothing.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nearfar.engines.base import CancelToken

#: Calls that ended leave their entry behind; beyond so many the list is cleared of them.
_MAX_ENDED = 256
#: The thread only cancels, which does not wait for anything.
_JOIN_S = 5.0


class Watched:
    """A call under way; a context manager."""

    __slots__ = ("_cancel", "_watch")

    def __init__(self, watch: DeadlineWatch, cancel: CancelToken) -> None:
        self._watch = watch
        self._cancel: CancelToken | None = cancel

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing to stop any more."""
        return self._cancel is None

    def end(self) -> None:
        """It ended; idempotent."""
        if self._cancel is not None:
            self._cancel = None
            self._watch.ended()

    def stop(self) -> None:
        """Its deadline has passed."""
        cancel = self._cancel
        if cancel is not None:
            cancel.cancel()

    def __enter__(self) -> Watched:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


class DeadlineWatch:
    """Cancels calls at their deadlines. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Watched]] = []
        self._order = itertools.count()
        self._ended = 0
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def watch(self, at_s: float, cancel: CancelToken) -> Watched:
        """Cancel a token at a moment of `time.monotonic()`, unless the call has ended by then."""
        watched = Watched(self, cancel)
        with self._changed:
            heapq.heappush(self._due, (at_s, next(self._order), watched))
            if self._is_closed:
                return watched
            if self._thread is None or not self._thread.is_alive():  # a fork has no threads
                self._thread = threading.Thread(
                    target=self._run, name="nearfar-deadlines", daemon=True
                )
                self._thread.start()
            elif self._due[0][2] is watched:
                self._changed.notify()
        return watched

    def close(self) -> None:
        """End the thread; idempotent. What is watched then is not cancelled any more."""
        with self._changed:
            self._is_closed = True
            thread, self._thread = self._thread, None
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)

    def ended(self) -> None:
        """A watched call ended."""
        self._ended += 1  # a race loses one, which only clears the list later
        if self._ended > _MAX_ENDED:
            with self._changed:
                self._due = [entry for entry in self._due if not entry[2].has_ended]
                heapq.heapify(self._due)
                self._ended = 0

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._is_closed:
                    return
                while self._due and self._due[0][2].has_ended:
                    heapq.heappop(self._due)
                if not self._due:
                    self._changed.wait()
                    continue
                left_s = self._due[0][0] - time.monotonic()
                if left_s > 0.0:
                    self._changed.wait(left_s)
                    continue
                watched = heapq.heappop(self._due)[2]
            watched.stop()  # not under the lock: listeners are the engines'
