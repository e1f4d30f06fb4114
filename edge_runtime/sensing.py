"""Watch how fast this device may run: a thread that looks four times a second while it matters."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nearfar.engines.condition import ConditionReader

logger = logging.getLogger(__name__)

#: Between two looks. A few small files are read, which takes a fraction of a millisecond.
EVERY_S = 0.25
#: A device that nobody asks anything is not woken up for so long after the last request.
IDLE_S = 10.0
#: The thread reads files of the kernel only, which does not wait for anything.
_JOIN_S = 2.0


class SpeedSensor:
    """Tells somebody the device's speed, as long as anybody asks. Thread-safe.

    Its thread ends when nobody has asked for a while, and for good where the machine tells nothing,
    as most virtual ones do.

    Args:
        tell: Told the speed (`DeviceCondition.speed`) whenever it changed; called on the thread.
        root: Root of the file system; another one for tests.
    """

    def __init__(self, tell: Callable[[float | None], None], *, root: Path = Path("/")) -> None:
        self._tell = tell
        self._root = root
        self._reader: ConditionReader | None = None
        self._told: float | None = None
        self._asked_s = 0.0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._needs_thread = True

    @property
    def is_running(self) -> bool:
        """Whether there is a thread."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def asked(self, now_s: float) -> None:
        """A request is being decided. No I/O; starts the thread where none runs."""
        self._asked_s = now_s
        if not self._needs_thread:
            return
        with self._lock:
            if self._needs_thread and not self._closing.is_set():
                self._needs_thread = False
                self._thread = threading.Thread(
                    target=self._run, name="nearfar-sensor", daemon=True
                )
                self._thread.start()

    def close(self) -> None:
        """End the thread; idempotent."""
        with self._lock:
            self._closing.set()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)

    def _run(self) -> None:
        reader = self._reader
        if reader is None:
            reader = self._reader = self._make()
        while not self._closing.is_set():
            now_s, asked_s = time.monotonic(), self._asked_s
            speed = reader.speed(now_s)
            if speed != self._told:
                logger.debug("the device may use %s of its full clock", speed)
                self._tell(speed)
                self._told = speed
            if speed is None:
                return
            if now_s - asked_s > IDLE_S:
                with self._lock:
                    # In this order: who asks sets the time first and looks then.
                    self._needs_thread = True
                    if self._asked_s == asked_s:
                        return
                    self._needs_thread = False
            self._closing.wait(EVERY_S)

    def _make(self) -> ConditionReader:
        # On the thread: looking for a GPU can take seconds, and is not needed in vain.
        from nearfar.engines.condition import ConditionReader

        reader = ConditionReader(self._root)
        if reader.speed(time.monotonic()) is not None and _uses_gpu():
            reader = ConditionReader(self._root, uses_gpu=True)
        return reader


def _uses_gpu() -> bool:
    from nearfar.engines.devices import probe

    return probe().sm_arch is not None
