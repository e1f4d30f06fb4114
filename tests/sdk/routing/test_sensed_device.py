"""What a sensor of the device's speed does to predictions."""

from __future__ import annotations

import math
import random

import pytest

from sdk.routing import Observation, Predictor, RequestSize
from sdk.routing.types import Prediction

SMALL = RequestSize(upload_bytes=1_000, input_elements=64)
CHAT = RequestSize(input_tokens=64, max_new_tokens=100, upload_bytes=400)


def p50(predictor: Predictor, now_s: float, queue_ms: float = 0.0) -> float:
    found = predictor.predict("edge", "m", SMALL, now_s=now_s, queue_ms=queue_ms).p50_ms
    assert found is not None
    return found


def answer(predictor: Predictor, ms: float, now_s: float, **more: object) -> None:
    seen = Observation(total_ms=ms, compute_ms=ms)
    predictor.observe("edge", "m", SMALL, seen, now_s=now_s, **more)  # type: ignore[arg-type]


def taught(speed: float | None = 1.0, *, calls: int = 40, sigma: float = 0.02) -> Predictor:
    rng = random.Random(5)
    predictor = Predictor()
    predictor.sense(speed)
    for call in range(calls):
        answer(predictor, 10.0 * math.exp(rng.gauss(0.0, sigma)), 0.1 * call)
    return predictor


def test_a_cap_of_a_quarter_is_four_times_the_time_at_once_and_back() -> None:
    predictor = taught()
    before = p50(predictor, 4.0)
    predictor.sense(0.25)
    assert p50(predictor, 4.0) == pytest.approx(4.0 * before)
    found = predictor.predict("edge", "m", SMALL, now_s=4.0, queue_ms=0.0)
    assert found.p95_ms is not None
    assert found.p95_ms > 4.0 * before
    predictor.sense(1.0)
    assert p50(predictor, 4.0) == before


def test_the_cloud_is_not_slower_when_the_device_is() -> None:
    predictor = Predictor()
    for call in range(10):
        seen = Observation(total_ms=30.0, compute_ms=5.0)
        predictor.observe("cloud", "m", SMALL, seen, now_s=float(call))
    before = predictor.predict("cloud", "m", SMALL, now_s=10.0)
    predictor.sense(0.2)
    assert predictor.predict("cloud", "m", SMALL, now_s=10.0) == before


@pytest.mark.parametrize("speed", [0.2, 0.25, 0.5, 0.75])
def test_what_is_seen_while_it_is_slow_does_not_spoil_what_is_known_of_full_speed(speed) -> None:
    rng = random.Random(3)
    predictor = taught()
    before = p50(predictor, 4.0)
    predictor.sense(speed)
    for call in range(50):
        answer(predictor, 10.0 / speed * math.exp(rng.gauss(0.0, 0.02)), 4.0 + 0.1 * call)
    assert p50(predictor, 9.0) == pytest.approx(10.0 / speed, rel=0.05)
    predictor.sense(1.0)
    assert p50(predictor, 9.0) == pytest.approx(before, rel=0.05)


def test_what_was_learned_while_it_was_slow_holds_for_full_speed() -> None:
    predictor = Predictor()
    predictor.sense(0.5)
    for call in range(20):
        answer(predictor, 20.0, 0.1 * call)
    predictor.sense(1.0)
    assert p50(predictor, 2.0) == pytest.approx(10.0, rel=0.02)


def test_a_sensor_that_is_wrong_is_corrected_within_a_few_answers() -> None:
    predictor = taught()
    predictor.sense(0.25)  # the device is as fast as ever
    for call in range(3):
        answer(predictor, 10.0, 4.0 + 0.1 * call)
    assert p50(predictor, 4.3) == pytest.approx(10.0, rel=0.15)
    for call in range(12):
        answer(predictor, 10.0, 4.3 + 0.1 * call)
    predictor.sense(1.0)  # and it is not made fast by what corrected the sensor
    assert p50(predictor, 5.5) == pytest.approx(10.0, rel=0.1)
    predictor.sense(0.25)  # nor believed the next time
    assert p50(predictor, 5.5) == pytest.approx(10.0, rel=0.1)


def test_work_that_waits_for_memory_is_learned_to_be_slowed_less() -> None:
    predictor = taught()
    for turn in range(6):
        predictor.sense(0.25)
        for call in range(4):
            answer(predictor, 20.0, 5.0 + turn + 0.1 * call)
        predictor.sense(1.0)
        for call in range(4):
            answer(predictor, 10.0, 5.5 + turn + 0.1 * call)
    predictor.sense(0.25)
    assert p50(predictor, 12.0) == pytest.approx(20.0, rel=0.1)
    predictor.sense(0.5)
    assert p50(predictor, 12.0) == pytest.approx(10.0 * math.sqrt(2.0), rel=0.1)


