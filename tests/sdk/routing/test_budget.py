from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import CloudUnavailable, ConfigError
from sdk.policy.model import Verdict
from sdk.routing import Outcome, Prediction, RouteDecision, RouteState, attempts, decide
from sdk.routing.budget import BURST, RESERVE_PER_S, RETRY_SHARE, RetryBudget
from sdk.routing.types import DecisionInputs

# What happens: a request, or a wish to retry, after so many seconds.
EVENTS = st.lists(
    st.tuples(st.sampled_from(["request", "retry"]), st.floats(0.0, 3.0)), max_size=200
)


@given(EVENTS, st.floats(0.0, 1.0), st.data())
def test_retries_never_exceed_their_share_and_the_reserve(events, share, data) -> None:
    budget = RetryBudget(share)
    log: list[tuple[float, bool, bool]] = []  # (time, is a request, was granted)
    now_s = 100.0
    for kind, pause_s in events:
        now_s += pause_s
        if kind == "request":
            budget.request()
            log.append((now_s, True, False))
        else:
            log.append((now_s, False, budget.withdraw(now_s)))
    # It holds for every period, not only for the whole: a quiet hour saves nothing up.
    first = data.draw(st.integers(0, max(0, len(log) - 1)))
    last = data.draw(st.integers(first, len(log)))
    period = log[first:last]
    if not period:
        return
    seconds = period[-1][0] - period[0][0]
    requests = sum(is_request for _, is_request, _ in period)
    granted = sum(was_granted for _, _, was_granted in period)
    allowed = share * requests + (BURST + RESERVE_PER_S * seconds if share else 0.0)
    assert granted <= allowed + 1e-6


def test_a_storm_of_failures_is_retried_for_a_fifth() -> None:
    budget = RetryBudget()
    granted = 0
    for _ in range(10_000):  # all within a moment
        budget.request()
        granted += budget.withdraw(5.0)
    assert granted == budget.granted
    assert 0.2 * 10_000 <= granted <= BURST + 0.2 * 10_000 + 1
    assert budget.refused == 10_000 - granted


def test_an_app_that_asks_rarely_may_always_try_again() -> None:
    budget = RetryBudget(0.01)
    for second in range(100):
        budget.request()
        assert budget.withdraw(float(second))


def test_nothing_is_retried_where_the_budget_is_nothing() -> None:
    budget = RetryBudget(0.0)
    budget.request()
    assert not budget.can_retry(1e9)
    assert not budget.withdraw(1e9)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    budget = RetryBudget()
    for _ in range(10):
        assert budget.withdraw(50.0)
    assert not budget.withdraw(10.0)
    assert not budget.can_retry(10.5)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="retry_budget"):
        RetryBudget(share)


# -- where it is asked ----------------------------------------------------------------------------


def decision(endpoint: str = "a", *, edge: bool = True, failed: tuple = ()) -> RouteDecision:
    return decide(
        DecisionInputs(
            model="m",
            sensitivity="public",
            verdict=Verdict(edge=edge, cloud=True, rule_ids=("r",), reason="r", policy_hash="0"),
            edge=RouteState(prediction=Prediction(basis="measured", p50_ms=90.0, p95_ms=99.0)),
            cloud=RouteState(prediction=Prediction(basis="measured", p50_ms=1.0, p95_ms=2.0)),
            endpoint=endpoint,
            failed=failed,
        )
    )


def drive(first: RouteDecision, *later: RouteDecision, budget: RetryBudget) -> list[str]:
    """Where each attempt ran, all of which fail."""
    rest = iter(later)
    plan = attempts(first, lambda failed, now_s: next(rest), max_attempts=4, budget=budget)
    attempt, seen = next(plan), []
    while True:
        seen.append(f"{attempt.route} {attempt.decision.inputs.endpoint}")
        try:
            attempt = plan.send(Outcome(now_s=1.0, error=CloudUnavailable("gone")))
        except CloudUnavailable:
            return seen


def test_another_cloud_is_taken_at_once_and_charged() -> None:
    budget = RetryBudget()
    again = decision("b", edge=False)
    assert drive(decision("a", edge=False), again, again, budget=budget) == ["cloud a", "cloud b"]
    assert budget.granted == 1


def test_going_on_here_is_not_a_retry() -> None:
    budget = RetryBudget()
    tired = RetryBudget(0.0)
    here = decision("a", failed=("cloud",))
    for each in (budget, tired):
        assert drive(decision("a"), here, here, budget=each) == ["cloud a", "edge a"]
        assert each.granted == 0


def test_without_budget_a_cloud_is_not_asked_again() -> None:
    budget = RetryBudget(0.0)
    assert drive(decision("a", edge=False), decision("b", edge=False), budget=budget) == ["cloud a"]
    assert budget.refused == 1


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_many_requests_that_fail_at_will_stay_within_the_budget(failures: list[int]) -> None:
    """Each request fails on so many clouds before one answers; all at the same moment."""
    budget = RetryBudget()
    asked = 0
    for count in failures:
        names = iter("bcd")
        plan = attempts(
            decision("a", edge=False),
            lambda failed, now_s, names=names: decision(next(names), edge=False),
            max_attempts=5,
            budget=budget,
        )
        next(plan)
        asked += 1
        try:
            for _ in range(count):
                plan.send(Outcome(now_s=1.0, error=CloudUnavailable("gone")))
                asked += 1
            plan.send(Outcome(now_s=1.0))
        except (CloudUnavailable, StopIteration):
            pass
    assert asked - len(failures) <= RETRY_SHARE * len(failures) + BURST
