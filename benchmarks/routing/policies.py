"""What is compared: fixed rules, two well-known adaptive ones, the client's router, the oracle.

A policy is asked for a plan per request: a generator that yields the route of each attempt and is
told how it ended, as `sdk.routing.attempts` does. None but the oracle sees the world.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from benchmarks.routing.sensor import Sensor
from benchmarks.routing.world import Job, Nature, Speed, Visit, World, factor_at
from nearfar.bundle.manifest import LatencyFigure
from nearfar.errors import CloudUnavailable, DeadlineExceeded, NearfarError
from sdk.policy import Verdict
from sdk.routing import (
    CircuitBreaker,
    DecisionInputs,
    Observation,
    Outcome,
    Predictor,
    RequestSize,
    Route,
    RouteDecision,
    RouteState,
    Ticket,
    attempts,
    decide,
)
from sdk.routing.hedging import HedgePlan, Hedging, stalls_after_ms
from sdk.routing.hedging import plan as plan_hedge
from sdk.routing.types import HEDGE_BUDGET

MODEL = "lab"
OURS, OURS_UNHEDGED = "nearfar", "nearfar, no hedging"
OURS_UNSENSED, OURS_PARTLY = "nearfar, without a sensor", "nearfar, sensor misses a third"
OURS_TOLD = "nearfar, told of its device"
#: Of the times in which the device is slow, how many a sensor of clocks misses for `OURS_PARTLY`.
MISSED = 1.0 / 3.0
#: What anyone may know: policy allows both routes, and nothing here is content.
ALLOWED = Verdict(edge=True, cloud=True, rule_ids=("lab",), reason="allowed", policy_hash="lab")
#: How far a bundle's figures are off, measured on another machine than the one that runs.
SEED_ERROR = 1.25


#: What the device's queue takes a call that ran past its estimate to need still, of its age.
OVERRUN_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One attempt of a plan.

    Attributes:
        route: Where.
        delay_s: How long to wait before it starts.
        hedge_after_s: After so long without an answer `Policy.hedge` is asked.
        stall_after_s: After so long without an answer `Policy.stalled` is told.
    """

    route: Route
    delay_s: float = 0.0
    hedge_after_s: float | None = None
    stall_after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How an attempt ended, as a client sees it.

    Attributes:
        visit: The ending, when, and the runtime's own times where it answered.
        started_s: When the attempt started.
    """

    visit: Visit
    started_s: float

    @property
    def total_ms(self) -> float:
        return (self.visit.end_s - self.started_s) * 1000.0


Plan = Generator[Try, Ended, None]


class Policy(Protocol):
    """Chooses routes."""

    @property
    def name(self) -> str:
        """Name in the report."""

    def plan(self, job: Job, now_s: float) -> Plan:
        """Attempts for a request that has come now."""

    def started(self, job: Job, route: Route, now_s: float) -> None:
        """An attempt starts."""

    def ended(self, job: Job, route: Route, ended: Ended) -> None:
        """An attempt ended; comes before the plan is told."""

    def hedge(self, job: Job, now_s: float) -> Try | float | None:
        """What to start beside an attempt that has not answered, or when to be asked again (s)."""

    def stalled(self, job: Job, now_s: float) -> None:
        """An attempt has been silent for longer than it should be."""

    def cancelled(self, job: Job, route: Route, now_s: float) -> None:
        """An attempt was given up because another one answered."""


class Unhedged:
    """The part of a policy that never starts two attempts at once."""

    def started(self, job: Job, route: Route, now_s: float) -> None:
        pass

    def ended(self, job: Job, route: Route, ended: Ended) -> None:
        pass

    def hedge(self, job: Job, now_s: float) -> Try | float | None:
        return None

    def stalled(self, job: Job, now_s: float) -> None:
        pass

    def cancelled(self, job: Job, route: Route, now_s: float) -> None:
        pass


class Fixed(Unhedged):
    """A rule that looks at nothing but the request."""

    def __init__(self, name: str, rule: Callable[[Job], Route]) -> None:
        self.name = name
        self._rule = rule

    def plan(self, job: Job, now_s: float) -> Plan:
        yield Try(route=self._rule(job))


THRESHOLDS_BYTES = (4_000, 8_000, 12_000, 16_000, 24_000, 36_000)


def fixed_policies() -> list[Fixed]:
    """Edge only, cloud only, and every threshold in both directions."""

    def below(threshold: int, route: Route, other: Route) -> Callable[[Job], Route]:
        return lambda job: route if job.upload_bytes <= threshold else other

    return [
        Fixed("edge only", lambda job: "edge"),
        Fixed("cloud only", lambda job: "cloud"),
        *(
            Fixed(f"edge up to {size // 1000} KB", below(size, "edge", "cloud"))
            for size in THRESHOLDS_BYTES
        ),
        *(
            Fixed(f"cloud up to {size // 1000} KB", below(size, "cloud", "edge"))
            for size in THRESHOLDS_BYTES
        ),
    ]


class MeanOfTen(Unhedged):
    """The lower mean of the last ten latencies, as latency-based routing of LiteLLM has it.

    A request that failed or was late counts with its whole time.
    """

    name = "mean of 10"

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._seen: dict[Route, deque[float]] = {
            "edge": deque(maxlen=10),
            "cloud": deque(maxlen=10),
        }

    def _score(self, route: Route) -> float:
        seen = self._seen[route]
        return sum(seen) / len(seen) if seen else 0.0

    def plan(self, job: Job, now_s: float) -> Plan:
        routes: list[Route] = ["edge", "cloud"]
        self._rng.shuffle(routes)
        first = min(routes, key=self._score)
        ended = yield Try(route=first)
        if ended.visit.ending == "unavailable":
            yield Try(route=_other(first))

    def ended(self, job: Job, route: Route, ended: Ended) -> None:
        penalty = 10.0 if ended.visit.ending == "unavailable" else 1.0
        self._seen[route].append(ended.total_ms * penalty)


class PeakEwma(Unhedged):
    """Peak EWMA with outstanding requests, as in Finagle: up at once, down with a time constant."""

    name = "peak EWMA"
    TAU_S = 10.0

    def __init__(self) -> None:
        self._cost: dict[Route, float] = {"edge": 0.0, "cloud": 0.0}
        self._at_s: dict[Route, float] = {"edge": 0.0, "cloud": 0.0}
        self._outstanding: dict[Route, int] = {"edge": 0, "cloud": 0}

    def _load(self, route: Route, now_s: float) -> float:
        # An idle estimate decays towards zero, so that a route that was slow is tried again.
        age = math.exp(-(now_s - self._at_s[route]) / self.TAU_S)
        return self._cost[route] * age * (self._outstanding[route] + 1)

    def plan(self, job: Job, now_s: float) -> Plan:
        first: Route = (
            "edge" if self._load("edge", now_s) <= self._load("cloud", now_s) else "cloud"
        )
        ended = yield Try(route=first)
        if ended.visit.ending == "unavailable":
            yield Try(route=_other(first))

    def started(self, job: Job, route: Route, now_s: float) -> None:
        self._outstanding[route] += 1

    def ended(self, job: Job, route: Route, ended: Ended) -> None:
        self._outstanding[route] -= 1
        now_s, seen_ms = ended.visit.end_s, ended.total_ms
        if ended.visit.ending == "unavailable":
            seen_ms *= 10.0
        weight = math.exp(-(now_s - self._at_s[route]) / self.TAU_S)
        if seen_ms > self._cost[route]:
            self._cost[route] = seen_ms
        else:
            self._cost[route] = self._cost[route] * weight + seen_ms * (1.0 - weight)
        self._at_s[route] = now_s


class Oracle(Unhedged):
    """Knows what becomes of each request on each route, and takes the faster answer.

    When none will be in time it takes the route that the request burdens least. It looks at one
    request at a time: it does not know what is better for those that come later.
    """

    name = "oracle"

    def __init__(self, world: World) -> None:
        self._world = world

    def plan(self, job: Job, now_s: float) -> Plan:
        edge = self._world.foresee("edge", job, now_s)
        cloud = self._world.foresee("cloud", job, now_s)
        if edge.ending == "answered" and cloud.ending == "answered":
            yield Try(route="edge" if edge.end_s <= cloud.end_s else "cloud")
        elif edge.ending == "answered":
            yield Try(route="edge")
        elif cloud.ending == "answered":
            yield Try(route="cloud")
        else:
            yield Try(route="edge" if edge.after is None else "cloud")


class Ours:
    """The client's own predictor, circuit breaker, decision and repair.

    What `sdk.knowledge` and `sdk.core` do around them is repeated here without sockets: seeds from
    a bundle, the device's queue from what its requests are expected to take, learning from answers
    and from a cloud that did not answer in time, the second route for requests that are late.

    Args:
        nature: Speeds that the bundle states, and the first round trip.
        rng: For the breaker's jitter.
        hedge_budget: As in the configuration.
        sensor: What the device says of its speed; `None` when it says nothing.
    """

    def __init__(
        self,
        nature: Nature,
        rng: random.Random,
        *,
        hedge_budget: float = HEDGE_BUDGET,
        sensor: Sensor | None = None,
    ) -> None:
        self.name = OURS if hedge_budget else OURS_UNHEDGED
        if sensor is None:
            self.name = OURS_UNSENSED
        elif sensor.missed:
            self.name = OURS_PARTLY
        self.sensor = sensor
        self.hedging = Hedging(hedge_budget)
        self.predictor = Predictor()
        #: Codes of the errors that callers were told.
        self.refusals: Counter[str] = Counter()
        self._breaker = CircuitBreaker(rng=rng)
        self._running: dict[int, tuple[float, float]] = {}  # device: job to (expected ms, since)
        self._decisions: dict[int, RouteDecision] = {}
        self._plans: dict[int, HedgePlan] = {}
        self._tickets: dict[tuple[int, Route], Ticket] = {}
        speeds: dict[Route, Speed] = {"edge": nature.edge, "cloud": nature.cloud}
        for route, speed in speeds.items():
            size = nature.usual_bytes
            p50_ms = 1000.0 * speed.service_s(size) * SEED_ERROR
            figure = LatencyFigure(
                machine="another", execution_provider="CPUExecutionProvider", p50_ms=p50_ms,
                p99_ms=1.3 * p50_ms, calls=50, input_tokens=size,
            )  # fmt: skip
            self.predictor.seed(route, MODEL, [figure])
        self.predictor.observe_round_trip(nature.jobs[0].rtt_s * 1000.0, now_s=0.0)

    def _sense(self, now_s: float) -> None:
        """What the client's thread does beside its requests."""
        if self.sensor is not None:
            self.predictor.sense(self.sensor.speed(now_s))

    def decide(self, job: Job, now_s: float, failed: tuple[Route, ...] = ()) -> RouteDecision:
        self._sense(now_s)
        size = size_of(job)
        edge = self.predictor.predict(
            "edge", MODEL, size, now_s=now_s, queue_ms=self._edge_wait_ms(now_s)
        )
        if self._breaker.can_try(now_s):
            cloud = RouteState(prediction=self.predictor.predict("cloud", MODEL, size, now_s=now_s))
        else:
            cloud = RouteState(obstacle="unreachable", detail=self._breaker.describe(now_s))
        return decide(
            DecisionInputs(
                model=MODEL,
                sensitivity="public",
                verdict=ALLOWED,
                edge=RouteState(prediction=edge, ahead=len(self._running)),
                cloud=cloud,
                remaining_ms=(job.deadline_s - now_s) * 1000.0,
                size=size,
                failed=failed,
                hedge_tokens=self.hedging.tokens(now_s),
            )
        )

    def plan(self, job: Job, now_s: float) -> Plan:
        self.hedging.request()
        steps = attempts(
            self.decide(job, now_s),
            lambda failed, at_s: self.decide(job, at_s, failed),
            at_s=job.deadline_s,
        )
        attempt = next(steps)
        while True:
            decision = self._decisions[job.number] = attempt.decision
            planned = plan_hedge(decision)
            if planned is not None:
                self._plans[job.number] = planned
            watched = attempt.route == "cloud" and decision.fallback is not None
            expected = decision.inputs.state(attempt.route).prediction
            ended = yield Try(
                route=attempt.route,
                delay_s=attempt.delay_s,
                hedge_after_s=None if planned is None else planned.after_ms / 1000.0,
                stall_after_s=stalls_after_ms(expected) / 1000.0 if watched else None,
            )
            outcome = Outcome(now_s=ended.visit.end_s, error=_error(ended.visit))
            try:
                attempt = steps.send(outcome)
            except StopIteration:
                return
            except NearfarError as error:
                self.refusals[error.code] += 1
                return

    def hedge(self, job: Job, now_s: float) -> Try | float | None:
        planned, began = self._plans[job.number], self._decisions[job.number]
        again = self.decide(job, now_s)
        found = self.hedging.start(planned, began, again)
        if isinstance(found, HedgePlan):
            self._plans[job.number] = found
            return (found.after_ms - planned.after_ms) / 1000.0
        if found is None:
            return None
        self._decisions[job.number] = again
        return Try(route=planned.other)

    def stalled(self, job: Job, now_s: float) -> None:
        self._breaker.record_failure(now_s)

    def started(self, job: Job, route: Route, now_s: float) -> None:
        self._sense(now_s)
        expected = self._decisions[job.number].inputs.state(route).prediction
        self._tickets[job.number, route] = self.predictor.start(
            route, MODEL, size_of(job), expected, now_s=now_s
        )
        if route == "edge":
            self._running[job.number] = (expected.service_ms or 0.0, now_s)
        else:
            self._breaker.acquire(now_s)

    def ended(self, job: Job, route: Route, ended: Ended) -> None:
        now_s, visit = ended.visit.end_s, ended.visit
        self._sense(now_s)
        ticket = self._tickets.pop((job.number, route))
        self.predictor.stop(ticket, now_s=now_s)
        if route == "edge":
            self._edge_ended(job.number, now_s)
        elif visit.ending == "unavailable":
            self._breaker.record_failure(now_s)
        elif visit.ending == "late":
            self._breaker.release(now_s)
        else:
            self._breaker.record_success(now_s)
        if visit.ending == "answered":
            seen = Observation(
                total_ms=ended.total_ms, queue_ms=visit.queue_ms, compute_ms=visit.compute_ms
            )
            self.predictor.observe(route, MODEL, size_of(job), seen, now_s=now_s, ticket=ticket)
        elif visit.ending == "late":
            self.predictor.observe_late(ticket, now_s=now_s)

    def cancelled(self, job: Job, route: Route, now_s: float) -> None:
        self._sense(now_s)
        ticket = self._tickets.pop((job.number, route))
        self.predictor.stop(ticket, now_s=now_s)
        self.predictor.observe_late(ticket, now_s=now_s)
        if route == "edge":
            self._edge_ended(job.number, now_s)
        else:
            self._breaker.release(now_s)

    def _edge_wait_ms(self, now_s: float) -> float:
        """What is expected of those before it: the running one as far as it is not done."""
        wait_ms = 0.0
        for index, (expected_ms, since_s) in enumerate(self._running.values()):
            if index == 0:  # as `nearfar.engines.slots` reckons
                age_ms = (now_s - since_s) * 1000.0
                expected_ms = max(expected_ms - age_ms, OVERRUN_SHARE * age_ms)
            wait_ms += expected_ms
        return wait_ms

    def _edge_ended(self, number: int, now_s: float) -> None:
        was_first = next(iter(self._running)) == number
        del self._running[number]
        if was_first and self._running:  # the next one runs from now on
            first = next(iter(self._running))
            self._running[first] = (self._running[first][0], now_s)


