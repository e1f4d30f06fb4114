"""Choose a route: a pure function of `DecisionInputs`.

Why it decides as it does: docs/explanation/how-a-request-is-routed.md.
"""

from __future__ import annotations

import math

import msgspec

from nearfar.errors import InvalidInput
from nearfar.units import format_ms
from sdk.policy.model import Verdict
from sdk.routing.types import (
    UNKNOWN,
    DecisionInputs,
    Prediction,
    Route,
    RouteDecision,
    RouteState,
    exclusion,
    obstacle_text,
    refusal,
)

# The cloud must be faster by more than a tenth before anything leaves the device for speed: less
# than that is within what predictions are off by.
CLOUD_MUST_WIN_BY = 0.9

# How much of the probability of being in time may be given up for an answer in no time at all: so
# many times what the wished probability leaves to chance.
HASTE = 2.0
# Nobody should bet on a route that is less likely than this to be in time.
HOPELESS = 0.01
# A text that has begun by then is worth having: where no route is likelier than the first to have
# all of it, and one is at least as likely as the second to have begun.
UNLIKELY, LIKELY_BEGUN = 0.1, 0.5

# What keeps a record within 1 KB; only names and words are cut, never what a choice depends on.
MAX_MODEL_BYTES = 40
MAX_SENSITIVITY_BYTES = 24
MAX_DETAIL_BYTES = 34
MAX_VERDICT_REASON_BYTES = 116
MAX_REASON_BYTES = 160
MAX_RULE_IDS_BYTES = 68
MAX_ENDPOINT_BYTES = 24


def decide(inputs: DecisionInputs) -> RouteDecision:
    """Choose where a request runs: policy, then availability, mode, deadline, objective.

    Never raises for lack of a route: `RouteDecision.raise_if_denied` does.
    """
    inputs = _clip_inputs(inputs)
    edge_out = exclusion("edge", inputs)
    cloud_out = exclusion("cloud", inputs)
    if edge_out and cloud_out:
        return RouteDecision(
            route=None,
            fallback=None,
            meets_deadline=False,
            reason=_clip(f"no route: {refusal(inputs).problem}", MAX_REASON_BYTES),
            inputs=inputs,
        )
    route: Route
    fallback: Route | None = None
    if edge_out or cloud_out:
        route = "cloud" if edge_out else "edge"
        in_time = inputs.meets_deadline(route)
        why = _why_alone(route, inputs)
    else:
        edge_in_time, cloud_in_time = inputs.meets_deadline("edge"), inputs.meets_deadline("cloud")
        route, why = _choose(inputs, edge_in_time, cloud_in_time)
        in_time, fallback = (edge_in_time, "cloud") if route == "edge" else (cloud_in_time, "edge")
        if inputs.failed and fallback in inputs.failed:
            fallback = None
    reason = f"{route}: {why}"
    if len(reason) > MAX_REASON_BYTES // 4:
        reason = _clip(reason, MAX_REASON_BYTES)
    return RouteDecision(
        route=route, fallback=fallback, meets_deadline=in_time, reason=reason, inputs=inputs
    )


def replay(record: RouteDecision | bytes) -> RouteDecision:
    """Decide again from a recorded decision's inputs; equal to what was recorded.

    Args:
        record: A decision, or the bytes of `RouteDecision.encode`.

    Raises:
        InvalidInput: The bytes are not a decision record.
    """
    if isinstance(record, bytes):
        record = decode_decision(record)
    return decide(record.inputs)


def decode_decision(record: bytes) -> RouteDecision:
    """Read the bytes of `RouteDecision.encode`.

    Raises:
        InvalidInput: The bytes are not a decision record, or of a decision that nobody made.
    """
    try:
        decision = _DECODER.decode(record)
        if not _is_possible(decision.inputs):
            raise msgspec.ValidationError("its figures do not fit together")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidInput(
            f"The bytes are not a decision record ({exc})",
            field="record",
            fix="Pass the bytes that RouteDecision.encode returned",
        ) from exc
    return decision


