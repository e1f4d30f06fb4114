"""How many calls of one model run at once, and in which order the others wait.

First come, first served; whoever's deadline passes leaves the queue. The free path (a slot is
free, nobody waits) costs one lock, because it lies on every call of the device route.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from types import TracebackType

import msgspec

from nearfar.engines.base import CancelToken
from nearfar.errors import Cancelled, EngineError, Overloaded
from nearfar.units import Deadline

#: Weight of the newest duration in the gate's own average, used where a caller expects nothing.
_SMOOTHING = 0.2

#: Work that ran past its estimate is taken to need this share of its present age still: the longer
#: it overran, the less the estimate is worth.
_OVERRUN_SHARE = 0.25

#: How often a waiting caller looks at its cancel token: quick for a person, nothing for the CPU.
_CANCEL_POLL_S = 0.02

_NO_DEADLINE = Deadline()


class SlotState(msgspec.Struct, frozen=True):
    """What a gate is doing now.

    Attributes:
        running: Slots in use.
        waiting: Callers in the queue.
        expected_wait_s: How long a caller who came now would wait; 0 when a slot is free.
    """

    running: int
    waiting: int
    expected_wait_s: float


class Slot(msgspec.Struct, eq=False):
    """A slot that is held; give it back with `release` or by leaving the ``with`` block.

    Attributes:
        queue_s: How long the holder waited for it.
        held_s: How long it was held; 0 until it is given back.
    """

    # A msgspec Struct because it is made once for each call, and is made in C.
    _gate: SlotGate
    _expected_s: float | None
    _started_s: float
    queue_s: float
    held_s: float = 0.0

    def release(self) -> None:
        """Give the slot to the next in the queue; idempotent, from any thread."""
        gate = self._gate
        now_s = time.monotonic()
        with gate._lock:
            if gate._running.pop(self, self) is self:
                return  # it was given back before
            held_s = self.held_s = now_s - self._started_s
            average_s = gate._average_s
            gate._average_s = (
                held_s if average_s is None else average_s + _SMOOTHING * (held_s - average_s)
            )
            if gate._waiting:
                gate._pass_on(now_s)
            if gate._is_closed and not gate._running:
                gate._idle.notify_all()

    def __enter__(self) -> Slot:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class _Waiter:
    __slots__ = ("deadline", "expected_s", "granted", "since_s", "wake")

    def __init__(self, deadline: Deadline, expected_s: float | None) -> None:
        self.deadline = deadline
        self.expected_s = expected_s
        self.since_s = time.monotonic()
        self.wake = threading.Event()
        self.granted: Slot | None = None


class SlotGate:
    """First-come-first-served admission for callers that may block. Thread-safe.

    Args:
        slots: How many may run at once.
        max_waiting: How many may wait; more are refused with `Overloaded`.
        name: What runs here, for error texts.
    """

    def __init__(self, slots: int, max_waiting: int, *, name: str = "") -> None:
        if slots < 1 or max_waiting < 0:
            raise ValueError(f"slots={slots}, max_waiting={max_waiting}: need >= 1 and >= 0")
        self._slots = slots
        self._max_waiting = max_waiting
        self._subject = f"Model {name!r}" if name else "The model"
        # An RLock: garbage collection may close an abandoned generation, and with it release its
        # slot, in a thread that holds this lock at that moment.
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._running: dict[Slot, None] = {}
        self._waiting: deque[_Waiter] = deque()
        self._average_s: float | None = None
        self._is_closed = False

    def acquire(
        self,
        deadline: Deadline = _NO_DEADLINE,
        expected_s: float | None = None,
        *,
        cancel: CancelToken | None = None,
    ) -> Slot:
        """Wait for a slot.

        Args:
            deadline: When waiting makes no sense any more.
            expected_s: How long the work will take, for the estimates of others; `None` takes the
                average of what ran here before.
            cancel: Looked at while waiting.

        Returns:
            The slot, a context manager.

        Raises:
            Overloaded: `max_waiting` callers wait already.
            DeadlineExceeded: The deadline passed first.
            Cancelled: `cancel` was set, or the gate was closed, while waiting.
            EngineError: The gate was closed before.
        """
        with self._lock:
            if self._is_closed:
                raise EngineError(
                    f"{self._subject} has been closed", fix="Open the runtime or client again"
                )
            if len(self._running) < self._slots and not self._waiting:
                started_s = time.monotonic()
                if started_s >= deadline.at_s:
                    deadline.check()
                slot = Slot(self, expected_s, started_s, 0.0)
                self._running[slot] = None
                return slot
            if len(self._waiting) >= self._max_waiting:
                raise Overloaded(
                    f"{self._subject} has {len(self._running)} calls running and "
                    f"{len(self._waiting)} waiting, as many as it takes",
                    fix="Try again later, or raise the number that may wait",
                )
            waiter = _Waiter(deadline, expected_s)
            self._waiting.append(waiter)
        return self._wait(waiter, cancel)

    def try_acquire(self, expected_s: float | None = None) -> Slot | None:
        """A slot that is free now, or `None`: all are taken, somebody waits, or it is closed."""
        with self._lock:
            if self._is_closed or self._waiting or len(self._running) >= self._slots:
                return None
            slot = Slot(self, expected_s, time.monotonic(), 0.0)
            self._running[slot] = None
            return slot

    def state(self) -> SlotState:
        """Current load; cheap enough for every routing decision."""
        with self._lock:
            running, waiting = len(self._running), len(self._waiting)
            if running < self._slots and not waiting:
                return SlotState(running, waiting, 0.0)
            return SlotState(running, waiting, self._expected_wait_s())

    def close(self) -> None:
        """Admit nobody any more and send those who wait away; running work is not touched."""
        with self._lock:
            self._is_closed = True
            for waiter in self._waiting:
                waiter.wake.set()
            self._waiting.clear()

    def join(self, timeout_s: float | None = None) -> bool:
        """After `close`: wait until nothing runs; says whether that came in time."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._running, timeout_s)

    def _wait(self, waiter: _Waiter, cancel: CancelToken | None) -> Slot:
        try:
            while not waiter.wake.is_set():
                left_s = waiter.deadline.timeout_s()
                if cancel is not None:
                    left_s = _CANCEL_POLL_S if left_s is None else min(left_s, _CANCEL_POLL_S)
                waiter.wake.wait(left_s)
                if waiter.wake.is_set():
                    break
                waiter.deadline.check()
                if cancel is not None and cancel.is_cancelled:
                    raise Cancelled("The request was cancelled while it waited for its turn")
        except BaseException:  # also KeyboardInterrupt: a slot must not go to somebody who left
            self._leave(waiter)
            raise
        if waiter.granted is None:
            raise Cancelled(
                f"{self._subject} was closed while the request waited for its turn",
                fix="Open the runtime or client again",
            )
        return waiter.granted

    def _leave(self, waiter: _Waiter) -> None:
        with self._lock:
            if waiter.granted is not None:
                waiter.granted.release()
            elif waiter in self._waiting:
                self._waiting.remove(waiter)

    def _pass_on(self, now_s: float) -> None:
        """Give free slots to those who wait longest; the lock is held."""
        while self._waiting and len(self._running) < self._slots:
            waiter = self._waiting.popleft()
            # Expired ones find out by themselves; giving them a slot would waste it.
            if now_s < waiter.deadline.at_s:
                slot = Slot(self, waiter.expected_s, now_s, now_s - waiter.since_s)
                self._running[slot] = None
                waiter.granted = slot
                waiter.wake.set()

    def _expected_wait_s(self) -> float:
        """Play the queue through: each next one takes the slot that is free first."""
        now_s = time.monotonic()
        usual_s = self._average_s or 0.0
        free_at = []
        for slot in self._running:
            age_s = now_s - slot._started_s
            expected_s = usual_s if slot._expected_s is None else slot._expected_s
            free_at.append(max(expected_s - age_s, _OVERRUN_SHARE * age_s))
        heapq.heapify(free_at)
        for waiter in self._waiting:
            expected_s = usual_s if waiter.expected_s is None else waiter.expected_s
            heapq.heapreplace(free_at, free_at[0] + expected_s)
        return free_at[0] if free_at else 0.0
