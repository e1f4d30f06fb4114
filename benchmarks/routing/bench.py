"""`nearfar bench routing`: the client's router against fixed rules, others' rules and an oracle."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from benchmarks.harness import Bar, Direction, Figure, Report, Run, quantile
from benchmarks.routing.causes import causes
from benchmarks.routing.policies import (
    MISSED,
    OURS,
    OURS_PARTLY,
    OURS_TOLD,
    OURS_UNHEDGED,
    OURS_UNSENSED,
    MeanOfTen,
    Oracle,
    Ours,
    PeakEwma,
    Policy,
    Told,
    fixed_policies,
)
from benchmarks.routing.scenarios import Scenario, Use, of_group, scenarios
from benchmarks.routing.sensor import Sensor
from benchmarks.routing.simulate import COLUMNS, Score, simulate
from benchmarks.routing.world import Nature, World
from benchmarks.subjects import Begin

ORACLE = Oracle.name
ADAPTIVE = (
    MeanOfTen.name, PeakEwma.name, OURS_UNHEDGED, OURS, OURS_UNSENSED, OURS_PARTLY, OURS_TOLD,
    ORACLE,
)  # fmt: skip

MAX_BEHIND_ORACLE = -2.0  # points of SLO attainment
MIN_AHEAD_OF_STATIC = 10.0  # points, where links vary
MAX_BEHIND_STATIC = -1.0  # points, where they do not
MAX_REGRET = 10.0  # percent of the oracle's p95
MIN_TAIL_CUT = 75.0  # percent of the p99 without hedging, with wedges
MAX_EXTRA = 5.0  # percent of requests
MAX_DECISION_P50_US, MAX_DECISION_P99_US = 20.0, 100.0

#: Held-out scenarios are drawn from other seeds than tuned ones.
HELD_OUT_SEEDS = 1000
#: Calls in one sample of the decision's time, of which one is taken after each seed.
DECISION_CALLS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is simulated.

    Attributes:
        seed: First seed; each scenario runs with this many and the following ones.
        seeds: How many runs of each scenario.
        traces: Folder of Mahimahi traces; `None` for generated links only.
    """

    seed: int = 0
    seeds: int = 5
    traces: Path | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """All runs of one scenario.

    Attributes:
        scenario: Which.
        scores: Policy to one score per seed; the same index is the same world.
        causes: Why the client's router was late, in percent of requests.
    """

    scenario: Scenario
    scores: dict[str, list[Score]]
    causes: dict[str, float]

    @property
    def best_static(self) -> str:
        """The fixed rule that attained most, known only afterwards."""
        fixed = [name for name in self.scores if name not in ADAPTIVE]
        return max(fixed, key=lambda name: (self.mean(name), -self.mean(name, "p95_ms")))

    def mean(self, policy: str, field: str = "attainment") -> float:
        return fmean(getattr(score, field) for score in self.scores[policy])

    def ahead(self, policy: str, of: str) -> list[float]:
        """Points of attainment by which one policy is ahead of another, run by run."""
        return [
            ours.attainment - theirs.attainment
            for ours, theirs in zip(self.scores[policy], self.scores[of], strict=True)
        ]

    def pooled_p99_ms(self, policy: str) -> float:
        """99th percentile of all runs together: one run has too few wedges for one of its own."""
        return quantile(sorted(ms for s in self.scores[policy] for ms in s.latencies_ms), 0.99)

    def regret(self, policy: str) -> list[float]:
        """Percent by which a policy's p95 is above the oracle's, run by run."""
        return [
            100.0 * (ours.p95_ms / best.p95_ms - 1.0)
            for ours, best in zip(self.scores[policy], self.scores[ORACLE], strict=True)
        ]


def run_scenario(scenario: Scenario, seeds: Sequence[int], step: Callable[[], None]) -> Outcome:
    """Let all policies run through the same worlds of a scenario."""
    scores: dict[str, list[Score]] = {}
    for seed in seeds:
        nature = scenario.draw(seed)
        for make in _policies(nature, seed):
            world = World(nature)
            policy = make(world)
            scores.setdefault(policy.name, []).append(Score.of(simulate(world, policy)))
        step()
    return Outcome(scenario, scores, causes(scenario, seeds))


