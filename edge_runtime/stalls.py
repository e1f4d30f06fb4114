"""Notice that an engine has stalled, and what becomes of its model then.

One thread of a runtime keeps the time of all calls that are watched; what is a stall is decided by
`nearfar.patience`. A model whose engine stalled takes no calls until that has ended; if it does not
end soon after it was told to, its session is given up, and the model is loaded anew beside it, a
few times at most: what hangs keeps its thread and its memory.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from typing import Literal

import msgspec

from nearfar.engines.liveness import Sample, life, sample
from nearfar.engines.slots import Slot, SlotGate
from nearfar.errors import EngineError
from nearfar.patience import Life, Patience, Silence
from nearfar.units import format_ms

Phase = Literal["batch", "prompt", "token"]

#: How long a call that was told to end may take for it, before its session is given up.
END_S = 0.3
#: Sessions of one model that may hang; each holds a thread, and the memory of a model.
MOST_LOST = 2
#: How often calls are looked for that nobody announces, and how many looks in vain end that.
_POLL_S = 0.05
_POLLS = 20
#: Calls that ended leave their entry behind; beyond so many the list is cleared of them.
_MOST_ENDED = 256
_JOIN_S = 5.0
#: No thread has this id.
NOBODY = 0


class Stall(msgspec.Struct, frozen=True, kw_only=True):
    """An engine of this device was silent for too long.

    Attributes:
        model: Name of the model.
        phase: What it did: a ``batch``, a ``prompt`` until the first token, or a ``token``.
        silent_ms: For how long, when that was noticed.
        limit_ms: From when on it was suspicious.
        life: What its threads did, a value of `nearfar.patience.Life`.
    """

    model: str
    phase: Phase
    silent_ms: float
    limit_ms: float
    life: str

    def error(self) -> EngineError:
        """What callers are told."""
        doing = {"batch": "", "prompt": " in the prompt", "token": " in the middle of an answer"}
        return EngineError(
            f"The engine of {self.model!r} on this device has been silent for "
            f"{format_ms(self.silent_ms)}{doing[self.phase]}; longer than "
            f"{format_ms(self.limit_ms)} is taken for a stall",
            fix="Ask again in a second, the model is then loaded anew; if it stalls again, look at "
            "the device with `nearfar doctor`",
        )


class Followed:
    """One call that is watched.

    Args:
        model: Name of the model.
        phase: See `Stall`.
        limit_s: Silence that is suspicious.
        is_cold: See `Patience`.
        began_s: When it began.
        thread: Gives the native id of the thread that makes the call; `None` until that has got
            to it, `NOBODY` where it is not known.
        on_stall: Told once that it has stalled, in the watch's thread.
    """

    __slots__ = ("_before", "_limit_s", "_model", "_on_stall", "_phase", "_thread", "has_ended",
                 "silence")  # fmt: skip

    def __init__(
        self, model: str, phase: Phase, limit_s: float, *, is_cold: bool, began_s: float,
        thread: Callable[[], int | None], on_stall: Callable[[Stall], None],
    ) -> None:  # fmt: skip
        self._model = model
        self._phase: Phase = phase
        self._limit_s = limit_s
        self._thread: Callable[[], int | None] | None = thread
        self._on_stall: Callable[[Stall], None] | None = on_stall
        self._before: Sample | None = None
        self.silence = Silence(limit_s, is_cold=is_cold, began_s=began_s)
        self.has_ended = False

    def end(self) -> None:
        """The call has ended; idempotent."""
        self.has_ended = True
        self._thread = self._on_stall = None  # which hold what the call was given and gave

    def look(self, now_s: float) -> None:
        """It is due to be looked at."""
        thread, on_stall = self._thread, self._on_stall
        if thread is None or on_stall is None:
            return
        native_id = thread()
        # A thread that waits for a processor before it makes the call says nothing of the engine.
        after = None if native_id is None else sample(native_id)
        found = Life.UNSEEN if native_id is None else life(self._before, after)
        self._before = after
        if not self.silence.look(now_s, found):
            return
        self.end()
        stall = Stall(
            model=self._model, phase=self._phase, silent_ms=self.silence.counted_s * 1000.0,
            limit_ms=self._limit_s * 1000.0, life=found.value,
        )  # fmt: skip
        on_stall(stall)


class StallWatch:
    """Keeps the time of calls. Thread-safe; its thread starts with the first of them.

    Attributes:
        is_polling: Whether calls that nobody announces are looked for just now; see `rouse`.
        was_touched: Set by those who make such calls.
    """

    def __init__(self) -> None:
        self.is_polling = False
        self.was_touched = False
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Followed]] = []
        self._order = itertools.count()
        self._polled: weakref.WeakSet[Polled] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._clear_at = _MOST_ENDED
        self._polls_left = 0
        self._poll_at_s = 0.0

    def follow(self, one: Followed) -> None:
        """Watch a call until it says that it has ended."""
        with self._changed:
            if len(self._due) >= self._clear_at:
                self._due = [entry for entry in self._due if not entry[2].has_ended]
                heapq.heapify(self._due)
                self._clear_at = 2 * len(self._due) + _MOST_ENDED
            self._push(one)
            self._ensure(self._due[0][2] is one)

    def poll(self, calls: Polled) -> None:
        """Look for calls that are made without being announced."""
        self._polled.add(calls)

    def rouse(self) -> None:
        """Such a call is being made, and nobody has looked for any for a while."""
        with self._changed:
            self.is_polling = True
            self._polls_left = _POLLS
            self._poll_at_s = time.monotonic() + _POLL_S
            self._ensure(True)

    def close(self) -> None:
        """End the thread; idempotent."""
        with self._changed:
            self._is_closed = True
            thread, self._thread = self._thread, None
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)

    def _push(self, one: Followed) -> None:
        heapq.heappush(self._due, (one.silence.due_s, next(self._order), one))

    def _ensure(self, is_news: bool) -> None:
        if self._is_closed:
            return
        if self._thread is None or not self._thread.is_alive():  # a fork has no threads
            self._thread = threading.Thread(target=self._run, name="nearfar-stalls", daemon=True)
            self._thread.start()
        elif is_news:
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._is_closed:
                    return
                due = self._due
                while due and due[0][2].has_ended:
                    heapq.heappop(due)
                at_s = due[0][0] if due else None
                if self.is_polling and (at_s is None or self._poll_at_s < at_s):
                    at_s = self._poll_at_s
                if at_s is None:
                    self._changed.wait()
                    continue
                now_s = time.monotonic()
                if at_s > now_s:
                    self._changed.wait(at_s - now_s)
                    continue
                one = None
                if due and due[0][0] <= now_s:
                    one = heapq.heappop(due)[2]
                elif self.is_polling:
                    self._poll(now_s)
            if one is not None:
                # Not under the lock: whoever is told of a stall may ask for something here.
                one.look(now_s)
                if not one.has_ended:
                    with self._changed:
                        self._push(one)

    def _poll(self, now_s: float) -> None:
        self._poll_at_s = now_s + _POLL_S
        self._polls_left = _POLLS if self.was_touched else self._polls_left - 1
        self.was_touched = False
        found = False
        for calls in tuple(self._polled):
            for one in calls.unseen():
                self._push(one)
                found = True
        if self._polls_left <= 0 and not found:
            self.is_polling = False
            if self.was_touched:  # since the look above; whoever comes now calls `rouse`
                self.is_polling, self._polls_left = True, _POLLS


class Polled:
    """Calls of one model that are made in their callers' threads, and not announced.

    Args:
        model: Name of the model.
        gate: Whose slots they hold, with `Slot.patience` set.
        on_stall: Told which of them has stalled.
    """

    def __init__(self, model: str, gate: SlotGate, on_stall: Callable[[Slot, Stall], None]) -> None:
        self._model = model
        self._gate = gate
        self._on_stall = on_stall
        self._seen: dict[int, tuple[Slot, Followed]] = {}

    def unseen(self) -> list[Followed]:
        """Those that have begun since the last call of this."""
        seen, running = self._seen, self._gate.running()
        self._seen = {id(slot): seen[id(slot)] for slot in running if id(slot) in seen}
        for key, (_, one) in seen.items():
            if key not in self._seen:
                one.end()
        return [
            self._follow(slot, slot.patience)
            for slot in running
            if slot.patience is not None and id(slot) not in seen
        ]

    def _follow(self, slot: Slot, patience: Patience) -> Followed:
        def on_stall(stall: Stall) -> None:
            if not slot.held_s:  # else it ended since it was looked for
                self._on_stall(slot, stall)

        one = Followed(
            self._model, "batch", patience.first_s, is_cold=patience.is_cold,
            began_s=slot.started_s, thread=lambda: _native_id(slot.thread), on_stall=on_stall,
        )  # fmt: skip
        self._seen[id(slot)] = slot, one
        return one


def _native_id(ident: int) -> int:
    found = next((one.native_id for one in threading.enumerate() if one.ident == ident), None)
    return NOBODY if found is None else found
