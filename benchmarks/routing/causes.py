"""Why requests are late that the oracle answers in time: what the router did and thought."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from benchmarks.routing.policies import Oracle, Ours, Plan
from benchmarks.routing.scenarios import Scenario
from benchmarks.routing.sensor import Sensor
from benchmarks.routing.simulate import simulate
from benchmarks.routing.world import Job, Nature, Visit, World
from sdk.routing import Route, RouteDecision

UNAVOIDABLE = "late for the oracle too"
BURDENED = "neither route could, after earlier choices"


class Watched(Ours):
    """The client's router, and what either route would have made of each request when it came."""

    def __init__(
        self, nature: Nature, world: World, rng: random.Random, sensor: Sensor | None = None
    ) -> None:
        super().__init__(nature, rng, sensor=sensor)
        self._world = world
        self.seen: dict[int, tuple[Visit, Visit, RouteDecision]] = {}

    def plan(self, job: Job, now_s: float) -> Plan:
        edge = self._world.foresee("edge", job, now_s)
        cloud = self._world.foresee("cloud", job, now_s)
        self.seen[job.number] = edge, cloud, self.decide(job, now_s)
        return super().plan(job, now_s)


def causes(scenario: Scenario, seeds: Sequence[int]) -> dict[str, float]:
    """Percent of all requests that were late, by cause, the most frequent first."""
    found: Counter[str] = Counter()
    count = 0
    for seed in seeds:
        nature = scenario.draw(seed)
        world = World(nature)
        best = simulate(world, Oracle(world))
        world = World(nature)
        router = Watched(nature, world, random.Random(seed), Sensor(nature, seed))
        for job, ours, theirs in zip(nature.jobs, simulate(world, router), best, strict=True):
            count += 1
            if ours.is_in_time:
                continue
            if not theirs.is_in_time:
                found[UNAVOIDABLE] += 1
            else:
                found[_cause(*router.seen[job.number])] += 1
    return {cause: 100.0 * times / count for cause, times in found.most_common()}


def _cause(edge: Visit, cloud: Visit, decision: RouteDecision) -> str:
    other: Route = "cloud" if decision.route == "edge" else "edge"
    if (edge if other == "edge" else cloud).ending != "answered":
        return BURDENED
    if not decision.meets_deadline:
        return f"{decision.route} taken, both thought to be late"
    thought = "both" if decision.inputs.meets_deadline(other) else "only that"
    return f"{decision.route} taken, {thought} thought to be in time"
