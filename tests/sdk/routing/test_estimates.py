from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdk.routing.estimates import (
    HALF_LIFE_S,
    LEVELS,
    WINDOW,
    Level,
    Recent,
    Shape,
    SizedLatency,
    share_in_time,
    sigma_of,
)

positive = st.floats(0.001, 1e6, allow_nan=False)


def test_sizes_between_two_measured_ones_lie_on_the_line_between_them() -> None:
    shape = Shape()
    assert shape.at(100) is None
    shape.observe(1000, 10)
    assert shape.at(100) == 10  # smaller ones no faster
    assert shape.at(10_000) == 100  # larger ones in proportion
    shape.observe(64_000, 640)
    assert shape.at(32_500) == pytest.approx(325)
    assert shape.at(128_000) == pytest.approx(1280)
    assert shape.at(0) == 2.5


def test_one_measurement_counts_as_much_as_the_seed() -> None:
    estimate = SizedLatency(10)
    estimate.observe(1, 30, now_s=0)
    found = estimate.quantiles(1, now_s=0)
    assert found is not None
    assert found[1] == pytest.approx(20)


def test_what_is_learned_of_one_size_corrects_the_seed_of_all() -> None:
    estimate = SizedLatency(10, prior_size=100)
    for second in range(10):
        estimate.observe(100, 20, now_s=second)
    found = estimate.quantiles(1000, now_s=9)
    assert found is not None
    assert found[1] == pytest.approx(200, rel=0.1)


def test_a_jump_of_one_size_moves_all_sizes() -> None:
    estimate = SizedLatency()
    for second in range(40):
        estimate.observe(100 if second % 2 else 1000, 10 if second % 2 else 100, now_s=second)
    for second in range(3):
        estimate.observe(100, 30, now_s=40 + second)
    found = estimate.quantiles(1000, now_s=42)
    assert found is not None
    assert found[1] == pytest.approx(300, rel=0.1)


def test_a_level_that_nobody_confirms_goes_back_by_half() -> None:
    level = Level()
    for _ in range(3):
        level.observe(4.0 / level.at(0), now_s=0)
    assert level.at(0) == pytest.approx(4, rel=0.01)
    assert level.at(HALF_LIFE_S) == pytest.approx(2, rel=0.01)
    assert level.at(20 * HALF_LIFE_S) == pytest.approx(1, rel=0.01)


def test_one_accident_does_not_count_as_a_jump() -> None:
    level = Level()
    for _ in range(WINDOW):
        level.observe(1.0, now_s=0)
    level.observe(50.0, now_s=0)
    assert level.value < 5
    level.observe(1.0 / level.value, now_s=0)
    level.observe(1.0 / level.value, now_s=0)
    assert level.value == pytest.approx(1, rel=0.01)


@given(st.lists(positive, min_size=1, max_size=3 * WINDOW))
def test_the_last_values_are_kept_and_their_quantiles_ascend(values: list[float]) -> None:
    recent = Recent()
    for value in values:
        recent.add(value)
    assert list(recent.values) == values[-WINDOW:] or recent.assumed
    assert list(recent.quantiles) == sorted(recent.quantiles)
    assert recent.count == min(len(values), WINDOW)


@given(st.lists(positive, min_size=5, max_size=5), positive, positive)
def test_the_share_in_time_is_a_distribution(values: list[float], one: float, two: float) -> None:
    found = tuple(sorted(values))
    low, high = sorted((one, two))
    assert 0 <= share_in_time(found, low) <= share_in_time(found, high) <= 1
    if len(set(found)) == 5:
        for level, value in zip(LEVELS, found, strict=True):
            assert share_in_time(found, value) == pytest.approx(level, abs=0.01)


@given(st.lists(st.tuples(positive, positive), max_size=100))
def test_no_measurements_make_a_forecast_that_is_not_a_number(
    seen: list[tuple[float, float]],
) -> None:
    estimate = SizedLatency(5)
    for second, (size, value) in enumerate(seen):
        estimate.observe(size, value, now_s=second)
    found = estimate.quantiles(100, now_s=len(seen))
    assert found is not None
    assert all(math.isfinite(value) and value >= 0 for value in found)
    assert list(found) == sorted(found)


def test_the_spread_of_a_seed_comes_from_its_p99() -> None:
    found = SizedLatency(10, sigma=sigma_of(10, 20)).quantiles(1, now_s=0)
    assert found is not None
    assert 13 < found[3] <= found[4] < 20
    assert sigma_of(10, 10) < sigma_of(10, 11)