def _is_possible(inputs: DecisionInputs) -> bool:
    """Whether the figures are such as the predictor gives; a damaged record may hold any."""
    remaining_ms = inputs.remaining_ms
    if not 0 < inputs.confidence <= 1 or not (remaining_ms is None or math.isfinite(remaining_ms)):
        return False
    for prediction in (inputs.edge.prediction, inputs.cloud.prediction):
        _, *figures = msgspec.structs.astuple(prediction)
        if (prediction.p50_ms is None) != (prediction.p95_ms is None) or not all(
            figure is None or 0 <= figure < math.inf for figure in figures
        ):
            return False
    for state in (inputs.edge, inputs.cloud):
        if not (state.quality is None or 0 <= state.quality <= 1) or not all(
            figure is None or 0 <= figure < math.inf for figure in (state.cost, state.energy_j)
        ):
            return False
    return inputs.weights is None or all(0 <= weight <= 10**6 for weight in inputs.weights)


_DECODER = msgspec.msgpack.Decoder(RouteDecision)


def _other(route: Route) -> Route:
    return "cloud" if route == "edge" else "edge"


def _why_alone(route: Route, inputs: DecisionInputs) -> str:
    """Why the only route that can be taken is the only one, and whether it will be late."""
    why = obstacle_text(_other(route), inputs)
    if inputs.meets_deadline(route):
        return why
    return f"{why}; it {_too_slow(inputs.state(route), inputs)}"


def _choose(inputs: DecisionInputs, edge_in_time: bool, cloud_in_time: bool) -> tuple[Route, str]:
    """Choose between two routes that can both be taken."""
    edge, cloud = inputs.edge.prediction, inputs.cloud.prediction
    if inputs.failed:
        edge_failed, cloud_failed = "edge" in inputs.failed, "cloud" in inputs.failed
        if edge_failed != cloud_failed:
            # It may have failed, or be late: then this one was started beside it.
            tried: Route = "edge" if edge_failed else "cloud"
            return _other(tried), f"the {tried} gave no whole answer"
    if edge_in_time and cloud_in_time:
        return _choose_freely(inputs, edge, cloud)
    if edge_in_time:
        return "edge", f"the cloud {_too_slow(inputs.cloud, inputs)}"
    if cloud_in_time:
        return "cloud", f"the edge {_too_slow(inputs.edge, inputs)}"
    # Not in time means known, see `Prediction.probability_in_time`.
    assert inputs.remaining_ms is not None
    assert edge.p95_ms is not None
    assert cloud.p95_ms is not None
    neither = (
        f"neither route is expected to meet the deadline of {format_ms(inputs.remaining_ms)}, "
    )
    route, edge_likely, cloud_likely = _weigh(inputs, edge, cloud)
    likely = edge_likely if route == "edge" else cloud_likely
    begins = _begins(edge, cloud, inputs.remaining_ms) if likely < UNLIKELY else None
    if begins is not None:
        first_ms = (edge if begins == "edge" else cloud).ttft_ms
        return begins, f"{neither}this one begins in time (about {format_ms(first_ms or 0.0)})"
    if likely >= HOPELESS:
        return route, f"{neither}this one is the most likely to ({100 * likely:.0f} %)"
    closest_ms = min(edge.p95_ms, cloud.p95_ms)
    return route, f"{neither}this one comes closest ({format_ms(closest_ms)})"


