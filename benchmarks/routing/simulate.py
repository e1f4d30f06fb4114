"""Run one policy through one world: a virtual clock and a heap of events."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness import quantile
from benchmarks.routing.policies import Ended, Plan, Policy, Try
from benchmarks.routing.world import Job, World


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one request.

    Attributes:
        latency_ms: Time until the caller had an answer, or knew that there is none.
        is_in_time: Whether it was an answer.
        attempts: How many routes were taken for it.
        route: The last one.
    """

    arrival_s: float
    latency_ms: float
    is_in_time: bool
    attempts: int
    route: str


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
    """

    attainment: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    extra: float
    on_cloud: float

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
        )


@dataclass(slots=True)
class _Request:
    job: Job
    plan: Plan
    attempts: int = 0


def simulate(world: World, policy: Policy) -> list[Result]:
    """Let a policy route all requests of a world; results in order of arrival."""
    order = itertools.count()
    # (time, number for equal times, request, attempt to start or how one ended)
    events: list[tuple[float, int, _Request, Try | Ended]] = []
    arrivals = iter(world.nature.jobs)
    coming = next(arrivals, None)
    results: dict[int, Result] = {}

    def start(request: _Request, step: Try, now_s: float) -> None:
        request.attempts += 1
        policy.started(request.job, step.route, now_s)
        visit = world.start(step.route, request.job, now_s)
        ended = Ended(visit=visit, started_s=now_s)
        heapq.heappush(events, (visit.end_s, next(order), request, ended))

    def go(request: _Request, step: Try, now_s: float) -> None:
        if step.delay_s:
            heapq.heappush(events, (now_s + step.delay_s, next(order), request, step))
        else:
            start(request, step, now_s)

    while coming is not None or events:
        if coming is not None and (not events or coming.arrival_s < events[0][0]):
            request = _Request(coming, policy.plan(coming, coming.arrival_s))
            go(request, next(request.plan), coming.arrival_s)
            coming = next(arrivals, None)
            continue
        now_s, _, request, event = heapq.heappop(events)
        if isinstance(event, Try):
            start(request, event, now_s)
            continue
        job, visit = request.job, event.visit
        policy.ended(job, visit.route, event)
        try:
            go(request, request.plan.send(event), now_s)
        except StopIteration:
            results[job.number] = Result(
                arrival_s=job.arrival_s,
                latency_ms=(now_s - job.arrival_s) * 1000.0,
                is_in_time=visit.ending == "answered",
                attempts=request.attempts,
                route=visit.route,
            )
    return [results[number] for number in sorted(results)]
