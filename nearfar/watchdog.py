"""A time limit that costs next to nothing while it is kept.

Thousands of short writes in a second would each make and cancel a timer of the event loop. A
watchdog notes the time instead, and looks at it once per limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Watchdog:
    """Calls back when what was begun is not ended in time. Used from one event loop.

    Args:
        limit_s: From `begin` to `end`. Lateness is noticed after it, not always at once: what
            began after something that may take longer is looked at when that is due.
        on_late: Called once for each thing that takes longer.
    """

    __slots__ = ("_due_s", "_limit_s", "_loop", "_on_late", "_timer")

    def __init__(self, limit_s: float, on_late: Callable[[], None]) -> None:
        self._limit_s = limit_s
        self._on_late = on_late
        self._loop = asyncio.get_running_loop()
        self._due_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, more_s: float = 0.0) -> None:
        """Something began; one thing at a time.

        Args:
            more_s: How much longer than the limit it may take.
        """
        self._due_s = self._loop.time() + self._limit_s + more_s
        if self._timer is None:
            self._timer = self._loop.call_at(self._due_s, self._look)

    def end(self) -> None:
        """It ended. Without effect when nothing was begun."""
        self._due_s = None

    def close(self) -> None:
        """Look no more."""
        self.end()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._due_s is None:
            return  # idle: the next `begin` sets the timer again
        if self._due_s > self._loop.time():
            self._timer = self._loop.call_at(self._due_s, self._look)
            return
        self._due_s = None
        self._on_late()
