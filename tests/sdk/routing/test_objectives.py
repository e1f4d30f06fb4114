from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.bundle.manifest import QualityFigure, Variant
from nearfar.errors import ConfigError, InvalidInput
from sdk.policy.model import Verdict
from sdk.routing import DecisionInputs, Prediction, RequestSize, RouteState, decide, replay
from sdk.routing.objectives import (
    FREE,
    Price,
    check_figures,
    checked_weights,
    expected_tokens,
    priced,
    quality_of,
)
from sdk.routing.types import MODES, OBJECTIVES

OPEN = Verdict(edge=True, cloud=True, rule_ids=("r",), reason="r", policy_hash="0" * 64)
SIZE = RequestSize(input_tokens=1000, max_new_tokens=100, upload_bytes=4_000_000)


def takes(p50_ms: float, **fields: object) -> Prediction:
    return Prediction(basis="measured", p50_ms=p50_ms, p95_ms=1.5 * p50_ms, **fields)


def state(p50_ms: float = 100.0, **fields: object) -> RouteState:
    return RouteState(prediction=takes(p50_ms), **fields)


def choose(edge: RouteState, cloud: RouteState, **fields: object):
    return decide(
        DecisionInputs(
            model="m", sensitivity="public", verdict=OPEN, edge=edge, cloud=cloud, **fields
        )
    )


# -- what a route costs ---------------------------------------------------------------------------


def test_money_is_counted_by_request_and_token() -> None:
    price = Price(
        cost_per_request=0.5, cost_per_1k_input_tokens=2.0, cost_per_1k_output_tokens=10.0
    )
    # 1 + (400 - 100) / 10 tokens are expected, not the 100 that are allowed.
    talk = takes(400.0, ttft_ms=100.0, ms_per_token=10.0)
    assert expected_tokens(SIZE, talk) == 31.0
    assert price.cost(SIZE, talk) == pytest.approx(0.5 + 2.0 + 0.31)
    assert price.cost(SIZE, Prediction()) == pytest.approx(0.5 + 2.0 + 1.0)


def test_energy_is_power_over_time_and_bytes_over_the_air() -> None:
    price = Price(power_w=10.0, energy_per_request_j=0.25, energy_per_mb_j=3.0)
    busy = takes(500.0, queue_ms=100.0)
    assert price.energy_j("edge", SIZE, busy) == pytest.approx(0.25 + 4.0)
    assert price.energy_j("cloud", SIZE, busy) == pytest.approx(0.25 + 5.0 + 12.0)
    assert price.energy_j("edge", SIZE, Prediction()) is None
    assert Price(energy_per_request_j=1.0).energy_j("edge", SIZE, Prediction()) == 1.0


def test_quality_is_the_worst_part_of_one_that_the_bundle_measured() -> None:
    def figure(metric: str, value: float, *, up: bool = True) -> QualityFigure:
        return QualityFigure(
            metric=metric, value=value, higher_is_better=up, samples=9, reference="fp32"
        )

    variant = Variant(id="v", engine="onnxruntime", precision="int8", entry="m.onnx", files=())
    assert quality_of(variant) is None
    figures = (
        figure("cosine_mean", 0.999), figure("top1_agreement", 0.97),
        figure("max_abs_error", 0.01, up=False), figure("throughput", 40.0),
    )  # fmt: skip
    assert quality_of(msgspec.structs.replace(variant, quality=figures)) == 0.97
    assert quality_of(msgspec.structs.replace(variant, quality=figures[2:])) is None


def test_what_cannot_be_taken_has_no_price() -> None:
    closed = RouteState(obstacle="unreachable")
    assert priced(closed, "cloud", SIZE, Price(cost_per_request=1.0), None) is closed


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_price_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        Price(energy_per_mb_j=value)
    assert caught.value.field == "energy_per_mb_j"


# -- choosing -------------------------------------------------------------------------------------


def test_the_cheaper_route_is_taken_though_it_is_slower() -> None:
    made = choose(state(10.0, cost=0.2), state(90.0, cost=0.1), objective="cost")
    assert (made.route, made.fallback) == ("cloud", "edge")
    assert made.reason == "cloud: it costs less (0.1 instead of 0.2)"
    assert choose(state(10.0, cost=0.2), state(90.0, cost=0.1)).route == "edge"


def test_energy_is_this_devices() -> None:
    made = choose(
        state(10.0, energy_j=3.0), state(90.0, energy_j=0.5), objective="energy", remaining_ms=1e4
    )
    assert made.reason == (
        "cloud: it takes less of this device's energy (0.5 J instead of 3 J), "
        "and it is expected in time"
    )


def test_measured_quality_comes_before_the_rank() -> None:
    edge = state(10.0, quality=0.97, quality_rank=0)
    cloud = state(90.0, quality=0.999, quality_rank=1)
    made = choose(edge, cloud, objective="quality")
    assert made.route == "cloud"
    assert "better quality (0.999 against 0.97)" in made.reason
    unmeasured = msgspec.structs.replace(cloud, quality=None)
    assert choose(edge, unmeasured, objective="quality").route == "edge"


def test_the_deadline_comes_before_the_price() -> None:
    edge, cheap = state(10.0, cost=5.0), state(900.0, cost=0.0)
    made = choose(edge, cheap, objective="cost", remaining_ms=500.0)
    assert made.route == "edge"
    assert choose(edge, cheap, objective="cost", remaining_ms=5000.0).route == "cloud"


def test_a_mode_comes_before_the_price() -> None:
    edge, cloud = state(cost=5.0), state(cost=0.0)
    assert choose(edge, cloud, objective="cost", mode="prefer_edge").route == "edge"


