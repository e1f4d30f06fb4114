"""When silence is a stall, on a clock of its own."""

from __future__ import annotations

import pytest

from nearfar.patience import (
    ALIVE_COLD_S,
    ALIVE_FACTOR,
    ALIVE_LEAST_S,
    WINDOW_S,
    Life,
    Silence,
)


def stalls_after_s(silence: Silence, life: Life, *, most_s: float = 100.0) -> float:
    """When it is taken for a stall, if somebody looks whenever that is due."""
    now_s = 0.0
    while now_s < most_s:
        now_s = silence.due_s
        if silence.look(now_s, life):
            return now_s
    raise AssertionError("it is never taken for a stall")


@pytest.mark.parametrize("limit_s", [0.05, 0.3, 1.5])
@pytest.mark.parametrize("is_cold", [True, False])
def test_what_shows_no_sign_of_life_stalls_when_it_is_suspicious(limit_s, is_cold):
    silence = Silence(limit_s, is_cold=is_cold, began_s=0.0)
    assert stalls_after_s(silence, Life.STILL) == pytest.approx(limit_s)


def test_what_computes_is_given_several_times_as_long_and_not_for_ever():
    silence = Silence(1.0, is_cold=False, began_s=0.0)
    assert stalls_after_s(silence, Life.ALIVE) == pytest.approx(ALIVE_FACTOR * 1.0)
    short = Silence(0.01, is_cold=False, began_s=0.0)
    assert stalls_after_s(short, Life.ALIVE) == pytest.approx(ALIVE_LEAST_S)


def test_a_first_run_that_computes_may_compile_for_a_while():
    silence = Silence(1.5, is_cold=True, began_s=0.0)
    assert stalls_after_s(silence, Life.ALIVE) == pytest.approx(ALIVE_COLD_S)


def test_where_nothing_tells_a_known_run_is_not_waited_for_and_a_first_one_is():
    assert stalls_after_s(Silence(0.3, is_cold=False, began_s=0.0), Life.UNKNOWN) == pytest.approx(
        0.3
    )
    assert stalls_after_s(Silence(1.5, is_cold=True, began_s=0.0), Life.UNKNOWN) == pytest.approx(
        ALIVE_COLD_S
    )


def test_what_was_looked_at_once_is_looked_at_again_before_it_is_given_up():
    silence = Silence(0.3, is_cold=False, began_s=0.0)
    for _ in range(2):
        assert not silence.look(silence.due_s, Life.UNSEEN)
    assert silence.due_s == pytest.approx(0.3 + WINDOW_S)
    assert silence.look(silence.due_s, Life.STILL)
    # A thread that never gets to it is nobody's answer either.
    never = Silence(0.3, is_cold=False, began_s=0.0)
    assert stalls_after_s(never, Life.UNSEEN) == pytest.approx(ALIVE_FACTOR * 0.3)


def test_what_falls_silent_after_it_was_busy_is_noticed_at_the_next_look():
    silence = Silence(0.5, is_cold=False, began_s=0.0)
    for _ in range(4):
        assert not silence.look(silence.due_s, Life.ALIVE)
    assert silence.due_s - 0.5 == pytest.approx(3 * WINDOW_S)
    assert silence.look(silence.due_s, Life.STILL)


def test_time_in_which_nobody_got_to_run_is_no_silence():
    silence = Silence(0.5, is_cold=False, began_s=0.0)
    assert not silence.look(10.0, Life.STILL)  # it was to be looked at after 0.4 s
    assert silence.counted_s == pytest.approx(0.4)
    assert silence.due_s == pytest.approx(10.1)
    assert silence.look(10.1, Life.STILL)
    assert silence.counted_s == pytest.approx(0.5)
