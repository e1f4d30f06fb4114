from __future__ import annotations

import random
from dataclasses import replace

from benchmarks.routing.causes import UNAVOIDABLE, Watched, causes
from benchmarks.routing.policies import Ours
from benchmarks.routing.scenarios import Scenario, scenarios
from benchmarks.routing.simulate import Score, simulate
from benchmarks.routing.world import Nature, World


def test_causes_add_up_to_what_was_missed(monkeypatch) -> None:
    scenario = next(s for s in scenarios(None) if s.name == "cellular")
    nature = scenario.draw(3)
    score = Score.of(simulate(World(nature), Ours(nature, random.Random(3))))
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
