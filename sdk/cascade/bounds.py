"""How many kept disagreements a sample may hold. Exact, for any distribution of scores.

The risk of a threshold t is R(t) = P(score > t and the two models disagree): the part of all
requests that the device answers differently from how the cloud would have. It falls with t, so one
test at the largest t that is still too risky decides about all of them; candidates need not be
fixed beforehand, and there is nothing to correct for (Bates et al. 2021, "Distribution-Free,
Risk-Controlling Prediction Sets", Theorem 1; the same as fixed-sequence testing from the safest
threshold down in Angelopoulos et al. 2021, "Learn then Test"). The number of kept disagreements
among n samples at that t is binomial, so the rule is: keep at most `allowed_disagreements`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_Holds = Callable[[int], bool]

#: Against 1 - 0.9 == 0.09999999999999998, which times 1000 must allow 100.
_ROUNDING = 1e-9


def binomial_at_most(count: int, samples: int, rate: float) -> float:
    """P(X <= count) for X binomial with `samples` trials of probability `rate`."""
    if count < 0:
        return 0.0
    if count >= samples or rate <= 0.0:
        return 1.0
    if rate >= 1.0:
        return 0.0
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    return min(
        1.0,
        math.fsum(
            math.exp(_log_choose(samples, k) + k * log_rate + (samples - k) * log_rest)
            for k in range(count + 1)
        ),
    )


def hypergeometric_at_most(count: int, population: int, marked: int, draws: int) -> float:
    """P(X <= count) for X the marked ones among `draws` of `population`, without replacement."""
    lowest, highest = max(0, draws - (population - marked)), min(draws, marked)
    if count < lowest:
        return 0.0
    if count >= highest:
        return 1.0
    whole = _log_choose(population, draws)
    return min(
        1.0,
        math.fsum(
            math.exp(_log_choose(marked, k) + _log_choose(population - marked, draws - k) - whole)
            for k in range(lowest, count + 1)
        ),
    )


def rate_at_most(count: int, samples: int, confidence: float) -> float:
    """Upper bound of a rate, exact (Clopper and Pearson 1934).

    Args:
        count: How often it was seen.
        samples: In how many.
        confidence: Probability that the bound holds, such as 0.95.
    """
    if count >= samples:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):  # halves the interval to below the precision of a float
        middle = (low + high) / 2
        if binomial_at_most(count, samples, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


def allowed_disagreements(
    samples: int, risk: float, error: float, *, horizon: int | None = None
) -> int | None:
    """How many kept disagreements may be among the samples so that the risk is held.

    Args:
        samples: Size of the calibration sample.
        risk: Part of all requests that may be kept and disagree, such as 0.02.
        error: Probability with which the statement may be wrong, such as 0.05.
        horizon: Also hold the risk, with the same probability, among the next `horizon` requests
            themselves, not only in the long run. A short stretch has luck of its own, so this is
            stricter. Of the disagreements of both samples together, in descending order of score,
            each is one of the calibration sample's with equal right. More than ``risk * horizon``
            later ones come before the (k+1)-th of the calibration sample's only if at most k of
            the first k + ``risk * horizon`` + 1 are the calibration sample's: hypergeometric.

    Returns:
        The largest number; `None` when even none would say too little.
    """
    largest = _largest(samples, lambda k: binomial_at_most(k, samples, risk) <= error)
    if horizon is None or largest is None:
        return largest
    tolerated = math.floor(risk * horizon + _ROUNDING)
    if tolerated >= horizon:
        return largest
    return _largest(
        largest,
        lambda k: hypergeometric_at_most(k, samples + horizon, samples, k + tolerated + 1) <= error,
    )


def samples_needed(risk: float, error: float, *, horizon: int | None = None) -> int:
    """Smallest sample with which anything can be said: it must then hold no disagreement."""
    low, high = 0, 1
    while allowed_disagreements(high, risk, error, horizon=horizon) is None:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if allowed_disagreements(middle, risk, error, horizon=horizon) is None:
            low = middle
        else:
            high = middle
    return high


def _largest(limit: int, holds: _Holds) -> int | None:
    """Largest k up to `limit` for which a condition that only ever turns false holds."""
    if not holds(0):
        return None
    low, step = 0, 1
    while low + step <= limit and holds(low + step):
        low, step = low + step, step * 2
    high = min(limit + 1, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
