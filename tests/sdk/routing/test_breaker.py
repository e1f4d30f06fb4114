from __future__ import annotations

import random

import pytest

from sdk.routing import BreakerState, CircuitBreaker


def breaker() -> CircuitBreaker:
    return CircuitBreaker(
        failure_threshold=2, base_backoff_s=1, max_backoff_s=60, rng=random.Random(3)
    )


def opened(at_s: float = 0.0) -> CircuitBreaker:
    found = breaker()
    found.record_failure(at_s)
    found.record_failure(at_s)
    return found


def test_closed_until_failures_follow_each_other() -> None:
    found = breaker()
    found.record_failure(0)
    found.record_success(1)
    found.record_failure(2)
    assert found.state(2) is BreakerState.CLOSED
    assert found.can_try(2)
    assert found.describe(2) == ""
    found.record_failure(3)
    assert found.state(3) is BreakerState.OPEN
    assert not found.can_try(3)
    assert not found.acquire(3)


def test_backoff_is_jittered_doubles_and_is_bounded() -> None:
    found = opened()
    now_s, expected_s = 0.0, 1.0
    for _ in range(10):
        wait_s = found.retry_in_s(now_s)
        assert expected_s / 2 <= wait_s <= expected_s
        now_s += wait_s
        assert found.state(now_s) is BreakerState.HALF_OPEN
        assert found.acquire(now_s)
        found.record_failure(now_s)
        expected_s = min(60.0, expected_s * 2)


def test_two_devices_do_not_come_back_together() -> None:
    waits = set()
    for seed in range(20):
        found = CircuitBreaker(failure_threshold=1, rng=random.Random(seed))
        found.record_failure(0)
        waits.add(found.retry_in_s(0))
    assert len(waits) == 20


def test_half_open_lets_one_probe_through_and_closes_on_success() -> None:
    found = opened()
    now_s = found.retry_in_s(0)
    assert found.can_try(now_s)
    assert found.can_try(now_s)  # asking changes nothing
    assert found.acquire(now_s)
    assert not found.acquire(now_s)
    assert not found.can_try(now_s)
    found.record_success(now_s)
    assert found.state(now_s) is BreakerState.CLOSED
    assert found.failures == 0
    assert found.acquire(now_s)


def test_a_probe_given_back_or_lost_makes_room_for_another() -> None:
    found = opened()
    assert found.acquire(2)
    found.release(2)
    assert found.acquire(2)
    assert not found.can_try(11.9)
    assert found.can_try(12)


def test_late_failures_of_old_attempts_do_not_prolong_the_backoff() -> None:
    found = opened()
    wait_s = found.retry_in_s(0)
    found.record_failure(0.1)
    assert found.failures == 2
    assert found.retry_in_s(0.1) == pytest.approx(wait_s - 0.1)


def test_it_says_when_it_tries_again() -> None:
    found = opened()
    assert found.describe(0).startswith("failed 2 times, next try in 0.")


def test_every_second_failure_opens_it_as_well() -> None:
    found = breaker()
    for second in range(5):
        assert found.state(second) is BreakerState.CLOSED
        found.record_success(second)
        found.record_failure(second)
    assert found.state(4) is BreakerState.OPEN
    assert 0.5 <= found.retry_in_s(4) <= 1.0


def test_a_failure_now_and_then_does_not() -> None:
    found = breaker()
    for second in range(200):
        found.record_failure(second)
        found.record_success(second)
        found.record_success(second)
    assert found.state(200) is BreakerState.CLOSED


def test_what_was_before_it_opened_is_forgotten_when_it_closes() -> None:
    found = breaker()
    for second in range(5):
        found.record_success(second)
        found.record_failure(second)
    now_s = 5.0 + found.retry_in_s(5)
    assert found.acquire(now_s)
    found.record_success(now_s)
    found.record_failure(now_s)
    assert found.state(now_s) is BreakerState.CLOSED
