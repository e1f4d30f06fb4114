from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nearfar.errors import (
    CloudUnavailable,
    ConfigError,
    InvalidInput,
    ModelNotFound,
    NearfarError,
    PolicyDenied,
)
from sdk.policy import Verdict
from sdk.policy.model import Requirement
from sdk.routing import (
    MODES,
    OBJECTIVES,
    DecisionInputs,
    Prediction,
    RequestSize,
    RouteDecision,
    RouteState,
    decide,
    replay,
)
from sdk.routing.router import MAX_ENDPOINT_BYTES, MAX_REASON_BYTES

HASH = "0" * 64
BOTH = Verdict(
    edge=True, cloud=True, rule_ids=("open",), policy_hash=HASH,
    reason="policy rule open allows the device and the cloud",
)  # fmt: skip
EDGE_ONLY = Verdict(
    edge=True, cloud=False, rule_ids=("clinic-2",), policy_hash=HASH,
    reason="policy rule clinic-2 keeps personal data on the device",
)  # fmt: skip
CLOUD_ONLY = Verdict(
    edge=False, cloud=True, rule_ids=("far",), policy_hash=HASH,
    reason="policy rule far allows the cloud and rules the device out",
)  # fmt: skip
DENIED = Verdict(
    edge=False, cloud=False, rule_ids=(), policy_hash=HASH,
    reason="no policy rule matches secret data for model 'assistant'",
)  # fmt: skip


def takes(p50_ms: float, p95_ms: float | None = None, **more: float) -> Prediction:
    return Prediction(basis="measured", p50_ms=p50_ms, p95_ms=p95_ms or p50_ms * 1.2, **more)


def inputs(
    edge: RouteState | Prediction,
    cloud: RouteState | Prediction,
    *,
    verdict: Verdict = BOTH,
    **more: object,
) -> DecisionInputs:
    return DecisionInputs(
        model="assistant",
        sensitivity="personal",
        verdict=verdict,
        edge=RouteState(prediction=edge) if isinstance(edge, Prediction) else edge,
        cloud=RouteState(prediction=cloud) if isinstance(cloud, Prediction) else cloud,
        **more,  # type: ignore[arg-type]
    )


def text(total_ms: float, first_ms: float) -> Prediction:
    return Prediction(
        basis="measured", p50_ms=total_ms, p95_ms=1.2 * total_ms, ttft_ms=first_ms,
        ttft_p95_ms=1.2 * first_ms, ms_per_token=30.0,
    )  # fmt: skip


FAST, SLOW, UNKNOWN = takes(20), takes(5000), Prediction()
BUSY = RouteState(prediction=takes(12_400), ahead=3)
NO_MODEL = RouteState(obstacle="no_model")
NO_CLOUD = RouteState(obstacle="not_configured")
DOWN = RouteState(obstacle="unreachable", detail="failed 3 times, next try in 4.0 s")


