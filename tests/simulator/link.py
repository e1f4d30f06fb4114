"""The network between two ends: it delays, cuts, and belongs to an attacker now and then."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

#: What the attacker does to one message of those he touches.
ATTACKS = ("flip", "drop", "repeat", "swap", "truncate", "replay", "cut")


class Clock:
    """Virtual time: events in the order of their times, ties in the order of scheduling.

    Attributes:
        now_s: Virtual seconds.
        ticks: Events so far.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.ticks = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._order), event))

    def run(self, until: Callable[[], bool], limit_s: float) -> None:
        """Let things happen until that holds, nothing is left to happen, or time is up."""
        while self._events and not until():
            at_s, _, event = heapq.heappop(self._events)
            if at_s > limit_s:
                return
            self.now_s = at_s
            self.ticks += 1
            event()


@dataclass
class Faults:
    """How bad the network is.

    Attributes:
        attack: Probability that a message is touched.
        cut_after_s: The connection is cut at about this age; infinity never.
        delay_s: Longest delay of a message.
        past: Messages of earlier connections, for replays.
    """

    attack: float
    cut_after_s: float
    delay_s: float
    past: list[bytes] = field(default_factory=list)


class Wire:
    """One websocket connection. Messages keep their order, as TCP has it, unless attacked."""

    def __init__(self, clock: Clock, rng: random.Random, faults: Faults) -> None:
        self._clock = clock
        self._rng = rng
        self._faults = faults
        self._free_at_s = {"client": 0.0, "server": 0.0}
        self._held: dict[str, bytes | None] = {"client": None, "server": None}
        self.deliver: dict[str, Callable[[bytes], None]] = {}
        self.lost: dict[str, Callable[[], None]] = {}
        self.is_cut = False
        if faults.cut_after_s != float("inf"):
            clock.after(rng.uniform(0.2, 1.8) * faults.cut_after_s, self.cut)

    def send(self, to: str, message: bytes) -> None:
        """Towards ``client`` or ``server``."""
        if self.is_cut:
            return
        for sent in self._attacked(to, message):
            self._schedule(to, sent)
        self._faults.past.append(message)
        if len(self._faults.past) > 64:
            del self._faults.past[0]

    def cut(self) -> None:
        """What is under way is lost; each end notices in its own time."""
        if self.is_cut:
            return
        self.is_cut = True
        for end in ("client", "server"):
            self._clock.after(self._rng.uniform(0, self._faults.delay_s), self.lost[end])

    def _schedule(self, to: str, message: bytes) -> None:
        # TCP: nothing overtakes what was sent before.
        delay_s = self._rng.uniform(0, self._faults.delay_s)
        at_s = max(self._clock.now_s + delay_s, self._free_at_s[to])
        self._free_at_s[to] = at_s
        self._clock.after(at_s - self._clock.now_s, lambda: self._arrive(to, message))

    def _arrive(self, to: str, message: bytes) -> None:
        if not self.is_cut:
            self.deliver[to](message)

    def _attacked(self, to: str, message: bytes) -> list[bytes]:
        held, self._held[to] = self._held[to], None
        rng = self._rng
        if rng.random() >= self._faults.attack:
            return [message] if held is None else [message, held]
        attack = rng.choice(ATTACKS)
        changed: list[bytes]
        if attack == "flip":
            damaged = bytearray(message)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            changed = [bytes(damaged)]
        elif attack == "truncate":
            changed = [message[: rng.randrange(len(message))]]
        elif attack == "repeat":
            changed = [message, message]
        elif attack == "replay" and self._faults.past:
            changed = [message, rng.choice(self._faults.past)]
        elif attack == "swap":
            self._held[to], changed = message, []
        elif attack == "cut":
            self.cut()
            changed = []
        else:
            changed = []
        return changed if held is None else [*changed, held]
