"""Simulated requests while a simulated cloud dies, stops and loses its connections.

The router is the client's own, the clock is virtual (see `benchmarks.routing`), and what keeps a
request from being computed twice is the cloud runtime's own `RecentRuns`.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import msgspec

from benchmarks.routing.policies import Ours
from benchmarks.routing.scenarios import DURATION_S, Scenario, scenarios
from benchmarks.routing.simulate import Result, simulate
from benchmarks.routing.world import Job, Nature, Visit, Window, World, end_of
from cloud_runtime.executor import Ticket
from cloud_runtime.recent import RecentRuns, SharedRun
from sdk.routing import Route, RouteDecision, decide

#: A steady link and one that varies, with a device that is busy now and then.
SCENARIOS = ("fibre", "cellular")
#: Mean pause between two faults.
PAUSE_S = 4.0
KILL_S, FREEZE_S = (1.0, 4.0), (0.2, 3.0)
WEDGES = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Troubles:
    """What happens to the cloud in one run.

    Attributes:
        kills: From the kill to the moment at which it listens again; what it knew is lost.
        freezes: From SIGSTOP to SIGCONT; it accepts and answers nothing.
        resets: When all connections are reset; the server lives on.
    """

    kills: Sequence[Window]
    freezes: Sequence[Window]
    resets: Sequence[float]

    @classmethod
    def draw(cls, rng: random.Random) -> Troubles:
        """One after the other, of each kind as likely."""
        kills: list[Window] = []
        freezes: list[Window] = []
        resets: list[float] = []
        at_s = rng.expovariate(1.0 / PAUSE_S)
        while at_s < DURATION_S:
            kind: Literal["kill", "freeze", "reset"] = rng.choice(("kill", "freeze", "reset"))
            end_s = at_s
            if kind == "reset":
                resets.append(at_s)
            else:
                end_s += rng.uniform(*(KILL_S if kind == "kill" else FREEZE_S))
                (kills if kind == "kill" else freezes).append(Window(at_s, end_s))
            at_s = end_s + rng.expovariate(1.0 / PAUSE_S)
        return cls(kills=kills, freezes=freezes, resets=resets)

    def life(self, at_s: float) -> int:
        """How often the server was killed before a moment."""
        return sum(window.begin_s <= at_s for window in self.kills)

    def lost_s(self, from_s: float, to_s: float) -> float | None:
        """When a connection that is in use between two moments is lost, if it is."""
        moments = [*self.resets, *(window.begin_s for window in self.kills)]
        return min((at_s for at_s in moments if from_s < at_s < to_s), default=None)


class Insistent(Ours):
    """The client's router; every third request insists on the cloud, and has no other route.

    Such a request is sent again where its connection was lost: to a server that knows it already.
    """

    def decide(self, job: Job, now_s: float, failed: tuple[Route, ...] = ()) -> RouteDecision:
        """As `Ours.decide`."""
        decision = super().decide(job, now_s, failed)
        if job.number % 3:
            return decision
        inputs = decision.inputs
        # As `sdk.knowledge` has it: the only route is asked however often it failed.
        cloud = msgspec.structs.replace(inputs.cloud, obstacle="", detail="")
        return decide(msgspec.structs.replace(inputs, cloud=cloud, mode="cloud_only"))


@dataclass(frozen=True, slots=True)
class _Computation:
    """Stands where the future of a computation stands: the virtual clock tells whether it ended."""

    begin_s: float
    end_s: float
    clock: Callable[[], float]
    outputs: tuple[()] = ()

    def done(self) -> bool:
        return self.clock() >= self.end_s

    def cancelled(self) -> bool:
        return False

    def exception(self) -> None:
        return None

    def result(self) -> Any:
        return _NoOutputs()

    def add_done_callback(self, function: Callable[[Any], None]) -> None:
        """`RecentRuns.join` looks at `done` itself."""


class _NoOutputs:
    outputs: dict[str, Any] = {}  # noqa: RUF012 (never written)


class TroubledWorld(World):
    """A world whose cloud is in trouble.

    Attributes:
        computed: How often each life of the server computed each request: (life, number).
        sent: How often each life was sent each request.
    """

    def __init__(self, nature: Nature, troubles: Troubles) -> None:
        super().__init__(nature)
        self._troubles = troubles
        self._now_s = 0.0
        self._lives: dict[int, RecentRuns] = {}
        self.computed: Counter[tuple[int, int]] = Counter()
        self.sent: Counter[tuple[int, int]] = Counter()
        # Who stops waiting when: (moment, number for equal moments, visit)
        self._leaving: list[tuple[float, int, int]] = []
        self._stays: dict[int, tuple[Visit, tuple[str, bytes], SharedRun, int]] = {}

    def start(self, route: Route, job: Job, now_s: float) -> Visit:
        """As `World.start`; a request that the cloud computed already is not computed again."""
        self._advance(now_s)
        visit = super().start(route, job, now_s)
        if route == "edge":
            return visit
        troubles, life = self._troubles, self._troubles.life(now_s)
        if visit.after is None:
            return visit  # refused
        arrived_s = now_s + job.rtt_s / 2
        done_s = visit.end_s - job.rtt_s / 2
        begin_s = done_s - visit.compute_ms / 1000.0

        def begin(ticket: Ticket) -> Any:
            return _Computation(begin_s, done_s, lambda: self._now_s)

        recent = self._lives.setdefault(life, RecentRuns(clock=lambda: self._now_s))
        key = ("lab", job.number.to_bytes(16, "big"))
        self.sent[life, job.number] += 1
        run = recent.join(key, job.upload_bytes, begin)
        found = cast(_Computation, run.future)
        end_s = max(found.end_s, arrived_s) + job.rtt_s / 2
        end_s += self._frozen_s(now_s, end_s)
        ending = visit.ending
        if ending == "answered" or found.end_s < done_s:
            ending = "answered" if end_s <= job.deadline_s else "late"
        end_s = min(end_s, job.deadline_s)
        lost_s = troubles.lost_s(now_s, end_s)
        if lost_s is not None and lost_s + job.rtt_s / 2 < job.deadline_s:
            ending, end_s = "unavailable", lost_s + job.rtt_s / 2
        visit = replace(visit, ending=ending, end_s=end_s)
        self._stays[id(visit)] = visit, key, run, life
        heapq.heappush(self._leaving, (end_s, job.number, id(visit)))
        return visit

    def foresee(self, route: Route, job: Job, now_s: float) -> Visit:
        """As `World.foresee`, without what happens to the connection later."""
        until_s = end_of(self._troubles.kills, now_s) if route == "cloud" else None
        if until_s is None:
            return super().foresee(route, job, now_s)
        end_s = min(now_s + job.rtt_s, job.deadline_s)  # nothing listens
        return Visit(route="cloud", ending="unavailable", end_s=end_s)

    def cancel(self, visit: Visit, now_s: float) -> None:
        """As `World.cancel`."""
        super().cancel(visit, now_s)
        self._advance(now_s)
        if id(visit) in self._stays:
            self._leave(id(visit), now_s)

    def finish(self) -> None:
        """Let everything that was begun come to its end."""
        self._advance(float("inf"))

    def _frozen_s(self, from_s: float, to_s: float) -> float:
        """How long the server stands still in the meantime."""
        frozen_s = 0.0
        for window in self._troubles.freezes:
            if window.begin_s < to_s + frozen_s and window.end_s > from_s:
                frozen_s += window.end_s - max(window.begin_s, from_s)
        return frozen_s

    def _advance(self, now_s: float) -> None:
        while self._leaving and self._leaving[0][0] <= now_s:
            at_s, _, stay = heapq.heappop(self._leaving)
            if stay in self._stays:
                self._leave(stay, at_s)
        self._now_s = max(self._now_s, min(now_s, 1e12))

    def _leave(self, stay: int, at_s: float) -> None:
        """Nobody waits for it any more; what the engine has begun it ends, and it counts."""
        _, key, run, life = self._stays.pop(stay)
        self._now_s = max(self._now_s, at_s)
        computation = cast(_Computation, run.future)
        if self._now_s >= computation.begin_s and run.ticket._state == "waiting":
            run.ticket.begin()
            self.computed[life, int.from_bytes(key[1], "big")] += 1
        self._lives[life].leave(key, run)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """All runs together.

    Attributes:
        requests: How many were asked.
        results: What became of them; fewer than asked when some hung.
        late_ms: By how much each result came after its deadline; negative before it.
        faults: How often each was done.
        refusals: Codes of the errors that callers were told.
        computed_twice: Requests that one life of a server computed more than once.
        sent_twice: Requests that one life of a server was sent more than once.
        computed: Computations in the cloud.
    """

    requests: int
    results: Sequence[Result]
    late_ms: Sequence[float]
    faults: Counter[str]
    refusals: Counter[str]
    computed_twice: int
    sent_twice: int
    computed: int


def run(*, requests: int, seed: int, step: Callable[[], None] = lambda: None) -> Simulated:
    """Simulate runs of two minutes until so many requests were asked.

    Args:
        requests: At least so many.
        seed: First seed; each run has its own.
        step: Called after each run.
    """
    by_name = {scenario.name: scenario for scenario in scenarios(None)}
    results: list[Result] = []
    late_ms: list[float] = []
    faults: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    asked = twice = sent_twice = computed = 0
    while asked < requests:
        scenario: Scenario = by_name[SCENARIOS[seed % len(SCENARIOS)]]
        rng = random.Random(f"chaos {scenario.name} {seed}")
        troubles = Troubles.draw(rng)
        nature = scenario.draw(seed)
        jobs = [replace(job, cloud_wedges=rng.random() < WEDGES) for job in nature.jobs]
        nature = replace(nature, jobs=jobs)
        world, policy = TroubledWorld(nature, troubles), Insistent(nature, rng)
        found = simulate(world, policy)
        world.finish()
        deadline_ms = {job.arrival_s: (job.deadline_s - job.arrival_s) * 1000.0 for job in jobs}
        late_ms += [one.latency_ms - deadline_ms[one.arrival_s] for one in found]
        results += found
        asked += len(jobs)
        faults.update(
            kill=len(troubles.kills), freeze=len(troubles.freezes), reset=len(troubles.resets)
        )
        refusals += policy.refusals
        twice += sum(count > 1 for count in world.computed.values())
        sent_twice += sum(count > 1 for count in world.sent.values())
        computed += sum(world.computed.values())
        seed += 1
        step()
    return Simulated(
        requests=asked, results=results, late_ms=late_ms, faults=faults, refusals=refusals,
        computed_twice=twice, sent_twice=sent_twice, computed=computed,
    )  # fmt: skip
