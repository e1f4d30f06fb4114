"""How late a thread of the measured process wakes that does nothing but wait for a deadline."""

from __future__ import annotations

import heapq
import threading
import time
from types import TracebackType


class Alarms:
    """Wakes at every deadline it is told, and notes how late it was; a context manager.

    It is in the process that is measured: it must get a processor and the interpreter's lock, as
    whoever waits for an answer must, and needs nothing else. A caller that is later than this
    waited for something of nearfar's; one that is not had to wait for its turn.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due_s: list[float] = []
        self._late_ms: dict[float, float] = {}
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="alarms", daemon=True)

    def at(self, due_s: float) -> None:
        """Wake at a moment of `time.monotonic()`."""
        with self._changed:
            heapq.heappush(self._due_s, due_s)
            if self._due_s[0] == due_s:
                self._changed.notify()

    def late_ms(self, due_s: float) -> float | None:
        """How late it woke for that deadline; `None` when it did not, which is after the end."""
        return self._late_ms.get(due_s)

    def __enter__(self) -> Alarms:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._is_over:
                now_s = time.monotonic()
                while self._due_s and self._due_s[0] <= now_s:
                    due_s = heapq.heappop(self._due_s)
                    self._late_ms[due_s] = (now_s - due_s) * 1000.0
                left_s = self._due_s[0] - time.monotonic() if self._due_s else None
                if left_s is None or left_s > 0.0:
                    self._changed.wait(left_s)
