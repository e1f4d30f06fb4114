"""Bounds: against exact sums, and the guarantee itself against simulated traffic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdk.cascade.bounds import (
    allowed_disagreements,
    binomial_at_most,
    hypergeometric_at_most,
    rate_at_most,
    samples_needed,
)


@given(n=st.integers(1, 60), k=st.integers(-1, 61), tenths=st.integers(0, 10))
def test_the_binomial_sum_is_exact(n, k, tenths):
    p = Fraction(tenths, 10)
    exact = sum(
        (math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(min(k, n) + 1)), Fraction(0)
    )
    assert binomial_at_most(k, n, float(p)) == pytest.approx(float(exact), abs=1e-12)


@given(data=st.data(), population=st.integers(1, 60))
def test_the_hypergeometric_sum_is_exact(data, population):
    marked = data.draw(st.integers(0, population))
    draws = data.draw(st.integers(0, population))
    k = data.draw(st.integers(-1, population))
    exact = Fraction(
        sum(math.comb(marked, i) * math.comb(population - marked, draws - i)
            for i in range(min(k, draws) + 1)),
        math.comb(population, draws),
    )  # fmt: skip
    assert hypergeometric_at_most(k, population, marked, draws) == pytest.approx(
        float(exact), abs=1e-10
    )


def test_the_upper_bound_is_clopper_and_pearsons():
    # Of none in n it has a closed form; the other is of published tables (5 of 100, one-sided).
    assert rate_at_most(0, 59, 0.95) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert rate_at_most(5, 100, 0.95) == pytest.approx(0.1023, abs=1e-4)
    assert rate_at_most(7, 7, 0.95) == 1.0


def test_the_rule_of_three_says_how_many_samples_it_takes():
    assert samples_needed(0.02, 0.05) == 149  # 0.98 ** 149 <= 0.05 < 0.98 ** 148
    assert allowed_disagreements(148, 0.02, 0.05) is None
    assert allowed_disagreements(149, 0.02, 0.05) == 0


@settings(max_examples=40)
@given(n=st.integers(100, 3000), horizon=st.integers(50, 5000))
def test_a_horizon_never_allows_more(n, horizon):
    free = allowed_disagreements(n, 0.02, 0.05)
    bound = allowed_disagreements(n, 0.02, 0.05, horizon=horizon)
    assert bound is None or (free is not None and bound <= free)


@given(n=st.integers(1, 3000), risk=st.sampled_from([0.01, 0.02, 0.05, 0.2]))
def test_what_is_allowed_is_the_largest_that_holds(n, risk):
    allowed = allowed_disagreements(n, risk, 0.05)
    if allowed is None:
        assert binomial_at_most(0, n, risk) > 0.05
    else:
        assert binomial_at_most(allowed, n, risk) <= 0.05 < binomial_at_most(allowed + 1, n, risk)


def kept_risk(rng, samples, runs, *, horizon=None, later=None):
    """How often the rule's threshold breaks a risk of 0.05, in a world where it easily could.

    Scores are uniform and a request disagrees with probability 0.2: at a bound b the risk is
    0.2 * (1 - b), exactly 0.05 at 0.75.
    """
    allowed = allowed_disagreements(samples, 0.05, 0.05, horizon=horizon)
    broken = 0
    for _ in range(runs):
        scores = rng.random(samples)
        wrong = np.sort(scores[rng.random(samples) < 0.2])[::-1]
        bound = wrong[allowed] if allowed < len(wrong) else -np.inf
        if later is None:
            broken += 0.2 * (1 - max(bound, 0.0)) > 0.05
        else:
            fresh, is_wrong = rng.random(later), rng.random(later) < 0.2
            broken += int((is_wrong & (fresh > bound)).sum()) > 0.05 * later
    return broken / runs


@pytest.mark.parametrize("samples", [100, 400])
def test_the_risk_is_broken_in_at_most_one_of_twenty_calibrations(samples):
    share = kept_risk(np.random.default_rng(1), samples, 4000)
    # Four standard errors of 4000 runs around 0.05; below it only by the binomial's own steps.
    assert 0.005 < share < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 4000)


def test_with_a_horizon_the_next_requests_themselves_hold_it():
    rng = np.random.default_rng(2)
    with_horizon = kept_risk(rng, 400, 4000, horizon=400, later=400)
    without = kept_risk(rng, 400, 4000, later=400)
    assert with_horizon < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 4000)
    # Which is why there is a horizon: without it more than the noise of 4000 runs explains.
    assert without > 0.05 + 4 * math.sqrt(0.05 * 0.95 / 4000)