@pytest.mark.parametrize(
    ("given_inputs", "route", "fallback", "in_time", "reason"),
    [
        # policy first
        (inputs(SLOW, FAST, verdict=EDGE_ONLY, remaining_ms=6000), "edge", None, True,
         "edge: policy rule clinic-2 keeps personal data on the device"),
        (inputs(BUSY, FAST, verdict=EDGE_ONLY, remaining_ms=4000), "edge", None, False,
         "edge: policy rule clinic-2 keeps personal data on the device; it would take about "
         "12.4 s (3 requests ahead), the deadline is 4.0 s"),
        (inputs(FAST, SLOW, verdict=EDGE_ONLY, mode="prefer_cloud"), "edge", None, True,
         "edge: policy rule clinic-2 keeps personal data on the device"),
        (inputs(FAST, SLOW, verdict=CLOUD_ONLY), "cloud", None, True,
         "cloud: policy rule far allows the cloud and rules the device out"),
        # availability
        (inputs(SLOW, NO_CLOUD), "edge", None, True, "edge: no cloud is configured"),
        (inputs(SLOW, DOWN), "edge", None, True,
         "edge: the cloud cannot be reached (failed 3 times, next try in 4.0 s)"),
        (inputs(NO_MODEL, SLOW), "cloud", None, True,
         "cloud: this device cannot run model 'assistant'"),
        # mode
        (inputs(SLOW, FAST, mode="edge_only"), "edge", None, True, "edge: the mode is edge_only"),
        (inputs(FAST, SLOW, mode="cloud_only"), "cloud", None, True,
         "cloud: the mode is cloud_only"),
        (inputs(SLOW, FAST, mode="prefer_edge"), "edge", "cloud", True,
         "edge: the mode is prefer_edge"),
        (inputs(FAST, SLOW, mode="prefer_cloud"), "cloud", "edge", True,
         "cloud: the mode is prefer_cloud"),
        (inputs(BUSY, FAST, mode="prefer_edge", remaining_ms=4000), "cloud", "edge", True,
         "cloud: the edge would take about 12.4 s (3 requests ahead), the deadline is 4.0 s"),
        # deadline
        (inputs(takes(30), takes(90), remaining_ms=50), "edge", "cloud", True,
         "edge: the cloud would take about 90 ms, the deadline is 50 ms"),
        (inputs(takes(40, 70), takes(45, 48), remaining_ms=50), "cloud", "edge", True,
         "cloud: the edge may take 70 ms, the deadline is 50 ms"),
        (inputs(takes(30, 40), takes(20, 30, p99_ms=400, silence=0.4), remaining_ms=500), "edge",
         "cloud", True,
         "edge: the cloud may not answer at all, as of late, the deadline is 500 ms"),
        (inputs(takes(30, 40), takes(20, 30), confidence=0.99, remaining_ms=43), "cloud", "edge",
         True, "cloud: the edge may take 44 ms, the deadline is 43 ms"),
        (inputs(takes(200, 300), takes(90, 400), remaining_ms=50), "cloud", "edge", False,
         "cloud: neither route is expected to meet the deadline of 50 ms, this one is the most "
         "likely to (37 %)"),
        (inputs(takes(200, 300), takes(900, 990), remaining_ms=5), "edge", "cloud", False,
         "edge: neither route is expected to meet the deadline of 5.00 ms, this one comes closest "
         "(300 ms)"),
        # of a text the part that has come by then is kept
        (inputs(text(5300, 4000), text(27_000, 900), remaining_ms=1500), "cloud", "edge", False,
         "cloud: neither route is expected to meet the deadline of 1.5 s, this one begins in time "
         "(about 900 ms)"),
        (inputs(text(27_000, 700), text(5300, 4000), remaining_ms=1500), "edge", "cloud", False,
         "edge: neither route is expected to meet the deadline of 1.5 s, this one begins in time "
         "(about 700 ms)"),
        (inputs(text(5300, 700), text(27_000, 900), remaining_ms=1500), "edge", "cloud", False,
         "edge: neither route is expected to meet the deadline of 1.5 s, this one comes closest "
         "(6.4 s)"),
        # objective
        (inputs(takes(12), takes(85)), "edge", "cloud", True,
         "edge: about 12 ms, the cloud would take 85 ms"),
        (inputs(takes(850), takes(85)), "cloud", "edge", True,
         "cloud: about 85 ms, the edge would take 850 ms"),
        (inputs(takes(90), takes(85)), "edge", "cloud", True,
         "edge: as fast as the cloud (about 90 ms), and nothing leaves the device"),
        (inputs(takes(850, load_ms=600), takes(85)), "cloud", "edge", True,
         "cloud: about 85 ms, the edge would take 850 ms (the model is not loaded yet)"),
        (inputs(RouteState(prediction=FAST, quality_rank=1),
                RouteState(prediction=SLOW, quality_rank=0), objective="quality"),
         "cloud", "edge", True, "cloud: its variant of the model has the better quality"),
        (inputs(RouteState(prediction=FAST, quality_rank=1),
                RouteState(prediction=SLOW, quality_rank=0), objective="quality",
                remaining_ms=100),
         "edge", "cloud", True, "edge: the cloud would take about 5.0 s, the deadline is 100 ms"),
        (inputs(RouteState(prediction=FAST, quality_rank=0),
                RouteState(prediction=SLOW, quality_rank=0), objective="quality"),
         "edge", "cloud", True, "edge: about 20 ms, the cloud would take 5.0 s"),
        # nothing known yet
        (inputs(UNKNOWN, UNKNOWN), "edge", "cloud", True,
         "edge: how long it takes is not known yet, and nothing leaves the device"),
        (inputs(UNKNOWN, FAST, remaining_ms=100), "cloud", "edge", True,
         "cloud: about 20 ms, and how long the edge takes is not known yet"),
        (inputs(FAST, UNKNOWN), "edge", "cloud", True,
         "edge: about 20 ms, and how long the cloud takes is not known yet"),
        (inputs(SLOW, UNKNOWN, remaining_ms=100), "cloud", "edge", True,
         "cloud: the edge would take about 5.0 s, the deadline is 100 ms"),
        # repair
        (inputs(FAST, SLOW, failed=("edge",)), "cloud", None, True,
         "cloud: the edge gave no whole answer"),
        (inputs(SLOW, FAST, failed=("cloud",)), "edge", None, True,
         "edge: the cloud gave no whole answer"),
        (inputs(NO_MODEL, FAST, failed=("cloud",)), "cloud", None, True,
         "cloud: this device cannot run model 'assistant'"),
    ],
)  # fmt: skip
def test_table_of_decisions(
    given_inputs: DecisionInputs,
    route: str,
    fallback: str | None,
    in_time: bool,
    reason: str,
) -> None:
    decision = decide(given_inputs)
    assert decision.reason == reason
    assert (decision.route, decision.fallback) == (route, fallback)
    assert decision.meets_deadline is in_time
    assert decision.error() is None
    decision.raise_if_denied()


