"""How many calls of one model run at once, and in which order the others wait.

Among those who wait, a higher priority goes first and equal ones in the order of their coming; each
`_AGEING_S` of waiting is worth one level, so that a low priority waits longer but never for ever.
Whoever's deadline passes leaves the queue. The free path (a slot is
free, nobody waits) lies on every call of the device route and takes no lock: free places are
entries of a list, which one thread only can pop, and both ends look again after they changed
something (`SlotGate._enqueue`, `Slot.release`), so that no place is free while somebody waits.
"""

from __future__ import annotations

import bisect
import heapq
import threading
from time import monotonic
from types import TracebackType

import msgspec

from nearfar.engines.base import CancelToken
from nearfar.errors import Cancelled, EngineError, NearfarError, Overloaded
from nearfar.patience import Patience
from nearfar.units import Deadline

#: Weight of the newest duration in the gate's own average, used where a caller expects nothing.
_SMOOTHING = 0.2

#: Work that ran past its estimate is taken to need this share of its present age still: the longer
#: it overran, the less the estimate is worth.
_OVERRUN_SHARE = 0.25

#: How often a waiting caller looks at its cancel token: quick for a person, nothing for the CPU.
_CANCEL_POLL_S = 0.02

#: Waiting time that lifts a request by one priority. From 0 to 9 it takes 18 s: several answers of
#: a language model, so that urgent ones do overtake, and less than anybody's patience.
_AGEING_S = 2.0

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
    #: Set by holders that are watched from another thread: how long they may be silent, and the
    #: identity of their thread.
    patience: Patience | None = None
    thread: int = 0

    @property
    def started_s(self) -> float:
        """Monotonic time at which it was taken."""
        return self._started_s

    def release(self) -> None:
        """Give the slot to the next in the queue; idempotent, from any thread."""
        gate = self._gate
        try:
            gate._running.remove(self)
        except ValueError:
            return  # it was given back before
        held_s = self.held_s = monotonic() - self._started_s
        average_s = gate._average_s
        gate._average_s = (
            held_s if average_s is None else average_s + _SMOOTHING * (held_s - average_s)
        )
        gate._free.append(None)
        if gate._waiting or gate._is_closed:
            gate._pass_on()

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
    __slots__ = ("deadline", "expected_s", "granted", "rank_s", "refusal", "since_s", "wake")

    def __init__(self, deadline: Deadline, expected_s: float | None, priority: int) -> None:
        self.deadline = deadline
        self.expected_s = expected_s
        self.since_s = monotonic()
        # All age alike, so the order between two who wait never changes: the time at which each
        # would have had to come with priority 0 to stand where it stands.
        self.rank_s = self.since_s - priority * _AGEING_S
        self.wake = threading.Event()
        self.granted: Slot | None = None
        self.refusal: NearfarError | None = None


