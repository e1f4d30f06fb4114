from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdk.policy import Verdict
from sdk.routing import (
    MODES,
    DecisionInputs,
    Prediction,
    RouteDecision,
    RouteState,
    decide,
    replay,
)
from sdk.routing.hedging import (
    BURST,
    HedgePlan,
    Hedging,
    gain,
    outlasts,
    plan,
    stalls_after_ms,
)

HASH = "0" * 64
BOTH = Verdict(edge=True, cloud=True, rule_ids=("open",), policy_hash=HASH, reason="open")
EDGE_ONLY = Verdict(edge=True, cloud=False, rule_ids=("here",), policy_hash=HASH, reason="here")
CLOUD_ONLY = Verdict(edge=False, cloud=True, rule_ids=("far",), policy_hash=HASH, reason="far")


def takes(p50_ms: float, p95_ms: float, p99_ms: float, **more: object) -> Prediction:
    return Prediction(
        basis="measured", p20_ms=0.9 * p50_ms, p50_ms=p50_ms, p80_ms=(p50_ms + p95_ms) / 2,
        p95_ms=p95_ms, p99_ms=p99_ms, **more,
    )  # type: ignore[arg-type]  # fmt: skip


SLOW, QUICK = takes(200, 240, 260), takes(50, 80, 100)


def decision(
    edge: Prediction = SLOW, cloud: Prediction = QUICK, *, tokens: float = 5.0, **more: object
) -> RouteDecision:
    fields = {
        "model": "m", "sensitivity": "public", "verdict": BOTH, "edge": RouteState(prediction=edge),
        "cloud": RouteState(prediction=cloud), "hedge_tokens": tokens,
    } | more  # fmt: skip
    return decide(DecisionInputs(**fields))  # type: ignore[arg-type]


def planned(made: RouteDecision) -> HedgePlan:
    found = plan(made)
    assert found is not None
    return found


# -- when ----------------------------------------------------------------------------------------


def test_the_other_route_is_planned_for_when_most_answers_would_have_come() -> None:
    found = planned(decision(edge=takes(100, 120, 130)))
    assert (found.first, found.other, found.after_ms) == ("cloud", "edge", 80)
    assert "95 of 100" in found.why


def test_few_hedges_left_are_kept_for_later_moments() -> None:
    assert planned(decision(edge=takes(100, 120, 130), tokens=1.5)).after_ms == 100


def test_a_hair_later_than_usual_is_no_sign_of_anything() -> None:
    steady = decision(edge=takes(80, 81, 82), cloud=takes(50, 50.1, 50.2))
    assert planned(steady).after_ms == 67.5


def test_a_slow_route_is_not_started_for_a_short_silence() -> None:
    assert planned(decision(edge=takes(4000, 5000, 6000))).after_ms == 2000


def asked_again(made: RouteDecision, tokens: float = 5.0) -> str | HedgePlan | None:
    """What becomes of a plan when its moment comes and nothing else has changed."""
    found, hedging = planned(made), Hedging()
    for _ in range(1000):
        hedging.request()
    left_ms = made.inputs.remaining_ms
    assert left_ms is not None
    later = msgspec.structs.replace(
        made.inputs, remaining_ms=left_ms - found.after_ms, hedge_tokens=tokens
    )
    return hedging.start(found, made, decide(later))


def test_with_a_deadline_the_first_route_is_looked_at_when_half_of_the_answers_have_come() -> None:
    assert planned(decision(remaining_ms=450)).after_ms == 50


def test_the_other_route_is_started_as_late_as_it_still_meets_the_deadline() -> None:
    later = asked_again(decision(remaining_ms=450))
    assert isinstance(later, HedgePlan)
    assert 80 <= later.after_ms <= 450 - 200
    now = decision(remaining_ms=450 - later.after_ms)
    hedging = Hedging()
    why = hedging.start(later, decision(remaining_ms=450), now)
    assert isinstance(why, str)
    assert "saves most deadlines" in why
    assert hedging.started == 1


def test_a_hedge_is_dearer_when_few_are_left() -> None:
    doubtful = decision(cloud=takes(100, 300, 400), remaining_ms=500)
    many, few = asked_again(doubtful, 10.0), asked_again(doubtful, 1.0)
    assert isinstance(many, HedgePlan)
    assert few is None or (isinstance(few, HedgePlan) and few.after_ms > many.after_ms)


def test_no_hedge_is_started_where_the_other_route_would_be_late_anyway() -> None:
    assert asked_again(decision(edge=takes(290, 300, 310), remaining_ms=300)) is None