@pytest.mark.parametrize(
    ("given_inputs", "error", "words"),
    [
        (inputs(FAST, FAST, verdict=DENIED), PolicyDenied, "No policy rule matches secret data"),
        (inputs(FAST, FAST, verdict=EDGE_ONLY, mode="cloud_only"), PolicyDenied,
         "The mode is cloud_only, but policy rule clinic-2 keeps personal data on the device"),
        (inputs(FAST, FAST, verdict=CLOUD_ONLY, mode="edge_only"), PolicyDenied,
         "The mode is edge_only, but policy rule far"),
        (inputs(NO_MODEL, FAST, verdict=EDGE_ONLY), ModelNotFound,
         "This device cannot run model 'assistant'; policy rule clinic-2"),
        (inputs(NO_MODEL, NO_MODEL), ModelNotFound, "the cloud cannot run model 'assistant'"),
        (inputs(NO_MODEL, NO_CLOUD), ModelNotFound, "no cloud is configured"),
        (inputs(NO_MODEL, DOWN), CloudUnavailable, "the cloud cannot be reached (failed 3 times"),
        (inputs(FAST, DOWN, mode="cloud_only"), CloudUnavailable, "The mode is cloud_only; the"),
        (inputs(FAST, NO_CLOUD, verdict=CLOUD_ONLY), ConfigError, "no cloud is configured"),
        (inputs(NO_CLOUD, FAST, verdict=EDGE_ONLY), ConfigError, "No local models are configured"),
    ],
)  # fmt: skip
def test_without_a_route_the_error_says_what_stands_in_the_way(
    given_inputs: DecisionInputs, error: type[NearfarError], words: str
) -> None:
    decision = decide(given_inputs)
    assert (decision.route, decision.fallback) == (None, None)
    assert decision.reason.startswith("no route: ")
    with pytest.raises(error) as caught:
        decision.raise_if_denied()
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert caught.value.fix


def test_policy_refusal_names_its_rule() -> None:
    error = decide(inputs(FAST, FAST, verdict=EDGE_ONLY, mode="cloud_only")).error()
    assert isinstance(error, PolicyDenied)
    assert error.rule == "clinic-2"


def test_candidates_say_how_each_route_fared() -> None:
    edge, cloud = decide(inputs(BUSY, FAST, verdict=EDGE_ONLY, remaining_ms=4000)).candidates
    assert (edge.route, edge.is_eligible, edge.note, edge.meets_deadline) == (
        "edge", True, "", False,
    )  # fmt: skip
    assert (cloud.route, cloud.is_eligible, cloud.note) == ("cloud", False, "policy")
    assert edge.prediction.p50_ms == 12_400


