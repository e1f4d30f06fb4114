"""The audit: false alarms are as rare as stated, drift is found, and states survive a file."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdk.cascade import audit
from sdk.cascade.audit import MAX_LEVEL, AuditState, is_sound, kept_share, observe


def alarm_after(rng, rate, *, risk=0.02, limit):
    """How many audited requests it takes to the first alarm; `limit` when none came."""
    state = AuditState()
    for number, differs in enumerate(rng.random(limit) < rate, start=1):
        state = observe(state, float(differs), risk)
        if state.level:
            return number
    return limit


@given(
    risk=st.floats(0.001, 0.6),
    seen=st.floats(0, 1000),
    rate=st.floats(0, 1),
)
def test_no_bet_wins_on_average_while_the_agreement_holds(risk, seen, rate):
    mean = rate * risk  # any mean up to the risk, of X that is 0 or 1
    before = AuditState(evidence=(seen,) * 4)
    won, lost = observe(before, 1.0, risk), observe(before, 0.0, risk)
    if won.level or lost.level:
        return  # the detectors began anew: there is no number to compare
    for after_1, after_0 in zip(won.evidence, lost.evidence, strict=True):
        assert min(after_1, after_0) >= 0
        expected = mean * after_1 + (1 - mean) * after_0
        assert expected <= (seen + 1) * (1 + 1e-9)


def test_false_alarms_are_rarer_than_stated(monkeypatch):
    monkeypatch.setattr(audit, "MEAN_TO_FALSE_ALARM", 100.0)
    rng = np.random.default_rng(3)
    times = [alarm_after(rng, 0.02, limit=1500) for _ in range(200)]
    assert np.mean(times) > 100.0  # limits cut some short, which only makes the mean smaller


def test_drift_to_a_rate_five_times_the_risk_is_found_within_hundreds():
    rng = np.random.default_rng(4)
    times = [alarm_after(rng, 0.10, limit=2000) for _ in range(40)]
    assert max(times) < 1000
    assert np.median(times) < 250


def test_a_long_good_time_does_not_hide_a_drift():
    state = AuditState()
    for _ in range(5000):
        state = observe(state, 0.0, 0.02)
    count = 0
    while not state.level:
        state, count = observe(state, 1.0, 0.02), count + 1
    assert count <= 12  # a fresh detector needs almost as many


def test_each_alarm_halves_what_is_kept_and_the_last_one_ends_it():
    assert [kept_share(0.8, level) for level in range(3)] == [0.8, 0.4, 0.2]
    assert kept_share(0.8, MAX_LEVEL) == 0.0
    state = AuditState()
    for _ in range(1000):
        state = observe(state, 1.0, 0.02)
    assert state.level == MAX_LEVEL
    assert is_sound(state)


def test_fractions_of_a_batch_count_as_fractions():
    half = observe(AuditState(), 0.5, 0.02)
    assert half.differed == 0.5
    assert observe(AuditState(), 0.0, 0.02).evidence < half.evidence
    assert half.evidence < observe(AuditState(), 1.0, 0.02).evidence


@pytest.mark.parametrize(
    "damage",
    [
        {"level": 7}, {"level": -1}, {"audited": -1}, {"differed": 2.0}, {"evidence": (1.0,)},
        {"evidence": (1.0, 1.0, 1.0, -1.0)}, {"evidence": (1.0, 1.0, 1.0, float("inf"))},
    ],
)  # fmt: skip
def test_what_cannot_be_a_state_is_seen(damage):
    assert is_sound(AuditState(audited=1))
    assert not is_sound(msgspec.structs.replace(AuditState(audited=1), **damage))