def test_answers_that_are_late_for_long_are_hedged_earlier() -> None:
    made = decision(remaining_ms=600)
    thin, fat = (
        asked_again(decision(cloud=msgspec.structs.replace(QUICK, tail=tail), remaining_ms=600))
        for tail in (6.0, 0.3)
    )
    assert isinstance(fat, HedgePlan)
    assert made.route == "cloud"
    assert thin is None or (isinstance(thin, HedgePlan) and fat.after_ms <= thin.after_ms)


def test_a_tail_goes_on_where_quantiles_end() -> None:
    known = QUICK.quantiles()
    assert known is not None
    assert outlasts(known, 20, 1.0) == 1.0
    assert outlasts(known, 80, 1.0) == pytest.approx(0.05)
    assert outlasts(known, 800, 1.0) == pytest.approx(0.005)
    assert outlasts(known, 800, 2.0) == pytest.approx(0.0005)
    chances = [outlasts(known, ms, 1.5) for ms in range(10, 1000, 10)]
    assert chances == sorted(chances, reverse=True)


def test_a_device_that_is_in_time_even_if_slowed_down_is_not_hedged() -> None:
    quick = takes(10, 12, 13)
    assert decision(edge=quick).route == "edge"
    assert plan(decision(edge=quick)) is None
    assert plan(decision(edge=quick, remaining_ms=500)) is None


def test_a_device_that_may_miss_the_deadline_is_hedged() -> None:
    made = decision(edge=takes(30, 100, 200), cloud=takes(60, 70, 80), remaining_ms=150)
    assert made.route == "edge"
    assert planned(made).other == "cloud"


def test_a_device_that_slows_down_is_hedged_while_the_cloud_can_still_answer() -> None:
    made = decision(edge=takes(60, 72, 80), cloud=takes(100, 150, 180), remaining_ms=450)
    assert made.route == "edge"
    assert 72 <= planned(made).after_ms <= 350


def test_a_route_that_nobody_knows_is_hedged_after_a_second() -> None:
    made = decision(cloud=Prediction(), mode="prefer_cloud")
    assert made.route == "cloud"
    assert planned(made).after_ms == 1000
    hurried = decision(cloud=Prediction(), mode="prefer_cloud", remaining_ms=800)
    assert planned(hurried).after_ms == 400


def test_text_is_hedged_by_its_first_token_not_by_its_length() -> None:
    text = takes(4000, 6000, 7000, ttft_ms=80.0, ttft_p95_ms=120.0)
    here = takes(8000, 9000, 9500, ttft_ms=200.0, ttft_p95_ms=250.0)
    assert planned(decision(edge=here, cloud=text)).after_ms == 120


# -- whether -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [EDGE_ONLY, CLOUD_ONLY])
def test_policy_that_leaves_one_route_leaves_no_hedge(verdict: Verdict) -> None:
    assert plan(decision(verdict=verdict)) is None


@pytest.mark.parametrize("mode", ["edge_only", "cloud_only"])
def test_a_mode_that_leaves_one_route_leaves_no_hedge(mode: str) -> None:
    assert plan(decision(mode=mode)) is None


def test_an_open_breaker_a_failure_before_and_an_empty_budget_leave_no_hedge() -> None:
    gone = RouteState(obstacle="unreachable")
    assert plan(decide(msgspec.structs.replace(decision().inputs, edge=gone))) is None
    assert plan(decision(failed=("edge",))) is None
    assert plan(decision(tokens=0.9)) is None


def test_a_route_with_a_long_queue_is_not_given_more() -> None:
    busy = takes(900, 1000, 1100, queue_ms=700.0)
    assert plan(decision(edge=busy)) is None


def test_an_app_that_wants_quality_and_can_wait_is_not_given_less() -> None:
    worse = RouteState(prediction=SLOW, quality_rank=1)
    better = RouteState(prediction=QUICK, quality_rank=0)
    made = decide(
        msgspec.structs.replace(decision().inputs, edge=worse, cloud=better, objective="quality")
    )
    assert made.route == "cloud"
    assert plan(made) is None
    hurried = decide(msgspec.structs.replace(made.inputs, remaining_ms=1000.0))
    assert plan(hurried) is not None


@given(
    edge=st.booleans(), cloud=st.booleans(), mode=st.sampled_from(MODES),
    tokens=st.floats(0, 10), remaining_ms=st.none() | st.floats(1, 1000),
    e=st.floats(1, 500), c=st.floats(1, 500),
)  # fmt: skip
def test_a_hedge_is_never_planned_on_a_route_that_policy_closes(
    edge: bool, cloud: bool, mode: str, tokens: float, remaining_ms: float | None,
    e: float, c: float,
) -> None:  # fmt: skip
    verdict = Verdict(edge=edge, cloud=cloud, rule_ids=(), policy_hash=HASH, reason="r")
    made = decision(
        takes(e, 1.5 * e, 2 * e), takes(c, 1.5 * c, 2 * c), tokens=tokens, verdict=verdict,
        mode=mode, remaining_ms=remaining_ms,
    )  # fmt: skip
    found = plan(made)
    if found is not None:
        assert verdict.allows(found.other)
        assert verdict.allows(found.first)
        assert found.other != made.route
        assert tokens >= 1
        assert found.after_ms >= 0
        assert remaining_ms is None or found.after_ms < remaining_ms


