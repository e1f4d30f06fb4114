from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.routing.causes import UNAVOIDABLE, Watched, causes
from benchmarks.routing.policies import Ours, Told
from benchmarks.routing.scenarios import Scenario, scenarios
from benchmarks.routing.sensor import Sensor
from benchmarks.routing.simulate import Score, simulate
from benchmarks.routing.world import Nature, World


def test_causes_add_up_to_what_was_missed(monkeypatch) -> None:
    scenario = next(s for s in scenarios(None) if s.name == "cellular")
    nature = scenario.draw(3)
    score = Score.of(
        simulate(World(nature), Ours(nature, random.Random(3), sensor=Sensor(nature, 3)))
    )
    found = causes(scenario, [3])
    assert abs(sum(found.values()) - (100.0 - score.attainment)) < 1e-9
    assert len(found) > 2

    def draw(self: Scenario, seed: int) -> Nature:
        return replace(
            nature, jobs=[replace(j, deadline_s=j.arrival_s + 1e-4) for j in nature.jobs]
        )

    monkeypatch.setattr(Scenario, "draw", draw)
    assert causes(scenario, [3]) == {UNAVOIDABLE: 100.0}


def test_watching_changes_nothing() -> None:
    nature = scenarios(None)[0].draw(5)
    world = World(nature)
    watched = simulate(world, Watched(nature, world, random.Random(5)))
    assert watched == simulate(World(nature), Ours(nature, random.Random(5)))


def test_a_router_that_is_told_of_its_device_knows_it_and_waits_for_it() -> None:
    hot = scenarios(None)[0].draw(2)
    world = World(hot)
    told = Told(world, random.Random(2))
    window = hot.thermal[0]
    (first, second) = hot.jobs[:2]
    before = told.decide(replace(first, deadline_s=1e9), window.begin_s - 0.01)
    during = told.decide(replace(first, deadline_s=1e9), window.begin_s + 0.01)
    slower = during.inputs.edge.prediction.p50_ms / before.inputs.edge.prediction.p50_ms
    assert slower == pytest.approx(window.factor, rel=0.01)
    world.start("edge", replace(second, deadline_s=1e9), 0.0)
    waits = told.decide(replace(first, deadline_s=1e9), 0.0).inputs.edge.prediction
    assert waits.queue_ms == pytest.approx(world.edge_wait_s(0.0) * 1000.0)
    assert waits.queue_ms > 0
