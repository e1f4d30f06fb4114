"""Run one policy through one world: a virtual clock and a heap of events."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Union

from benchmarks.harness import quantile
from benchmarks.routing.policies import Ended, Plan, Policy, Try
from benchmarks.routing.world import Job, Visit, World
from sdk.routing import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one request.

    Attributes:
        latency_ms: Time until the caller had an answer, or knew that there is none.
        is_in_time: Whether it was an answer.
        attempts: How many routes were taken for it.
        route: The last one.
        cloud_calls: How many of them were the cloud.
        energy_j: What it took of the device's energy; see `_energy_j`.
    """

    arrival_s: float
    latency_ms: float
    is_in_time: bool
    attempts: int
    route: str
    cloud_calls: int = 0
    energy_j: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A run in figures.

    Attributes:
        attainment: Percent of requests answered by their deadline.
        p50_ms: Median time until the caller knew. A request that was missed counts with its
            deadline: that is when the client gives up.
        p95_ms: 95th percentile of the same.
        p99_ms: 99th percentile of the same.
        extra: Attempts beyond one for each request, in percent of requests.
        on_cloud: Requests that ended in the cloud, in percent.
        cloud_calls: What is paid for: cloud calls for 100 requests.
        energy_j: Of the device, for one request.
        latencies_ms: All of them, ascending; runs are pooled for rare events.
    """

    attainment: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    extra: float
    on_cloud: float
    cloud_calls: float
    energy_j: float
    latencies_ms: tuple[float, ...]

    @classmethod
    def of(cls, results: Sequence[Result]) -> Score:
        ordered = sorted(result.latency_ms for result in results)
        count = len(results)
        return cls(
            attainment=100.0 * sum(result.is_in_time for result in results) / count,
            p50_ms=quantile(ordered, 0.5),
            p95_ms=quantile(ordered, 0.95),
            p99_ms=quantile(ordered, 0.99),
            extra=100.0 * sum(result.attempts - 1 for result in results) / count,
            on_cloud=100.0 * sum(result.route == "cloud" for result in results) / count,
            cloud_calls=100.0 * sum(result.cloud_calls for result in results) / count,
            energy_j=sum(result.energy_j for result in results) / count,
            latencies_ms=tuple(ordered),
        )


@dataclass(slots=True)
class _Request:
    job: Job
    plan: Plan
    attempts: int = 0
    cloud_calls: int = 0
    energy_j: float = 0.0
    first: Try | None = None
    open: dict[Route, tuple[Visit, float]] = field(default_factory=dict)
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class _Silent:
    """An attempt may have been silent for too long: ask for another one, or tell of a stall."""

    attempt: int
    kind: str


#: Fields of a `Score` as tables show them: name, title, unit.
COLUMNS = (
    ("attainment", "SLO attainment", "%"),
    ("p50_ms", "p50", "ms"),
    ("p95_ms", "p95", "ms"),
    ("p99_ms", "p99", "ms"),
    ("extra", "extra requests", "%"),
    ("on_cloud", "on the cloud", "%"),
)

Event = Union[Try, Ended, _Silent]

#: A small board at work.
_DEVICE_W = 10.0
#: LTE at 5 Mbit/s upwards: (438 mW for each Mbit/s + 1288 mW) * 1.6 s (Huang et al., MobiSys 2012,
#: "A Close Examination of Performance and Power Characteristics of 4G LTE Networks").
_UPLOAD_J_PER_MB = 5.6


def _energy_j(job: Job, visit: Visit) -> float:
    """Energy of one attempt: computing, or sending; one that is given up counts whole."""
    if visit.route == "edge":
        return visit.compute_ms / 1000.0 * _DEVICE_W
    return job.upload_bytes / 1e6 * _UPLOAD_J_PER_MB


def simulate(world: World, policy: Policy) -> list[Result]:
    """Let a policy route all requests of a world; results in order of arrival."""
    run = _Run(world, policy)
    arrivals = iter(world.nature.jobs)
    coming = next(arrivals, None)
    while coming is not None or run.events:
        if coming is not None and (not run.events or coming.arrival_s < run.events[0][0]):
            run.arrive(coming)
            coming = next(arrivals, None)
        else:
            run.step()
    return [run.results[number] for number in sorted(run.results)]


class _Run:
    def __init__(self, world: World, policy: Policy) -> None:
        self._world = world
        self._policy = policy
        self._order = itertools.count()
        # (time, number for equal times, request, what happens)
        self.events: list[tuple[float, int, _Request, Event]] = []
        self.results: dict[int, Result] = {}

    def arrive(self, job: Job) -> None:
        request = _Request(job, self._policy.plan(job, job.arrival_s))
        self._go(request, next(request.plan), job.arrival_s)

    def step(self) -> None:
        now_s, _, request, event = heapq.heappop(self.events)
        if isinstance(event, Try):
            self._start(request, event, now_s)
        elif isinstance(event, Ended):
            self._ended(request, event, now_s)
        elif event.attempt == request.attempts and request.open:
            if event.kind == "stall":
                self._policy.stalled(request.job, now_s)
            else:
                step = self._policy.hedge(request.job, now_s)
                if isinstance(step, float):
                    self._push(now_s + step, request, _Silent(event.attempt, event.kind))
                elif step is not None:
                    self._start(request, step, now_s)

    def _push(self, at_s: float, request: _Request, event: Event) -> None:
        heapq.heappush(self.events, (at_s, next(self._order), request, event))

    def _go(self, request: _Request, step: Try, now_s: float) -> None:
        if step.delay_s:
            self._push(now_s + step.delay_s, request, step)
        else:
            self._start(request, step, now_s)

    def _start(self, request: _Request, step: Try, now_s: float) -> None:
        request.attempts += 1
        self._policy.started(request.job, step.route, now_s)
        visit = self._world.start(step.route, request.job, now_s)
        request.cloud_calls += step.route == "cloud"
        request.energy_j += _energy_j(request.job, visit)
        request.open[step.route] = visit, now_s
        self._push(visit.end_s, request, Ended(visit=visit, started_s=now_s))
        for after_s, kind in ((step.hedge_after_s, "hedge"), (step.stall_after_s, "stall")):
            if after_s is not None:
                self._push(now_s + after_s, request, _Silent(request.attempts, kind))

    def _ended(self, request: _Request, ended: Ended, now_s: float) -> None:
        job, visit = request.job, ended.visit
        if request.is_over:
            return  # given up before
        del request.open[visit.route]
        self._policy.ended(job, visit.route, ended)
        if visit.ending != "answered" and request.open:
            return  # the other one may still answer
        for other, _ in request.open.values():
            self._world.cancel(other, now_s)
            self._policy.cancelled(job, other.route, now_s)
        request.open.clear()
        try:
            self._go(request, request.plan.send(ended), now_s)
        except StopIteration:
            request.is_over = True
            self.results[job.number] = Result(
                arrival_s=job.arrival_s,
                latency_ms=(now_s - job.arrival_s) * 1000.0,
                is_in_time=visit.ending == "answered",
                attempts=request.attempts,
                route=visit.route,
                cloud_calls=request.cloud_calls,
                energy_j=request.energy_j,
            )