def test_without_a_difference_speed_decides() -> None:
    for objective in OBJECTIVES:
        made = choose(state(100.0, cost=1.0), state(10.0, cost=1.0), objective=objective)
        assert made.route == "cloud"
        assert "about 10 ms" in made.reason


def test_weights_trade_one_measure_against_another() -> None:
    # The cloud costs twice as much and is ten times as fast.
    edge, cloud = state(1000.0, cost=1.0), state(100.0, cost=2.0)
    alone = choose(edge, cloud, objective="cost")
    mild = choose(edge, cloud, objective="cost", weights=checked_weights({"latency": 0.2}))
    strong = choose(edge, cloud, objective="cost", weights=checked_weights({"latency": 1}))
    assert (alone.route, mild.route, strong.route) == ("edge", "edge", "cloud")
    assert strong.reason == "cloud: the better balance of latency 1, cost 1 (1.10 against 1.50)"


def test_of_quality_the_loss_is_what_counts() -> None:
    # Three points of quality are less than half of the time.
    edge, cloud = state(50.0, quality=0.97), state(100.0, quality=1.0)
    weights = checked_weights({"quality": 1})
    assert choose(edge, cloud, weights=weights).route == "edge"
    weights = checked_weights({"quality": 50})
    assert choose(edge, cloud, weights=weights).route == "cloud"


def test_what_one_side_does_not_tell_is_left_out() -> None:
    edge, cloud = state(100.0, cost=9.0), state(10.0, quality=0.5)
    made = choose(edge, cloud, weights=checked_weights({"cost": 5, "quality": 5}))
    assert made.reason == "cloud: the better balance of latency 1 (0.10 against 1.00)"


@pytest.mark.parametrize("wrong", [{"speed": 1}, {"cost": -1}, {"cost": 101}, {"cost": True}])
def test_wrong_weights_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_weights(wrong)
    assert caught.value.field == "weights"


def test_weights_of_nothing_are_none() -> None:
    assert checked_weights({}) is checked_weights({"cost": 0.0}) is None
    assert checked_weights({"cost": 0.25}) == (0, 0, 25, 0)


def test_an_objective_that_nothing_tells_about_is_refused() -> None:
    check_figures("latency", (), is_config=True)
    check_figures("quality", (), is_config=True)
    check_figures("cost", (FREE, Price(cost_per_request=0.1)), is_config=True)
    with pytest.raises(ConfigError, match="energy"):
        check_figures("energy", (Price(cost_per_request=0.1),), is_config=True)
    with pytest.raises(InvalidInput) as caught:
        check_figures("cost", (), is_config=False)
    assert not isinstance(caught.value, ConfigError)


FIGURES = st.none() | st.floats(0.0, 1e6)
STATES = st.builds(
    lambda p50_ms, spread, rank, quality, cost, energy_j: RouteState(
        prediction=Prediction(basis="measured", p50_ms=p50_ms, p95_ms=p50_ms * spread),
        quality_rank=rank,
        quality=quality,
        cost=cost,
        energy_j=energy_j,
    ),
    st.floats(0.1, 1e5),
    st.floats(1.0, 4.0),
    st.none() | st.integers(0, 3),
    st.none() | st.floats(0.0, 1.0),
    FIGURES,
    FIGURES,
)
WEIGHTS = st.none() | st.tuples(*[st.integers(0, 10_000)] * 4)
ASKED = st.builds(
    lambda edge, cloud, objective, weights, mode, remaining_ms: DecisionInputs(
        model="m", sensitivity="public", verdict=OPEN, edge=edge, cloud=cloud, mode=mode,
        objective=objective, weights=weights, remaining_ms=remaining_ms, endpoint="main",
    ),
    STATES, STATES, st.sampled_from(OBJECTIVES), WEIGHTS, st.sampled_from(MODES),
    st.none() | st.floats(0.1, 1e6),
)  # fmt: skip


@given(ASKED)
def test_every_objective_keeps_mode_and_deadline_and_replays(inputs: DecisionInputs) -> None:
    made = decide(inputs)
    assert made.route is not None
    assert len(made.encode()) <= 1024
    assert replay(made.encode()).encode() == made.encode()
    if inputs.mode == "edge_only":
        assert made.route == "edge"
    if inputs.mode == "cloud_only":
        assert made.route == "cloud"
    if inputs.mode == "auto" and not made.meets_deadline:
        assert not inputs.meets_deadline("edge")
        assert not inputs.meets_deadline("cloud")


@given(ASKED, st.sampled_from(["cost", "energy_j"]), st.floats(0.0, 1e6), st.floats(0.0, 1e6))
def test_of_two_routes_in_time_the_dearer_one_is_not_taken(inputs, field, here, there) -> None:
    replace = msgspec.structs.replace
    inputs = replace(
        inputs, objective=field.removesuffix("_j"), mode="auto", weights=None,
        edge=replace(inputs.edge, **{field: here}), cloud=replace(inputs.cloud, **{field: there}),
    )  # fmt: skip
    made = decide(inputs)
    if here == there or not (inputs.meets_deadline("edge") and inputs.meets_deadline("cloud")):
        return
    assert made.route == ("edge" if here < there else "cloud")


@given(ASKED)
def test_what_is_better_in_everything_is_taken_whatever_the_weights(inputs) -> None:
    edge = msgspec.structs.replace(
        inputs.edge, prediction=takes(50.0), quality=0.9, cost=1.0, energy_j=1.0
    )
    cloud = msgspec.structs.replace(
        inputs.cloud, prediction=takes(40.0), quality=0.95, cost=0.5, energy_j=0.5
    )
    inputs = msgspec.structs.replace(
        inputs, edge=edge, cloud=cloud, mode="auto", remaining_ms=None,
        weights=inputs.weights or (1, 1, 1, 1),
    )  # fmt: skip
    assert decide(inputs).route == "cloud"