def test_a_record_of_a_decision_tells_its_hedge() -> None:
    made = decision()
    assert len(made.encode()) <= 1024
    again = replay(made.encode())
    assert again == made
    assert plan(again) == plan(made) is not None


# -- starting it ---------------------------------------------------------------------------------


def test_a_hedge_is_started_once_the_moment_has_come_and_says_why() -> None:
    hedging = Hedging()
    made = decision(tokens=hedging.tokens(0.0))
    why = hedging.start(planned(made), made, made)
    assert isinstance(why, str)
    assert why.startswith("the cloud had not answered after 100 ms")
    assert hedging.started == 1


def test_policy_is_asked_again_and_can_only_narrow() -> None:
    hedging = Hedging()
    made = decision()
    narrowed = decide(msgspec.structs.replace(made.inputs, verdict=CLOUD_ONLY))
    assert hedging.start(planned(made), made, narrowed) is None
    widened = decide(msgspec.structs.replace(made.inputs, verdict=BOTH))
    began = decide(msgspec.structs.replace(made.inputs, verdict=CLOUD_ONLY))
    assert hedging.start(planned(made), began, widened) is None
    assert hedging.started == 0


def test_a_route_that_became_too_slow_meanwhile_is_not_started() -> None:
    hedging = Hedging()
    made = decision(remaining_ms=500.0)
    later = decision(edge=takes(900, 1000, 1100), remaining_ms=420.0)
    assert hedging.start(planned(made), made, later) is None


def test_five_in_a_hundred_requests_are_hedged_and_no_more() -> None:
    hedging = Hedging(0.05)
    requests, now_s = 2000, 0.0
    for _ in range(requests):
        now_s += 0.1
        hedging.request()
        made = decision(tokens=hedging.tokens(now_s))
        found = plan(made)
        if found is not None:
            hedging.start(found, made, made)
    assert 0.045 * requests <= hedging.started <= 0.05 * requests + 1


def test_a_quiet_day_does_not_save_up_for_a_storm() -> None:
    hedging = Hedging()
    for _ in range(10_000):
        hedging.request()
    assert hedging.tokens(0.0) == BURST


def test_a_budget_of_nothing_turns_hedging_off() -> None:
    hedging = Hedging(0.0)
    for _ in range(1000):
        hedging.request()
    assert hedging.tokens(0.0) == 0.0
    made = decision()
    assert hedging.start(planned(made), made, made) is None


def test_an_overloaded_route_turns_hedging_off_for_a_while() -> None:
    hedging = Hedging()
    hedging.overloaded(100.0)
    assert hedging.tokens(101.0) == 0.0
    assert hedging.tokens(106.0) == 1.0


def test_when_everything_is_late_hedging_is_off_until_it_is_not() -> None:
    hedging = Hedging(1.0)  # the budget alone would allow all of them
    started = 0
    for _ in range(100):
        hedging.request()
        made = decision(tokens=hedging.tokens(0.0))
        found = plan(made)
        if found is not None and hedging.start(found, made, made) is not None:
            started += 1
    assert started < 50
    for _ in range(40):
        hedging.request()
    assert hedging.tokens(0.0) >= 1.0


# -- gain and stalls -----------------------------------------------------------------------------


def test_the_longer_the_silence_the_more_there_is_to_gain() -> None:
    gains = [gain(QUICK, SLOW, silent_ms=ms, left_ms=300.0) for ms in (40, 70, 90, 130)]
    assert gains == sorted(gains)
    assert gains[-1] > 0.3
    assert gains[-1] > 3 * gains[0]


def test_there_is_nothing_to_gain_where_the_other_route_is_too_late() -> None:
    assert gain(QUICK, SLOW, silent_ms=110, left_ms=100.0) == 0.0


@given(p50=st.floats(1, 5000), wide=st.floats(1, 3))
def test_a_stall_is_noticed_within_half_a_second_of_what_is_expected(p50: float, wide: float):
    prediction = takes(p50, p50 * wide, p50 * wide * 1.2)
    assert prediction.p99_ms is not None
    assert prediction.p99_ms + 50 <= stalls_after_ms(prediction) <= prediction.p99_ms + 500


def test_a_stall_is_noticed_within_one_and_a_half_seconds_when_cold() -> None:
    assert stalls_after_ms(Prediction()) == 1500
    seeded = msgspec.structs.replace(QUICK, basis="seeded")
    assert stalls_after_ms(seeded) == 1500