names = st.text(max_size=200)
milliseconds = st.none() | st.floats(0, 1e7)
predictions = st.builds(
    lambda basis, p50, extra, rest: Prediction(
        basis=basis,
        p50_ms=p50,
        p95_ms=None if p50 is None else p50 + extra,
        ttft_ms=rest,
        ms_per_token=rest,
        queue_ms=extra,
        network_ms=extra,
        load_ms=extra,
    ),
    st.sampled_from(("measured", "seeded", "unknown")),
    milliseconds,
    st.floats(0, 1e6),
    milliseconds,
)
states = st.builds(
    RouteState,
    obstacle=st.sampled_from(("", "", "no_model", "not_configured", "unreachable")),
    detail=names,
    prediction=predictions,
    quality_rank=st.none() | st.integers(0, 10),
    ahead=st.integers(0, 10**9),
)
verdicts = st.builds(
    Verdict,
    edge=st.booleans(),
    cloud=st.booleans(),
    rule_ids=st.lists(st.text("abc", min_size=1, max_size=48), max_size=9).map(tuple),
    reason=names,
    policy_hash=st.just(HASH),
    require=st.builds(
        Requirement,
        padding=st.sampled_from(("off", "balanced", "strict")),
        attestation=st.booleans(),
        region=st.none() | st.just(("eu",)),
    ),
)
any_inputs = st.builds(
    DecisionInputs,
    model=names,
    sensitivity=names,
    verdict=verdicts,
    edge=states,
    cloud=states,
    mode=st.sampled_from(MODES),
    objective=st.sampled_from(OBJECTIVES),
    remaining_ms=milliseconds,
    failed=st.lists(st.sampled_from(("edge", "cloud")), unique=True).map(tuple),
)


@given(any_inputs)
def test_replay_reproduces_a_decision_from_its_record(given_inputs: DecisionInputs) -> None:
    decision = decide(given_inputs)
    assert replay(decision) == decision
    assert replay(decision.encode()) == decision


@given(any_inputs)
def test_a_route_is_taken_only_if_policy_and_mode_allow_it(given_inputs: DecisionInputs) -> None:
    decision = decide(given_inputs)
    for route in (decision.route, decision.fallback):
        if route is not None:
            assert given_inputs.verdict.allows(route)
            assert given_inputs.state(route).obstacle == ""
            assert given_inputs.mode != ("cloud_only" if route == "edge" else "edge_only")
    assert decision.route != decision.fallback or decision.route is None
    assert (decision.error() is None) == (decision.route is not None)


@given(any_inputs, verdicts)
def test_the_same_request_with_another_latency_never_opens_a_route(
    given_inputs: DecisionInputs, verdict: Verdict
) -> None:
    decision = decide(msgspec.structs.replace(given_inputs, verdict=verdict))
    assert decision.route is None or verdict.allows(decision.route)


def test_the_largest_record_stays_within_1024_bytes() -> None:
    state = RouteState(
        obstacle="",
        detail="ü" * 500,
        prediction=Prediction(
            basis="measured", p50_ms=1.1e6, p95_ms=1e7 / 3, ttft_ms=1.1, ms_per_token=1.1,
            queue_ms=1.1, network_ms=1.1, load_ms=1.1, p20_ms=1.1, p80_ms=1.1, p99_ms=1.1,
            ttft_p95_ms=1.1, silence=0.1,
        ),
        quality_rank=1000,
        ahead=2**40,
        quality=0.1,
        cost=0.1,
        energy_j=0.1,
    )  # fmt: skip
    longest_reason = 0
    for edge in (True, False):
        for cloud in (True, False):
            for obstacle in ("", "unreachable", "not_configured", "no_model"):
                decision = decide(
                    DecisionInputs(
                        model="模" * 500,
                        sensitivity="ü" * 500,
                        verdict=Verdict(
                            edge=edge,
                            cloud=cloud,
                            rule_ids=("r" * 48,) * 50,
                            reason="ü" * 500,
                            policy_hash=HASH,
                            require=Requirement(
                                padding="balanced", attestation=True, region=("r" * 32,)
                            ),
                        ),
                        edge=msgspec.structs.replace(state, obstacle=obstacle),
                        cloud=msgspec.structs.replace(state, obstacle=obstacle),
                        mode="prefer_cloud",
                        objective="quality",
                        remaining_ms=1.1,
                        size=RequestSize(
                            input_tokens=2**40,
                            max_new_tokens=2**40,
                            upload_bytes=2**40,
                            download_bytes=2**40,
                        ),
                        failed=("edge", "cloud"),
                        endpoint="e" * MAX_ENDPOINT_BYTES,
                        weights=(10_000, 10_000, 10_000, 10_000),
                    )
                )
                assert len(decision.encode()) <= 1024
                longest_reason = max(longest_reason, len(decision.reason.encode()))
    # Some decision above had a reason as long as one can be, give or take a cut character.
    assert longest_reason >= MAX_REASON_BYTES - 4


