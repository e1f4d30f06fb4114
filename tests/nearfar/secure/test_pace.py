from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.secure.outbox import Outbox, Traits
from nearfar.secure.pace import (
    CREDIT_TICK_S,
    FIRST_BATCH_BYTES,
    MAX_BATCH_BYTES,
    MAX_CREDIT_TICK_S,
    MAX_TOKEN_TICK_S,
    TOKEN_TICK_S,
    CreditPace,
    TokenPace,
)
from nearfar.secure.shaping import BUCKET_BYTES


def answer(pace: TokenPace | CreditPace, per_s: float, seconds: float = 10.0, at_s: float = 0.0):
    """So many tokens or credits a second, and its ticks as (seconds from the start, length)."""
    pace.begin()
    ticks, put, due_s = [], 0, pace.tick_s
    while due_s <= seconds:
        waiting = int(due_s * per_s) - put
        for _ in range(waiting):
            pace.put()
        put += waiting
        ticks.append((due_s, pace.batch_bytes))
        pace.tick(at_s + due_s, is_needed=waiting > 0)
        due_s += pace.tick_s
    pace.end()
    return ticks


@pytest.mark.parametrize("per_s", [1, 5, 10, 30, 100, 1000])
def test_the_first_answer_is_the_same_whatever_its_speed(per_s: int) -> None:
    ticks = answer(TokenPace(), per_s)
    assert len(ticks) in (99, 100)
    assert {size for _, size in ticks} == {FIRST_BATCH_BYTES}


@pytest.mark.parametrize("before", [2.0, 10.0, 30.0, 100.0])
def test_an_answer_looks_alike_at_any_speed_after_the_same_one_before(before: float) -> None:
    seen = []
    for now in (1.0, 10.0, 30.0, 90.0):
        pace = TokenPace()
        answer(pace, before)
        seen.append(answer(pace, now, at_s=60.0))
    assert all(ticks == seen[0] for ticks in seen)


@pytest.mark.parametrize("per_s", [3, 5, 8, 10, 12, 15, 18, 20, 25, 29, 30])
def test_after_a_slow_answer_records_are_filled_with_two_or_three_tokens(per_s: int) -> None:
    pace = TokenPace()
    answer(pace, per_s, 20.0)
    ticks = answer(pace, per_s, 20.0)
    tokens_per_tick = 20.0 * per_s / len(ticks)
    assert 2.0 <= tokens_per_tick <= 3.2
    assert {size for _, size in ticks} <= {BUCKET_BYTES, 160}


@pytest.mark.parametrize("per_s", [40, 60, 100, 200, 500])
def test_after_a_fast_answer_records_have_room_for_its_tokens(per_s: int) -> None:
    pace = TokenPace()
    answer(pace, per_s)
    answer(pace, per_s)
    assert pace.tick_s == TOKEN_TICK_S
    assert 42 <= pace.batch_bytes / (per_s * TOKEN_TICK_S) <= 60


def test_a_speed_near_the_one_before_changes_nothing() -> None:
    pace = TokenPace()
    answer(pace, 10.0)
    pace.begin()
    chosen = pace.tick_s, pace.batch_bytes
    pace.end()
    for per_s in (9.6, 10.4, 9.7):
        answer(pace, per_s)
        pace.begin()
        assert (pace.tick_s, pace.batch_bytes) == chosen
        pace.end()


def test_steps_lie_elsewhere_on_each_connection() -> None:
    ticks = set()
    for extra in range(8):
        pace = TokenPace()
        answer(pace, 10.0, 10.0 + extra / 10)
        pace.begin()
        ticks.add(round(pace.tick_s, 6))
    assert len(ticks) >= 6
    assert all(2.0 <= 10.0 * tick_s <= 3.0 for tick_s in ticks)


def test_short_answers_teach_nothing() -> None:
    pace = TokenPace()
    answer(pace, 10.0, 1.0)
    pace.begin()
    assert (pace.tick_s, pace.batch_bytes) == (TOKEN_TICK_S, FIRST_BATCH_BYTES)


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_whatever_is_expected_stays_within_bounds(first: float, second: float) -> None:
    pace = TokenPace()
    for per_s in (first, second):
        pace.expect(per_s)
        pace.begin()
        assert TOKEN_TICK_S <= pace.tick_s <= MAX_TOKEN_TICK_S
        assert BUCKET_BYTES <= pace.batch_bytes <= MAX_BATCH_BYTES
        assert pace.batch_bytes % 32 == 0
        pace.end()


def test_an_expected_speed_holds_from_the_first_answer_on() -> None:
    paced = Traits(is_paced=True)
    box = Outbox("balanced")
    box.expect_speed(10.0)
    box.put((b"one",), 3, 1, paced)
    assert box.next(0.0) is not None
    assert box.next(0.0) is None
    due_s = box.next_flush_s()
    assert due_s is not None
    assert 0.2 < due_s < 0.3
    batch = box.next(due_s)
    assert batch is not None
    assert len(batch) == BUCKET_BYTES


def test_tokens_that_pile_up_bring_the_ticks_back_and_lengthen_the_records() -> None:
    pace = TokenPace()
    pace.expect(5.0)
    pace.begin()
    assert pace.tick_s > TOKEN_TICK_S
    pace.hurry(40)
    assert pace.tick_s == TOKEN_TICK_S
    assert pace.batch_bytes >= 40 * 16


def test_two_answers_at_once_are_one_run() -> None:
    pace = TokenPace()
    pace.expect(10.0)
    pace.begin()
    slow_s = pace.tick_s
    pace.expect(100.0)
    pace.begin()
    assert pace.tick_s == slow_s
    pace.end()
    pace.begin()
    assert pace.tick_s == TOKEN_TICK_S


# Credit


def test_credit_of_a_first_answer_is_granted_less_often_once_none_was_needed() -> None:
    ticks = [due_s for due_s, _ in answer(CreditPace(), 0.1, 8.0)]
    assert ticks[:4] == [0.5, 1.0, 1.5, 2.0]
    assert ticks[4:] == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def test_credit_that_is_needed_early_keeps_its_ticks() -> None:
    ticks = [due_s for due_s, _ in answer(CreditPace(), 1.0, 5.0)]
    assert ticks == [pytest.approx((n + 1) * CREDIT_TICK_S) for n in range(10)]


@pytest.mark.parametrize(
    ("per_s", "tick_s"), [(0.01, MAX_CREDIT_TICK_S), (0.2, 2.0), (0.4, 1.0), (0.9, 0.5), (9, 0.5)]
)
def test_credit_of_later_answers_is_granted_twice_as_often_as_it_was_needed(per_s, tick_s) -> None:
    pace = CreditPace()
    answer(pace, per_s, 20.0)
    pace.begin()
    assert pace.tick_s == tick_s


def test_credit_that_is_needed_twice_in_a_row_comes_often_again() -> None:
    pace = CreditPace()
    answer(pace, 0.01, 20.0)
    pace.begin()
    pace.tick(4.0, is_needed=True)
    assert pace.tick_s == MAX_CREDIT_TICK_S
    pace.tick(8.0, is_needed=True)
    assert pace.tick_s == CREDIT_TICK_S


def test_credit_for_many_streams_gets_longer_records() -> None:
    pace = CreditPace()
    pace.begin()
    pace.hurry(30)
    assert pace.batch_bytes == 512
    assert pace.tick_s == CREDIT_TICK_S
