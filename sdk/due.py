"""Stop what the device computes when its deadline passes.

A call that has begun does not look up, so somebody else must keep the time: one thread of a client,
started with the first call that has a deadline. It sleeps until the next deadline; calls that end
before theirs cost it nothing.

An engine that is told to stop does so when its operator ends, and then its thread must get a
processor. The watch sees how long that takes, and tells it so much earlier that the caller hears of
it by the deadline, not after it.
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
#: What stopping is taken to need before one was seen: an operator of a small model takes 1 to 3 ms.
_FIRST_LEAD_S = 0.002
#: A call is not told to stop earlier than that, in seconds and as a part of the time it had.
_MAX_LEAD_S, _MAX_LEAD_SHARE = 0.02, 0.05
#: How much of a lead stays when a call needed less.
_LEAD_KEPT = 0.9


class Watched:
    """A call under way; a context manager."""

    __slots__ = ("_cancel", "_stop_at_s", "_watch", "is_stopped")

    def __init__(self, watch: DeadlineWatch, cancel: CancelToken, stop_at_s: float) -> None:
        self._watch = watch
        self._cancel: CancelToken | None = cancel
        self._stop_at_s = stop_at_s
        #: Whether it was told to stop, which is a little before its deadline.
        self.is_stopped = False

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing to stop any more."""
        return self._cancel is None

    def end(self) -> None:
        """It ended; idempotent."""
        if self._cancel is not None:
            self._cancel = None
            self._watch.ended()
            if self.is_stopped:
                self._watch.took(time.monotonic() - self._stop_at_s)

    def stop(self) -> None:
        """Its deadline has come, all but what stopping takes."""
        cancel = self._cancel
        if cancel is not None:
            self.is_stopped = True
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
        self._lead_s = _FIRST_LEAD_S
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def watch(self, at_s: float, cancel: CancelToken) -> Watched:
        """Cancel a token in time for a deadline, unless the call has ended by then.

        Args:
            at_s: The deadline, `time.monotonic()`.
            cancel: Told so much earlier as stopping takes.
        """
        left_s = at_s - time.monotonic()
        stop_at_s = at_s - max(0.0, min(self._lead_s, left_s * _MAX_LEAD_SHARE))
        watched = Watched(self, cancel, stop_at_s)
        with self._changed:
            heapq.heappush(self._due, (stop_at_s, next(self._order), watched))
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

    def took(self, seconds: float) -> None:
        """A call ended so long after it was to be told to stop."""
        self._lead_s = min(_MAX_LEAD_S, max(seconds, _LEAD_KEPT * self._lead_s))

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