def _weigh(
    inputs: DecisionInputs, edge: Prediction, cloud: Prediction
) -> tuple[Route, float, float]:
    """The route with the better prospects, and both routes' probabilities of being in time.

    A quicker answer is worth something too, see `HASTE`. Where neither has a chance, the one that
    comes closest.
    """
    remaining_ms = inputs.remaining_ms
    assert remaining_ms is not None
    edge_likely = edge.probability_in_time(remaining_ms)
    cloud_likely = cloud.probability_in_time(remaining_ms)
    assert edge.p50_ms is not None
    assert cloud.p50_ms is not None
    assert edge.p95_ms is not None
    assert cloud.p95_ms is not None
    if edge_likely < HOPELESS and cloud_likely < HOPELESS:
        is_edge = edge.p95_ms <= cloud.p95_ms
    else:
        edge_ms, cloud_ms = edge.p50_ms, cloud.p50_ms / CLOUD_MUST_WIN_BY
        if edge_ms > remaining_ms:
            edge_ms = remaining_ms
        if cloud_ms > remaining_ms:
            cloud_ms = remaining_ms
        saved = (cloud_ms - edge_ms) / ((edge_ms if edge_ms > cloud_ms else cloud_ms) or 1.0)
        is_edge = edge_likely + HASTE * (1.0 - inputs.confidence) * saved >= cloud_likely
    return "edge" if is_edge else "cloud", edge_likely, cloud_likely


def _begins(edge: Prediction, cloud: Prediction, remaining_ms: float) -> Route | None:
    """Which of two texts alone is likely to have begun by then; a part of it is kept."""
    if edge.ttft_ms is None or cloud.ttft_ms is None:
        return None
    here, there = edge.probability_begun(remaining_ms), cloud.probability_begun(remaining_ms)
    if (here >= LIKELY_BEGUN) == (there >= LIKELY_BEGUN):
        return None
    return "edge" if here > there else "cloud"


def _choose_freely(
    inputs: DecisionInputs, edge: Prediction, cloud: Prediction
) -> tuple[Route, str]:
    """Choose between two routes that are both expected in time: mode, then objective."""
    if inputs.mode == "prefer_edge":
        return "edge", "the mode is prefer_edge"
    if inputs.mode == "prefer_cloud":
        return "cloud", "the mode is prefer_cloud"
    if inputs.objective != "latency" or inputs.weights is not None:
        from sdk.routing.objectives import choose  # here: most only ask for speed

        chosen = choose(inputs)
        if chosen is not None:
            return chosen
    if edge.p50_ms is None or cloud.p50_ms is None:
        return _choose_blindly(inputs, edge, cloud)
    is_faster = cloud.p50_ms < CLOUD_MUST_WIN_BY * edge.p50_ms
    if inputs.remaining_ms is not None:
        preferred, edge_likely, cloud_likely = _weigh(inputs, edge, cloud)
        if (preferred == "cloud") != is_faster:
            likely, less = edge_likely, cloud_likely
            if preferred == "cloud":
                likely, less = less, likely
            return preferred, (
                f"the more likely one to be in time ({100 * likely:.1f} %, the other "
                f"{100 * less:.1f} %)"
            )
    if is_faster:
        return "cloud", (
            f"about {format_ms(cloud.p50_ms)}, the edge would take "
            f"{format_ms(edge.p50_ms)}{_queue(inputs.edge)}"
        )
    if cloud.p50_ms <= edge.p50_ms:
        return "edge", (
            f"as fast as the cloud (about {format_ms(edge.p50_ms)}), and nothing leaves the device"
        )
    return "edge", (
        f"about {format_ms(edge.p50_ms)}, the cloud would take "
        f"{format_ms(cloud.p50_ms)}{_queue(inputs.cloud)}"
    )


def _choose_blindly(
    inputs: DecisionInputs, edge: Prediction, cloud: Prediction
) -> tuple[Route, str]:
    """Choose when the latency of at least one route is not known yet."""
    if edge.p50_ms is None and cloud.p50_ms is not None and inputs.remaining_ms is not None:
        return "cloud", (
            f"about {format_ms(cloud.p50_ms)}, and how long the edge takes is not known yet"
        )
    if edge.p50_ms is None:
        # Without a deadline, the way to learn the edge's latency is to use it.
        return "edge", "how long it takes is not known yet, and nothing leaves the device"
    return "edge", f"about {format_ms(edge.p50_ms)}, and how long the cloud takes is not known yet"


