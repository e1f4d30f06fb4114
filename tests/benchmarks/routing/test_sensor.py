from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.routing.policies import OURS, OURS_PARTLY, OURS_UNSENSED, Ours
from benchmarks.routing.scenarios import scenarios
from benchmarks.routing.sensor import EVERY_S, STEP, Sensor
from benchmarks.routing.world import Nature, Window


def hot(*windows: Window) -> Nature:
    return replace(scenarios(None)[0].draw(0), thermal=windows)


def test_the_sensor_is_late_and_coarse() -> None:
    sensor = Sensor(hot(Window(1.01, 2.01, 4.0)), 0)
    assert sensor.speed(1.0) == sensor.speed(1.02) == sensor.speed(1.2) == 1.0
    during = sensor.speed(1.0 + EVERY_S)
    assert during < 0.5
    assert during / STEP == pytest.approx(round(during / STEP))
    assert sensor.speed(2.1) == during  # the last look was before the end
    assert sensor.speed(2.25) == 1.0


def test_its_error_is_one_for_a_run_and_another_for_the_next() -> None:
    nature = hot(Window(0.0, 5.0, 3.0), Window(6.0, 9.0, 3.0))
    found = [Sensor(nature, seed) for seed in range(60)]
    assert all(sensor.speed(1.0) == sensor.speed(7.0) for sensor in found)
    speeds = [sensor.speed(1.0) for sensor in found]
    assert len(set(speeds)) >= 4
    assert sorted(speeds)[30] == pytest.approx(1 / 3, abs=0.03)


def test_what_it_misses_is_missed_throughout() -> None:
    windows = tuple(Window(float(n), n + 0.5, 4.0) for n in range(300))
    sensor = Sensor(hot(*windows), 1, missed=1 / 3)
    seen = [sensor.speed(n + 0.3) < 1.0 for n in range(300)]
    assert 0.55 < sum(seen) / len(seen) < 0.78


def test_policies_are_named_by_what_they_sense() -> None:
    nature = hot()
    names = [
        Ours(nature, random.Random(0), sensor=sensor).name
        for sensor in (Sensor(nature, 0), None, Sensor(nature, 0, missed=0.5))
    ]
    assert names == [OURS, OURS_UNSENSED, OURS_PARTLY]


def test_the_router_is_told_before_it_decides() -> None:
    nature = hot(Window(1.0, 50.0, 4.0))
    router = Ours(nature, random.Random(0), sensor=Sensor(nature, 0))
    job = replace(nature.jobs[0], deadline_s=1e9)
    before = router.decide(job, 0.5).inputs.edge.prediction.p50_ms
    during = router.decide(job, 1.5).inputs.edge.prediction.p50_ms
    assert during > 2.5 * before
