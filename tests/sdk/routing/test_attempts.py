from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import (
    CloudUnavailable,
    DeadlineExceeded,
    EngineError,
    InvalidInput,
    NearfarError,
    Overloaded,
    PolicyDenied,
    SecurityError,
    StreamInterrupted,
)
from sdk.policy import Verdict
from sdk.routing import (
    Attempt,
    DecisionInputs,
    Outcome,
    Prediction,
    Route,
    RouteDecision,
    RouteState,
    attempts,
    decide,
)


def decision(
    *, edge: bool = True, cloud: bool = True, mode: str = "prefer_cloud", failed: tuple = ()
) -> RouteDecision:
    state = RouteState(prediction=Prediction(basis="measured", p50_ms=10, p95_ms=12))
    return decide(
        DecisionInputs(
            model="m",
            sensitivity="public",
            verdict=Verdict(edge=edge, cloud=cloud, rule_ids=("r",), reason="r", policy_hash="h"),
            edge=state,
            cloud=state,
            mode=mode,  # type: ignore[arg-type]
            failed=failed,
        )
    )


class Run:
    """Drives the generator with a script of outcomes and remembers what it asked."""

    def __init__(
        self,
        script: Sequence[NearfarError | None],
        *,
        at_s: float = math.inf,
        can_resume: bool = True,
        then: dict[str, bool] | None = None,
        max_attempts: int = 3,
        **first: bool | str,
    ) -> None:
        self.attempts: list[Attempt] = []
        self.asked: list[tuple[Route, ...]] = []
        self.error: NearfarError | None = None
        facts = {**first, **(then or {})}

        def again(failed: tuple[Route, ...], now_s: float) -> RouteDecision:
            self.asked.append(failed)
            return decision(failed=failed, **facts)  # type: ignore[arg-type]

        plan = attempts(
            decision(**first),  # type: ignore[arg-type]
            again,
            at_s=at_s,
            max_attempts=max_attempts,
        )
        try:
            attempt = next(plan)
            for now_s, error in enumerate(script, start=1):
                self.attempts.append(attempt)
                attempt = plan.send(Outcome(now_s=now_s, error=error, can_resume=can_resume))
            self.attempts.append(attempt)  # the script ended before the plan did
        except StopIteration:
            pass
        except NearfarError as error:
            self.error = error

    @property
    def routes(self) -> list[Route]:
        return [attempt.route for attempt in self.attempts]


DOWN = CloudUnavailable("gone")


def test_success_ends_it() -> None:
    run = Run([None])
    assert (run.routes, run.error, run.asked) == (["cloud"], None, [])
    assert run.attempts[0].number == 1


def test_a_retryable_failure_goes_to_the_other_route_after_asking_policy_again() -> None:
    run = Run([StreamInterrupted("cut", received_tokens=3), None])
    assert (run.routes, run.error) == (["cloud", "edge"], None)
    assert run.asked == [("cloud",)]
    assert [attempt.delay_s for attempt in run.attempts] == [0, 0]
    assert Run([EngineError("broken"), None], mode="prefer_edge").routes == ["edge", "cloud"]
    assert Run([Overloaded("full"), None]).routes == ["cloud", "edge"]


@pytest.mark.parametrize(
    "error", [InvalidInput("bad"), SecurityError("pin"), PolicyDenied("no"), DeadlineExceeded("x")]
)
def test_what_is_not_retryable_ends_it_at_once(error: NearfarError) -> None:
    run = Run([error])
    assert (run.routes, run.error, run.asked) == (["cloud"], error, [])


def test_policy_that_keeps_the_request_on_one_route_holds_in_repair() -> None:
    run = Run([EngineError("broken")], cloud=False)
    assert run.routes == ["edge"]
    assert isinstance(run.error, EngineError)


def test_policy_that_became_stricter_holds() -> None:
    run = Run([DOWN], then={"edge": False, "cloud": False})
    assert (run.routes, run.error) == (["cloud"], DOWN)


def test_policy_that_became_wider_does_not_widen_a_running_request() -> None:
    broken = EngineError("broken")
    run = Run([broken], cloud=False, then={"cloud": True})
    assert (run.routes, run.error) == (["edge"], broken)


def test_a_cloud_that_went_away_is_tried_once_more_when_there_is_no_other_route() -> None:
    run = Run([DOWN, None], edge=False)
    assert (run.routes, run.error) == (["cloud", "cloud"], None)
    assert run.attempts[1].delay_s > 0
    again = CloudUnavailable("gone again")
    run = Run([DOWN, again], edge=False)
    assert (run.routes, run.error) == (["cloud", "cloud"], again)
    full = Overloaded("full")
    assert Run([full], edge=False).error is full


def test_both_routes_failing_ends_with_the_last_error() -> None:
    broken = EngineError("broken")
    run = Run([DOWN, broken])
    assert (run.routes, run.error) == (["cloud", "edge"], broken)


def test_output_that_cannot_be_continued_is_not_started_again() -> None:
    run = Run([DOWN], can_resume=False)
    assert (run.routes, run.error) == (["cloud"], DOWN)


def test_after_the_deadline_the_error_says_what_was_tried() -> None:
    run = Run([DOWN], at_s=0.5)
    assert isinstance(run.error, DeadlineExceeded)
    assert run.error.tried == ("cloud",)
    assert "gone" in str(run.error)
    assert run.error.__cause__ is DOWN
    late_retry = Run([DOWN], at_s=1.05, edge=False)
    assert isinstance(late_retry.error, DeadlineExceeded)


def test_the_number_of_attempts_is_bounded() -> None:
    run = Run([DOWN], max_attempts=1)
    assert (run.routes, run.error) == (["cloud"], DOWN)


def test_no_route_at_all_raises_before_the_first_attempt() -> None:
    run = Run([], edge=False, cloud=False)
    assert run.attempts == []
    assert isinstance(run.error, PolicyDenied)


errors = st.sampled_from(
    [DOWN, StreamInterrupted("cut"), EngineError("broken"), Overloaded("full"), InvalidInput("x")]
)


@given(
    script=st.lists(errors, min_size=6, max_size=6),
    first=st.fixed_dictionaries({"edge": st.booleans(), "cloud": st.booleans()}),
    then=st.fixed_dictionaries({"edge": st.booleans(), "cloud": st.booleans()}),
    mode=st.sampled_from(("auto", "prefer_edge", "prefer_cloud", "edge_only", "cloud_only")),
)
def test_repair_never_leaves_the_first_verdict_and_always_ends(
    script: list[NearfarError], first: dict[str, bool], then: dict[str, bool], mode: str
) -> None:
    run = Run(script, then=then, mode=mode, **first)
    assert run.error is not None
    assert len(run.attempts) <= 3
    for number, route in enumerate(run.routes):
        assert first[route]
        assert number == 0 or then[route]