def _too_slow(state: RouteState, inputs: DecisionInputs) -> str:
    prediction, remaining_ms = state.prediction, inputs.remaining_ms
    p50_ms, p95_ms = prediction.p50_ms, prediction.p95_ms
    assert p50_ms is not None
    assert p95_ms is not None
    assert remaining_ms is not None
    if p50_ms > remaining_ms:
        takes = f"would take about {format_ms(p50_ms)}"
    elif p95_ms > remaining_ms:
        takes = f"may take {format_ms(p95_ms)}"
    elif prediction.silence:
        takes = "may not answer at all, as of late"
    else:  # more than the usual probability is wished
        quantiles = prediction.quantiles()
        assert quantiles is not None
        takes = f"may take {format_ms(quantiles[-1])}"
    return f"{takes}{_queue(state)}, the deadline is {format_ms(remaining_ms)}"


def _queue(state: RouteState) -> str:
    if state.ahead > 0:
        return f" ({state.ahead} {'request' if state.ahead == 1 else 'requests'} ahead)"
    if state.prediction.load_ms > 0:
        return " (the model is not loaded yet)"
    return ""


def _clip(text: str, max_bytes: int) -> str:
    if len(text) * 4 <= max_bytes or (text.isascii() and len(text) <= max_bytes):
        return text
    data = text.encode("utf-8", "replace")
    if len(data) <= max_bytes:
        return text
    return data[: max_bytes - 3].decode("utf-8", "ignore") + "…"


def _clip_state(state: RouteState) -> RouteState:
    detail = _clip(state.detail, MAX_DETAIL_BYTES) if state.obstacle else ""
    # What cannot be taken is not predicted; a record has no room for both.
    prediction = UNKNOWN if state.obstacle else state.prediction
    if detail is state.detail and prediction is state.prediction:
        return state
    return msgspec.structs.replace(state, detail=detail, prediction=prediction)


def _clip_verdict(verdict: Verdict) -> Verdict:
    reason = _clip(verdict.reason, MAX_VERDICT_REASON_BYTES)
    kept = 0
    total_bytes = 0
    for rule_id in verdict.rule_ids:
        total_bytes += len(rule_id) + 1
        if total_bytes > MAX_RULE_IDS_BYTES:
            break
        kept += 1
    if reason is verdict.reason and kept == len(verdict.rule_ids):
        return verdict
    return msgspec.structs.replace(verdict, reason=reason, rule_ids=verdict.rule_ids[:kept])


def _clip_inputs(inputs: DecisionInputs) -> DecisionInputs:
    """The same inputs, small enough for a record; deciding on them makes replay exact."""
    verdict, edge, cloud = inputs.verdict, inputs.edge, inputs.cloud
    if (
        not edge.detail
        and not cloud.detail
        and len(inputs.model) * 4 <= MAX_MODEL_BYTES
        and len(inputs.sensitivity) * 4 <= MAX_SENSITIVITY_BYTES
        and len(verdict.reason) * 4 <= MAX_VERDICT_REASON_BYTES
        and len(verdict.rule_ids) == 1
        and len(verdict.rule_ids[0]) < MAX_RULE_IDS_BYTES
    ):
        return inputs  # as most are
    model = _clip(inputs.model, MAX_MODEL_BYTES)
    sensitivity = _clip(inputs.sensitivity, MAX_SENSITIVITY_BYTES)
    verdict = _clip_verdict(inputs.verdict)
    edge, cloud = _clip_state(inputs.edge), _clip_state(inputs.cloud)
    if (
        model is inputs.model
        and sensitivity is inputs.sensitivity
        and verdict is inputs.verdict
        and edge is inputs.edge
        and cloud is inputs.cloud
    ):
        return inputs
    return msgspec.structs.replace(
        inputs, model=model, sensitivity=sensitivity, verdict=verdict, edge=edge, cloud=cloud
    )
