"""Did the machine stand still while a test ran?

Many tests run real servers, clients and clocks. On a shared machine the host may take a processor
away for some hundred milliseconds, and then a request is rightly late, a silent route rightly left.
Such a test is run again, but only on evidence: in each processor a thread waits for short times all
along, and tells how late it was at most.
"""

from __future__ import annotations

import os
import threading
from time import monotonic, sleep  # by name: tests put clocks of their own into `time`

#: A thread that is later than this, in seconds, could not have kept a deadline either. What the
#: suite's own work delays it (engines in every processor, the interpreter's lock) is mostly less.
STOOD_STILL_S = 0.05

_WAIT_S = 0.02
_MOST_THREADS = 8


class StandstillWatch:
    """Waits in every processor of this process (in any, if there are many), and notices delays."""

    def __init__(self) -> None:
        self._is_over = threading.Event()
        processors: list[int | None] = [None]
        # Only Linux can bind threads; many of them would be a load of their own.
        if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) <= _MOST_THREADS:
            processors = [*os.sched_getaffinity(0)]
        self._latest_s = dict.fromkeys(processors, 0.0)
        self._threads = [
            threading.Thread(target=self._wait, args=(one,), name="standstill", daemon=True)
            for one in processors
        ]

    def start(self) -> None:
        """Begin to wait."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads."""
        self._is_over.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def begin(self) -> None:
        """Forget what was: a test begins."""
        self._latest_s = dict.fromkeys(self._latest_s, 0.0)

    def stood_still(self) -> bool:
        """Whether a processor stood still since `begin`."""
        return max(self._latest_s.values()) > STOOD_STILL_S

    def _wait(self, processor: int | None) -> None:
        if processor is not None:
            os.sched_setaffinity(threading.get_native_id(), {processor})
        while not self._is_over.is_set():
            due_s = monotonic() + _WAIT_S
            sleep(_WAIT_S)
            late_s = monotonic() - due_s
            self._latest_s[processor] = max(self._latest_s[processor], late_s)