class Told(Ours):
    """The client's router, told how slow the device is just now and when it will be free.

    No client is. How much closer it comes to the oracle says how much of what is lost is due to
    a device that becomes slow, or quick again, without a sign.
    """

    def __init__(self, world: World, rng: random.Random) -> None:
        super().__init__(world.nature, rng)
        self.name = OURS_TOLD
        self._world = world

    def decide(self, job: Job, now_s: float, failed: tuple[Route, ...] = ()) -> RouteDecision:
        slower = factor_at(self._world.nature.thermal, now_s)
        self.predictor.models["edge", MODEL].compute.level.set(slower, now_s=now_s)
        return super().decide(job, now_s, failed)

    def _edge_wait_ms(self, now_s: float) -> float:
        return self._world.edge_wait_s(now_s) * 1000.0


def size_of(job: Job) -> RequestSize:
    return RequestSize(
        upload_bytes=job.upload_bytes,
        download_bytes=job.download_bytes,
        input_elements=job.upload_bytes,
    )


def _error(visit: Visit) -> NearfarError | None:
    if visit.ending == "answered":
        return None
    if visit.ending == "late":
        return DeadlineExceeded("The deadline passed", tried=(visit.route,))
    return CloudUnavailable("The cloud cannot be reached")


def _other(route: Route) -> Route:
    return "cloud" if route == "edge" else "edge"