class SlotGate:
    """Admission by priority and time of coming, for callers that may block. Thread-safe.

    Args:
        slots: How many may run at once.
        max_waiting: How many may wait; more are refused with `Overloaded`.
        name: What runs here, for error texts.
    """

    def __init__(self, slots: int, max_waiting: int, *, name: str = "") -> None:
        if slots < 1 or max_waiting < 0:
            raise ValueError(f"slots={slots}, max_waiting={max_waiting}: need >= 1 and >= 0")
        self._max_waiting = max_waiting
        self._subject = f"Model {name!r}" if name else "The model"
        # An RLock: garbage collection may close an abandoned generation, and with it release its
        # slot, in a thread that holds this lock at that moment.
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._free: list[None] = [None] * slots
        self._running: list[Slot] = []
        self._waiting: list[_Waiter] = []  # in the order of being served
        self._average_s: float | None = None
        self._is_closed = False
        self._is_hung = False

    def acquire(
        self,
        deadline: Deadline = _NO_DEADLINE,
        expected_s: float | None = None,
        *,
        cancel: CancelToken | None = None,
        priority: int = 5,
    ) -> Slot:
        """Wait for a slot.

        Args:
            deadline: When waiting makes no sense any more.
            expected_s: How long the work will take, for the estimates of others; `None` takes the
                average of what ran here before.
            cancel: Looked at while waiting.
            priority: 0 (background) to 9 (urgent).

        Returns:
            The slot, a context manager.

        Raises:
            Overloaded: `max_waiting` callers wait already.
            DeadlineExceeded: The deadline passed first.
            Cancelled: `cancel` was set, or the gate was closed, while waiting.
            EngineError: The gate was closed before.
        """
        if monotonic() >= deadline.at_s:
            deadline.check()
        slot = self.try_acquire(expected_s)
        if slot is not None:
            return slot
        return self._wait(self._enqueue(deadline, expected_s, priority), cancel)

    def try_acquire(self, expected_s: float | None = None) -> Slot | None:
        """A slot that is free now, or `None`: all are taken, somebody waits, or it is closed."""
        return None if self._waiting else self._take(expected_s)

    def state(self) -> SlotState:
        """Current load; cheap enough for every routing decision."""
        with self._lock:
            running, waiting = len(self._running), len(self._waiting)
            wait_s = 0.0 if self._free and not waiting else self._expected_wait_s()
            return SlotState(running, waiting, wait_s)

    def close(self) -> None:
        """Admit nobody any more and send those who wait away; running work is not touched."""
        with self._lock:
            self._is_closed = True
            for waiter in self._waiting:
                waiter.wake.set()
            self._waiting.clear()

    def hang(self, error: NearfarError) -> None:
        """What runs has stalled: those who wait get the error, and `join` waits no more."""
        with self._lock:
            self._is_hung = True
            for waiter in self._waiting:
                waiter.refusal = error
                waiter.wake.set()
            self._waiting.clear()
            self._idle.notify_all()

    def recover(self) -> None:
        """What had stalled has ended after all."""
        with self._lock:
            self._is_hung = False

    def running(self) -> list[Slot]:
        """Slots in use just now."""
        return self._running.copy()

    def join(self, timeout_s: float | None = None) -> bool:
        """After `close`: wait until nothing runs that ever ends; says whether nothing runs."""
        with self._idle:
            self._idle.wait_for(lambda: not self._running or self._is_hung, timeout_s)
            return not self._running

    def _take(self, expected_s: float | None, queue_s: float = 0.0) -> Slot | None:
        """Take a free place, if there is one."""
        try:
            self._free.pop()
        except IndexError:
            return None
        slot = Slot(self, expected_s, monotonic(), queue_s)
        self._running.append(slot)
        if self._is_closed:  # looked at last: `join` saw this slot, or this sees that it is closed
            slot.release()
            return None
        return slot

    def _enqueue(self, deadline: Deadline, expected_s: float | None, priority: int) -> _Waiter:
        with self._lock:
            if self._is_closed:
                raise EngineError(
                    f"{self._subject} has been closed", fix="Open the runtime or client again"
                )
            waiter = _Waiter(deadline, expected_s, priority)
            bisect.insort(self._waiting, waiter, key=lambda found: found.rank_s)
            # A place that became free a moment ago would otherwise wake nobody.
            self._pass_on()
            if waiter.granted is None and len(self._waiting) > self._max_waiting:
                self._waiting.remove(waiter)
                raise Overloaded(
                    f"{self._subject} has {len(self._running)} calls running and "
                    f"{len(self._waiting)} waiting, as many as it takes",
                    fix="Try again later, or raise the number that may wait",
                )
            return waiter

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
            if waiter.refusal is not None:
                raise waiter.refusal
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

    def _pass_on(self) -> None:
        """Give free places to those who are next, and tell `join` when nothing runs."""
        with self._lock:
            while self._waiting:
                waiter = self._waiting[0]
                now_s = monotonic()
                # Expired ones find out by themselves; giving them a slot would waste it.
                if now_s < waiter.deadline.at_s:
                    waiter.granted = self._take(waiter.expected_s, now_s - waiter.since_s)
                    if waiter.granted is None:
                        break
                    waiter.wake.set()
                self._waiting.pop(0)
            if self._is_closed and not self._running:
                self._idle.notify_all()

    def _expected_wait_s(self) -> float:
        """Play the queue through: each next one takes the slot that is free first."""
        now_s = monotonic()
        usual_s = self._average_s or 0.0
        free_at = []
        for slot in self._running.copy():  # others come and go meanwhile
            age_s = now_s - slot._started_s
            expected_s = usual_s if slot._expected_s is None else slot._expected_s
            free_at.append(max(expected_s - age_s, _OVERRUN_SHARE * age_s))
        heapq.heapify(free_at)
        for waiter in self._waiting:
            expected_s = usual_s if waiter.expected_s is None else waiter.expected_s
            heapq.heapreplace(free_at, free_at[0] + expected_s)
        return free_at[0] if free_at else 0.0