@given(st.binary() | st.just(b"\x91" * 5000))
@example(b"\x95\xa3\x00\x00\x80")  # text that is not UTF-8
def test_bytes_that_are_no_record_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput, match="not a decision record"):
        replay(data)


@pytest.mark.parametrize(
    "damage",
    [
        {"confidence": 2.0},
        {"confidence": float("nan")},
        {"confidence": 0.0},
        {"remaining_ms": float("inf")},
        {"edge": RouteState(prediction=Prediction(p50_ms=None, p95_ms=30.0))},
        {"cloud": RouteState(prediction=Prediction(p50_ms=20.0, p95_ms=float("nan")))},
        {"cloud": RouteState(prediction=Prediction(p50_ms=20.0, p95_ms=-1.0))},
        {"cloud": RouteState(prediction=Prediction(queue_ms=float("inf")))},
    ],
)
def test_a_record_of_figures_that_cannot_be_is_refused(damage: dict[str, object]) -> None:
    decision = decide(inputs(FAST, SLOW, remaining_ms=16.0))
    damaged = msgspec.structs.replace(decision.inputs, **damage)
    record = msgspec.structs.replace(decision, inputs=damaged).encode()
    with pytest.raises(InvalidInput, match="do not fit together"):
        replay(record)


def test_a_decision_is_readable_as_a_struct() -> None:
    decision = decide(inputs(FAST, SLOW))
    again = msgspec.msgpack.decode(decision.encode(), type=RouteDecision)
    assert again == decision
    assert again.verdict == BOTH


def test_a_lower_confidence_accepts_a_route_that_is_sometimes_late() -> None:
    given_inputs = inputs(takes(20, 70), takes(45, 48), remaining_ms=60)
    assert decide(given_inputs).route == "cloud"
    bolder = msgspec.structs.replace(given_inputs, confidence=0.8)
    decision = decide(bolder)
    assert (decision.route, decision.meets_deadline) == ("edge", True)
    assert replay(decision.encode()) == decision


def test_records_of_predictions_without_all_quantiles_are_read() -> None:
    prediction = takes(40, 70)
    quantiles = prediction.quantiles()
    assert quantiles is not None
    assert list(quantiles) == sorted(quantiles)
    assert prediction.probability_in_time(70) == pytest.approx(0.95)
    assert Prediction().probability_in_time(1) == 1.0


def test_of_two_routes_in_time_the_surer_one_beats_a_slightly_faster_one() -> None:
    sure, quick = takes(50, 60), takes(44, 98)
    decision = decide(inputs(sure, quick, remaining_ms=100))
    assert decision.route == "edge"
    assert decide(inputs(takes(90, 95), takes(20, 30), remaining_ms=100)).route == "cloud"


def test_a_cloud_that_left_requests_unanswered_is_not_held_to_be_in_time() -> None:
    quick = takes(20, 30)
    silent = msgspec.structs.replace(quick, silence=0.5)
    assert decide(inputs(takes(80, 90), quick, remaining_ms=100)).route == "cloud"
    decision = decide(inputs(takes(80, 90), silent, remaining_ms=100))
    assert decision.route == "edge"
    assert decision.candidates[1].probability == pytest.approx(0.5)
    assert not decision.candidates[1].meets_deadline
    assert replay(decision.encode()) == decision