@pytest.mark.parametrize("factor", [0.3, 4.0])
def test_answers_are_reacted_to_as_fast_as_without_a_sensor(factor: float) -> None:
    predictor = taught()
    for call in range(3):
        answer(predictor, 10.0 * factor, 4.0 + 0.1 * call)
    assert p50(predictor, 4.3) == pytest.approx(10.0 * factor, rel=0.15)


def test_a_call_during_which_the_speed_changed_is_no_surprise() -> None:
    predictor = taught()
    ticket = predictor.start("edge", "m", SMALL, Prediction(p50_ms=10.0), now_s=4.0)
    predictor.sense(0.25)
    level = predictor.models["edge", "m"].compute.level
    for ms in (10.0, 25.0, 40.0):
        answer(predictor, ms, 4.1, ticket=ticket)
        assert level.at(4.1) == pytest.approx(1.0, rel=0.05)


def test_a_queue_lasts_longer_when_the_device_becomes_slow() -> None:
    predictor = taught()
    expected = predictor.predict("edge", "m", SMALL, now_s=4.0, queue_ms=0.0)
    predictor.start("edge", "m", SMALL, expected, now_s=4.0)
    before = predictor.predict("edge", "m", SMALL, now_s=4.001, queue_ms=9.0)
    predictor.sense(0.25)
    found = predictor.predict("edge", "m", SMALL, now_s=4.001, queue_ms=9.0)
    assert before.queue_ms == pytest.approx(9.0)
    assert found.queue_ms == pytest.approx(36.0)


def test_a_call_that_is_slow_because_the_device_is_said_to_be_is_not_overdue() -> None:
    predictor = taught()
    expected = predictor.predict("edge", "m", SMALL, now_s=4.0, queue_ms=0.0)
    predictor.start("edge", "m", SMALL, expected, now_s=4.0)
    overdue = p50(predictor, 4.030)
    assert overdue > 25.0
    predictor.sense(0.25)
    assert p50(predictor, 4.030) == pytest.approx(40.0, rel=0.05)


def test_an_attempt_that_was_given_up_is_held_against_the_device_less_what_was_sensed() -> None:
    def level_after(speed: float) -> float:
        predictor = taught()
        expected = predictor.predict("edge", "m", SMALL, now_s=4.0, queue_ms=0.0)
        ticket = predictor.start("edge", "m", SMALL, expected, now_s=4.0)
        predictor.sense(speed)
        predictor.stop(ticket, now_s=4.035)
        predictor.observe_late(ticket, now_s=4.035)
        return predictor.models["edge", "m"].compute.level.at(4.035)

    assert level_after(1.0) > 1.5
    assert level_after(0.25) == pytest.approx(1.0, rel=0.05)


def test_first_token_and_tokens_are_slower_too() -> None:
    predictor = Predictor()
    predictor.sense(1.0)
    seen = Observation(total_ms=1_090.0, prefill_ms=100.0, decode_ms=990.0, completion_tokens=100)
    for call in range(5):
        predictor.observe("edge", "m", CHAT, seen, now_s=2.0 * call)
    before = predictor.predict("edge", "m", CHAT, now_s=10.0, queue_ms=0.0)
    predictor.sense(0.5)
    found = predictor.predict("edge", "m", CHAT, now_s=10.0, queue_ms=0.0)
    assert found.ttft_ms == pytest.approx(2.0 * before.ttft_ms)
    assert found.ms_per_token == pytest.approx(2.0 * before.ms_per_token)
    assert found.p50_ms == pytest.approx(2.0 * before.p50_ms)


@pytest.mark.parametrize("speed", [None, 1.0])
def test_without_a_sensor_all_is_as_it_was(speed: float | None) -> None:
    sensed, plain = taught(speed, sigma=0.3), taught(None, sigma=0.3)
    assert sensed.predict("edge", "m", SMALL, now_s=4.0) == plain.predict(
        "edge", "m", SMALL, now_s=4.0
    )


@pytest.mark.parametrize("speed", [0.0, -1.0, 1e-9, 7.0])
def test_a_speed_that_makes_no_sense_does_no_harm(speed: float) -> None:
    predictor = taught()
    predictor.sense(speed)
    assert 10.0 * 0.9 < p50(predictor, 4.0) <= 10.0 * 55.0
