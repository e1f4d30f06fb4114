"""Threads that call an engine for somebody who must not be lost with it.

A call of a library cannot be ended from outside when the library does not look up. So it is made
in a thread that can be given up: a daemon, which holds back neither `close` nor the end of the
process. Threads are used again; a call costs a wake-up of one and of the caller.
"""

from __future__ import annotations

import os
import threading
from _thread import TIMEOUT_MAX, allocate_lock
from collections.abc import Callable
from typing import Any

from nearfar.errors import NearfarError
from nearfar.units import Deadline

#: Threads that are kept for the next calls; more come and go with what is asked at once.
_MOST_IDLE = 4


class Work:
    """One call of an engine, which may be given up.

    Attributes:
        native_id: Of the thread that makes it; `None` until it has begun.
        has_returned: Whether the call itself came to an end, wanted or not.
    """

    __slots__ = ("_done", "_error", "_result", "_run", "_told", "has_returned", "native_id")

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self._done = allocate_lock()
        self._done.acquire()
        self._told = allocate_lock()
        self._result: Any = None
        self._error: BaseException | None = None
        self.native_id: int | None = None
        self.has_returned = False

    def wait(self, deadline: Deadline) -> Any:
        """What the call returns.

        Raises:
            DeadlineExceeded: The deadline passed first; the call goes on.
            NearfarError: What the call raised, or it was given up with.
        """
        while True:
            left_s = deadline.timeout_s()
            if self._done.acquire(timeout=-1 if left_s is None else min(left_s, TIMEOUT_MAX)):
                break
            deadline.check("edge")
        if self._error is not None:
            raise self._error
        return self._result

    def give_up(self, error: NearfarError, before: Callable[[], None]) -> None:
        """Have whoever waits go on with an error, unless the call was quicker.

        Args:
            error: What is wrong.
            before: Done before that: who goes on finds the call told to end, and others warned.
        """
        if self._told.acquire(blocking=False):
            try:
                before()
            finally:
                self._error = error
                self._done.release()

    def perform(self) -> None:
        """Make the call, in this thread."""
        self.native_id = threading.get_native_id()
        result: Any = None
        error: BaseException | None = None
        try:
            result = self._run()
        except BaseException as exc:  # noqa: BLE001 (crosses to the thread that waits)
            error = exc
        self.has_returned = True
        del self._run  # and with it the inputs
        if self._told.acquire(blocking=False):  # else it was given up
            self._result, self._error = result, error
            self._done.release()


class Hands:
    """Threads that make calls, as many as are needed at once. Thread-safe."""

    def __init__(self) -> None:
        self.idle: list[_Hand] = []
        self.is_closed = False
        self._process = os.getpid()

    def do(self, run: Callable[[], Any]) -> Work:
        """Have a call made in a thread of its own."""
        work = Work(run)
        if self._process != os.getpid():  # a fork has no threads
            self.idle, self._process = [], os.getpid()
        try:
            hand = self.idle.pop()
        except IndexError:
            hand = _Hand(self)
        hand.take(work)
        return work

    def close(self) -> None:
        """Let idle threads end now, and those that work when they have."""
        self.is_closed = True
        while self.idle:
            try:
                self.idle.pop().take(None)
            except IndexError:
                return


class _Hand:
    def __init__(self, hands: Hands) -> None:
        self._hands = hands
        self._work: Work | None = None
        self._wake = allocate_lock()
        self._wake.acquire()
        self._is_started = False

    def take(self, work: Work | None) -> None:
        self._work = work
        if self._is_started:
            self._wake.release()
        else:
            self._is_started = True
            threading.Thread(target=self._live, name="nearfar-engine", daemon=True).start()

    def _live(self) -> None:
        hands = self._hands
        while True:
            work, self._work = self._work, None
            if work is None:
                return
            work.perform()
            del work
            if len(hands.idle) >= _MOST_IDLE or hands.is_closed:
                return
            hands.idle.append(self)
            self._wake.acquire()
