from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdk.routing.balancer import DECAY_S, GUESS_MS, PeakEwma, pick

LATENCIES = st.lists(st.tuples(st.floats(0.1, 1e5), st.floats(0.0, 30.0)), min_size=1, max_size=40)


def test_a_rise_is_followed_at_once_and_a_fall_slowly() -> None:
    average = PeakEwma()
    average.observe(10.0, 0.0)
    average.observe(500.0, 1.0)
    assert average.latency_ms(1.0) == 500.0
    average.observe(10.0, 1.0 + DECAY_S)  # 1/e of the peak is left
    assert average.latency_ms(1.0 + DECAY_S) == pytest.approx(10 + 490 / 2.71828, rel=1e-3)


def test_an_unconfirmed_peak_fades() -> None:
    average = PeakEwma()
    average.observe(1000.0, 0.0)
    assert average.latency_ms(0.0) == 1000.0
    assert average.latency_ms(DECAY_S) == pytest.approx(367.9, rel=1e-3)
    assert average.latency_ms(100 * DECAY_S) < 1e-9


def test_who_was_never_asked_is_asked_soon_but_not_by_all_at_once() -> None:
    assert PeakEwma().load(0.0, 0) == 0.0
    assert PeakEwma().load(0.0, 1) == 2 * GUESS_MS
    assert PeakEwma().load(0.0, 2) == 3 * GUESS_MS


@given(LATENCIES, st.floats(0.0, 100.0))
def test_the_average_stays_between_the_least_and_the_most_that_came(seen, later_s) -> None:
    average, now_s = PeakEwma(), 0.0
    for latency_ms, pause_s in seen:
        now_s += pause_s
        average.observe(latency_ms, now_s)
        assert average.latency_ms(now_s) >= latency_ms * (1 - 1e-9)
    worst = max(latency_ms for latency_ms, _ in seen)
    assert 0.0 <= average.latency_ms(now_s + later_s) <= worst * (1 + 1e-9)


@given(st.integers(2, 9), st.integers(0, 2**32))
def test_the_most_loaded_is_never_picked(count: int, seed: int) -> None:
    loads = [float(n) for n in range(count)]
    chosen = pick(range(count), loads.__getitem__, random.Random(seed))
    assert chosen != count - 1


def test_only_two_are_asked_for_their_load() -> None:
    asked = []
    pick(range(8), lambda n: asked.append(n) or 1.0, random.Random(1))
    assert len(set(asked)) == 2


def test_equals_share_alike() -> None:
    rng = random.Random(7)
    seen = Counter(pick("abcd", lambda _: 1.0, rng) for _ in range(4000))
    assert all(850 < seen[name] < 1150 for name in "abcd")


def test_a_slow_one_among_three_gets_little_and_comes_back() -> None:
    """Closed loop on a virtual clock: latencies 20, 20 and 200 ms, then all 20 ms."""
    rng = random.Random(11)
    averages = [PeakEwma() for _ in range(3)]
    now_s = 0.0

    def ask(latency_ms: list[float]) -> int:
        nonlocal now_s
        now_s += 0.05
        chosen = pick(range(3), lambda n: averages[n].load(now_s, 0), rng)
        averages[chosen].observe(latency_ms[chosen], now_s)
        return chosen

    slow = Counter(ask([20.0, 20.0, 200.0]) for _ in range(600))
    # Power of two choices never takes the worst of a pair; a faded peak is tried once in a while.
    assert 1 <= slow[2] < 30
    for _ in range(1200):
        ask([20.0, 20.0, 20.0])
    after = Counter(ask([20.0, 20.0, 20.0]) for _ in range(600))
    assert after[2] > 100