def _fixed(policy: Policy, world: World) -> Policy:
    return policy


def _policies(nature: Nature, seed: int) -> list[Callable[[World], Policy]]:
    fixed: list[Callable[[World], Policy]] = [
        functools.partial(_fixed, policy) for policy in fixed_policies()
    ]
    sensor, partly = Sensor(nature, seed), Sensor(nature, seed, missed=MISSED)
    return [
        *fixed,
        lambda world: MeanOfTen(random.Random(seed)),
        lambda world: PeakEwma(),
        lambda world: Ours(nature, random.Random(seed), hedge_budget=0.0, sensor=sensor),
        lambda world: Ours(nature, random.Random(seed), sensor=sensor),
        lambda world: Ours(nature, random.Random(seed)),
        lambda world: Ours(nature, random.Random(seed), sensor=partly),
        lambda world: Told(world, random.Random(seed)),
        Oracle,
    ]


def measure(settings: Settings, begin: Begin) -> tuple[Report, list[Outcome]]:
    """Run everything.

    Raises:
        InvalidInput: The traces cannot be read.
    """
    run = Run("routing", seed=settings.seed)
    outcomes = []
    decisions = Decisions()
    for scenario in scenarios(settings.traces):
        first = settings.seed + (HELD_OUT_SEEDS if scenario.use == "held_out" else 0)
        step = begin(scenario.name, settings.seeds)

        def after_each(step: Callable[[], None] = step) -> None:
            step()
            decisions.sample()

        outcomes.append(run_scenario(scenario, range(first, first + settings.seeds), after_each))
    quietest, every = decisions.figures()
    bars = [
        *_bars(outcomes, "tuned"),
        *_bars(outcomes, "held_out"),
        *_wedge_bars(outcomes, "tuned"),
        *_wedge_bars(outcomes, "held_out"),
        *_decision_bars(quietest),
    ]
    figures = [
        *(figure for outcome in outcomes for figure in _figures(outcome)),
        quietest, every,
    ]  # fmt: skip
    report = run.report(
        bars=bars,
        figures=figures,
        settings={
            "seeds": settings.seeds,
            "traces": ", ".join(
                o.scenario.name for o in outcomes if o.scenario.is_recorded
            ) or "none",
            **{f"{o.scenario.name}: best static": o.best_static for o in outcomes},
        },
    )  # fmt: skip
    return report, outcomes


def _bars(outcomes: Sequence[Outcome], use: Use) -> list[Bar]:
    """The promises, on the scenarios of one use."""
    label = use.replace("_", " ")
    by_name = {outcome.scenario.name: outcome for outcome in outcomes}
    all_of = [outcome.scenario for outcome in outcomes]
    varying = [by_name[s.name] for s in of_group(all_of, "varying", use)]
    steady = [by_name[s.name] for s in of_group(all_of, "steady", use)]
    both = varying + steady
    return [
        _bar(
            f"{label}: SLO attainment above the oracle's",
            [o.ahead(OURS, ORACLE) for o in both], MAX_BEHIND_ORACLE, "at_least", "points",
        ),
        _bar(
            f"{label}: above the best static, links vary",
            [o.ahead(OURS, o.best_static) for o in varying],
            MIN_AHEAD_OF_STATIC, "at_least", "points",
        ),
        _bar(
            f"{label}: above the best static, links do not vary",
            [o.ahead(OURS, o.best_static) for o in steady],
            MAX_BEHIND_STATIC, "at_least", "points", worst=True,
        ),
        _bar(
            f"{label}: p95 regret to the oracle",
            [o.regret(OURS) for o in both], MAX_REGRET, "at_most", "%",
        ),
    ]  # fmt: skip


def _wedge_bars(outcomes: Sequence[Outcome], use: Use) -> list[Bar]:
    """What hedging is for: a server that accepts and never answers."""
    found = [o for o in outcomes if o.scenario.group == "wedges" and o.scenario.use == use]
    cuts = [100.0 * (1.0 - o.pooled_p99_ms(OURS) / o.pooled_p99_ms(OURS_UNHEDGED)) for o in found]
    label = use.replace("_", " ")
    return [
        _bar(
            f"{label}: p99 to the first token below that without hedging, 2 % wedges",
            [[cut] for cut in cuts], MIN_TAIL_CUT, "at_least", "%", worst=True,
        ),
        _bar(
            f"{label}: extra requests for that",
            [[score.extra for score in o.scores[OURS]] for o in found], MAX_EXTRA, "at_most", "%",
        ),
    ]  # fmt: skip


def _bar(
    name: str,
    values: Sequence[Sequence[float]],
    limit: float,
    direction: Direction,
    unit: str,
    *,
    worst: bool = False,
) -> Bar:
    """A bar on the mean over scenarios and seeds, or on the worst scenario's mean."""
    means = [fmean(each) for each in values]
    return Bar(
        name=name,
        value=min(means) if worst else fmean(means),
        limit=limit,
        direction=direction,
        unit=unit,
        lowest=min(means),
        highest=max(means),
    )


def _figures(outcome: Outcome) -> list[Figure]:
    figures = []
    best = outcome.best_static
    for policy in dict.fromkeys(("edge only", "cloud only", best, *ADAPTIVE)):
        title = f"{outcome.scenario.name}: {'best static' if policy == best else policy}"
        scores = outcome.scores[policy]
        for field, text, unit in (
            *COLUMNS,
            ("cloud_calls", "cloud calls for 100 requests", ""),
            ("energy_j", "energy of the device", "J"),
        ):
            values = [getattr(score, field) for score in scores]
            figures.append(Figure.of_rounds(f"{title}: {text}", unit, values))
        if policy != ORACLE:
            figures.append(Figure.of_rounds(f"{title}: p95 regret", "%", outcome.regret(policy)))
    figures.extend(
        Figure.of_rounds(f"{outcome.scenario.name}: {OURS} late: {cause}", "%", [percent])
        for cause, percent in outcome.causes.items()
    )
    lead = outcome.ahead(ORACLE, best)
    figures.append(
        Figure.of_rounds(f"{outcome.scenario.name}: oracle above best static", "points", lead)
    )
    return figures


class Decisions:
    """What predicting both routes and deciding takes, call by call, on a router that has learned.

    Sampled all along the benchmark: whoever shares the machine slows seconds and minutes down by
    half, and never speeds one up, so the quietest sample is the one that tells about the code (as
    `timeit` of the standard library says of its minimum). The clock's own cost is included (about
    0.1 µs).
    """

    def __init__(self) -> None:
        nature = _lesson().draw(0)
        self._policy = Ours(nature, random.Random(0), sensor=Sensor(nature, 0))
        simulate(World(nature), self._policy)
        # A client looks at its device on another thread; only what that does to a decision counts.
        self._policy.sensor = None
        self._policy.predictor.sense(0.5)
        self._now_s = now_s = nature.jobs[-1].arrival_s + 1.0
        self._jobs = itertools.cycle(
            [replace(job, deadline_s=now_s + job.deadline_s - job.arrival_s) for job in nature.jobs]
        )
        self._samples: list[list[float]] = []

    def sample(self) -> None:
        """Decide some requests."""
        calls_us = []
        for job in itertools.islice(self._jobs, DECISION_CALLS):
            began_ns = time.perf_counter_ns()
            self._policy.decide(job, self._now_s)
            calls_us.append((time.perf_counter_ns() - began_ns) / 1000.0)
        self._samples.append(calls_us)

    def figures(self) -> tuple[Figure, Figure]:
        """The quietest sample, which bars are held against, and all calls of all samples."""
        name, unit = "decision: both predictions and the choice", "µs"
        samples = [Figure.of_calls(name, unit, calls_us) for calls_us in self._samples]
        every = [call_us for calls_us in self._samples for call_us in calls_us]
        return (
            min(samples, key=lambda figure: figure.summary.p50),
            Figure.of_calls(f"{name}, all samples", unit, every),
        )


def _lesson() -> Scenario:
    return next(s for s in scenarios(None) if s.group == "varying")


def _decision_bars(figure: Figure) -> list[Bar]:
    return [
        Bar(
            name=f"{figure.name} ({text})", value=value, limit=limit, direction="at_most",
            unit=figure.unit,
        )
        for text, value, limit in (
            ("p50", figure.summary.p50, MAX_DECISION_P50_US),
            ("p99", figure.summary.p99, MAX_DECISION_P99_US),
        )
    ]  # fmt: skip
