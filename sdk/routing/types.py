"""The words of routing: sizes, predictions, route states, decisions.

All are immutable msgspec Structs encoded as arrays, so that a whole decision with its inputs
stays under 1 KB and can be written down, sent and replayed. None holds any content, nor anything
that could hold it in turn: without cycles the garbage collector need not look at them.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from nearfar.errors import (
    CloudUnavailable,
    ConfigError,
    EngineError,
    ModelNotFound,
    NearfarError,
    PolicyDenied,
)
from sdk.policy.model import Verdict
from sdk.routing.estimates import Quantiles, share_in_time

Route = Literal["edge", "cloud"]
Mode = Literal["auto", "edge_only", "prefer_edge", "prefer_cloud", "cloud_only"]
Objective = Literal["latency", "quality", "cost", "energy"]
Basis = Literal["measured", "seeded", "unknown"]
Obstacle = Literal["", "no_model", "not_configured", "unreachable"]

#: Part of the answers that must be expected in time before a route counts as being in time.
CONFIDENCE = 0.95

#: Extra requests that hedging may cause, as a part of all requests.
HEDGE_BUDGET = 0.05

#: `Prediction.tail` until late answers were seen: of three that take `t`, one takes twice as long.
USUAL_TAIL = 1.5

ROUTES: tuple[Route, ...] = get_args(Route)
MODES: tuple[Mode, ...] = get_args(Mode)
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


class RequestSize(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """How big a request is; what predictions are a function of.

    Attributes:
        input_tokens: Prompt length for text generation (an estimate will do), else 0.
        max_new_tokens: Upper bound of the answer for text generation, else 0.
        upload_bytes: What would be sent to the cloud.
        download_bytes: What would come back, where it is known; else 0.
        input_elements: Elements of the model's largest input (rows x tokens, rows x features):
            what the compute time of a tensor call grows with. 0 when it is not known.
    """

    input_tokens: int = 0
    max_new_tokens: int = 0
    upload_bytes: int = 0
    download_bytes: int = 0
    input_elements: int = 0

    @property
    def work(self) -> int:
        """What compute time is learned against: elements, or bytes where they are unknown."""
        return self.input_elements or self.upload_bytes


class Prediction(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """How long a route would take for one request.

    Attributes:
        basis: ``measured`` from this process's own answers, ``seeded`` from the bundle's figures
            or assumptions about the link, ``unknown`` when there is nothing to go by.
        p50_ms: Median time to the complete answer; `None` when unknown.
        p95_ms: Time within which 19 of 20 answers are complete; `None` when unknown.
        ttft_ms: Median time to the first token, queue and network included (text generation).
        ms_per_token: Median time per output token after the first (text generation).
        queue_ms: Wait for a slot, part of the above.
        load_ms: Time to load the model first, part of the above; 0 when it is in memory.
        network_ms: Round trip and transfer, part of the above; 0 on the edge.
        p20_ms: Time that 1 of 5 answers stays below.
        p80_ms: Time within which 8 of 10 answers are complete.
        p99_ms: Time within which 99 of 100 answers are complete.
        ttft_p95_ms: Time within which 19 of 20 answers have their first token (text generation).
        silence: Probability of no answer at all, as the last attempts show it; the times above are
            those of answers that come.
        tail: How thin the distribution is beyond p95: an answer that has taken `t` takes longer
            than `u` with probability ``(t / u) ** tail`` (Pareto).
    """

    basis: Basis = "unknown"
    p50_ms: float | None = None
    p95_ms: float | None = None
    ttft_ms: float | None = None
    ms_per_token: float | None = None
    queue_ms: float = 0.0
    network_ms: float = 0.0
    load_ms: float = 0.0
    p20_ms: float | None = None
    p80_ms: float | None = None
    p99_ms: float | None = None
    ttft_p95_ms: float | None = None
    silence: float = 0.0
    tail: float = USUAL_TAIL

    @property
    def service_ms(self) -> float | None:
        """Median time a slot would be held: without queue, loading and network."""
        if self.p50_ms is None:
            return None
        return max(0.0, self.p50_ms - self.queue_ms - self.load_ms - self.network_ms)

    def quantiles(self) -> Quantiles | None:
        """The distribution at `estimates.LEVELS`; `None` when nothing is known.

        Of a prediction that states only p50 and p95, the rest follows from a normal distribution.
        """
        p50, p95 = self.p50_ms, self.p95_ms
        if p50 is None or p95 is None:
            return None
        p20, p80, p99 = self.p20_ms, self.p80_ms, self.p99_ms
        if p20 is None or p80 is None or p99 is None:
            return _normal(p50, p95)
        return p20, p50, p80, p95, p99

    def first_answer(self) -> Quantiles | None:
        """As `quantiles`, of the first sign of an answer: the first token, or all of a batch."""
        if self.ttft_ms is None or self.ttft_p95_ms is None:
            return self.quantiles()
        return _normal(self.ttft_ms, self.ttft_p95_ms)

    def probability_in_time(self, remaining_ms: float | None) -> float:
        """Probability of an answer within that time; 1 without a deadline or without knowledge."""
        if remaining_ms is None:
            return 1.0
        quantiles = self.quantiles()
        if quantiles is None:
            return 1.0
        return (1.0 - self.silence) * share_in_time(quantiles, remaining_ms)

    def probability_begun(self, remaining_ms: float) -> float:
        """Probability of the first sign of an answer within that time; 1 without knowledge."""
        quantiles = self.first_answer()
        if quantiles is None:
            return 1.0
        return (1.0 - self.silence) * share_in_time(quantiles, remaining_ms)


def _normal(p50: float, p95: float) -> Quantiles:
    spread = p95 - p50
    return max(0.0, p50 - 0.51 * spread), p50, p50 + 0.51 * spread, p95, p50 + 1.41 * spread


UNKNOWN = Prediction()


class RouteState(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """What is known about one route when a decision is made.

    Attributes:
        obstacle: Why the route cannot be taken at all, ``""`` when it can: ``no_model`` (it does
            not have the model), ``not_configured`` (no cloud, or no edge runtime), ``unreachable``
            (the circuit breaker is open: a cloud failed, or the device's engine stalled).
        detail: More about the obstacle, in words, for example `CircuitBreaker.describe`; clipped
            to 48 bytes in the decision.
        prediction: How long it would take.
        quality_rank: `Variant.quality_rank` of the variant that would answer; 0 is the best,
            `None` when unknown.
        ahead: Requests running or waiting there.
        quality: How much of the reference's quality that variant keeps, 0 to 1; like the two below,
            `None` when unknown and when only speed counts.
        cost: Money for this request, in the configuration's currency.
        energy_j: Energy of the device for this request.
    """

    obstacle: Obstacle = ""
    detail: str = ""
    prediction: Prediction = UNKNOWN
    quality_rank: int | None = None
    ahead: int = 0
    quality: float | None = None
    cost: float | None = None
    energy_j: float | None = None


class DecisionInputs(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """Everything a decision depends on.

    Attributes:
        model: Name of the model.
        sensitivity: Data class of the request.
        verdict: What policy said; asked before anything else.
        edge: State of the edge route.
        cloud: State of the cloud route.
        mode: What the app asked for, within policy.
        objective: What to prefer among routes that meet the deadline.
        remaining_ms: Time left; `None` when there is no deadline.
        size: Size of the request; recorded with the decision.
        failed: Routes that were already tried for this request and failed; taken again only when
            nothing else is left.
        confidence: Probability with which a route must be in time to count as being so.
        hedge_tokens: Hedges that the budget has left, see `hedging.Hedging`; below 1 the other
            route is not started before the first has failed.
        endpoint: Which of the configured clouds the cloud route means; ``""`` without any.
        weights: How much latency, quality, cost and energy count beside the objective, in
            hundredths; the objective counts 100. `None` for the objective alone.
    """

    model: str
    sensitivity: str
    verdict: Verdict
    edge: RouteState
    cloud: RouteState
    mode: Mode = "auto"
    objective: Objective = "latency"
    remaining_ms: float | None = None
    size: RequestSize = RequestSize()
    failed: tuple[Route, ...] = ()
    confidence: float = CONFIDENCE
    hedge_tokens: float = 0.0
    endpoint: str = ""
    weights: tuple[int, int, int, int] | None = None

    def state(self, route: Route) -> RouteState:
        """State of one route."""
        return self.edge if route == "edge" else self.cloud

    def probability_in_time(self, route: Route) -> float:
        """Probability that the route answers in time."""
        return self.state(route).prediction.probability_in_time(self.remaining_ms)

    def meets_deadline(self, route: Route) -> bool:
        """Whether the route answers in time with the wished probability."""
        remaining_ms = self.remaining_ms
        if remaining_ms is None:
            return True
        if self.confidence == CONFIDENCE:  # the usual one is a quantile: nothing to compute
            prediction = self.state(route).prediction
            p95_ms = prediction.p95_ms
            if p95_ms is None or p95_ms > remaining_ms:
                return p95_ms is None
            if not prediction.silence:
                return True
        return self.probability_in_time(route) >= self.confidence


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """How one route fared in a decision.

    Attributes:
        route: Which.
        note: Why it could not take part: ``policy``, ``mode`` or an obstacle; ``""`` when it could.
        prediction: How long it would take.
        probability: Of an answer in time; 1 without a deadline, and 1 when nothing is known (a
            route that nobody has tried is not held to be late).
        meets_deadline: Whether that reaches the wished probability.
    """

    route: Route
    note: str
    prediction: Prediction
    probability: float
    meets_deadline: bool

    @property
    def is_eligible(self) -> bool:
        """Whether policy, mode and availability let it take part."""
        return not self.note


class RouteDecision(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """Where a request goes and why. `router.replay` reproduces it from its inputs.

    Attributes:
        route: Where to run; `None` when no route is left, see `raise_if_denied`.
        fallback: Where to go when `route` fails (policy is asked again first); `None` when
            nothing else is allowed and available.
        meets_deadline: Whether the chosen route is expected to meet the deadline.
        reason: One sentence for people, starting with the route.
        inputs: What the decision was made from (names and reasons clipped to keep it small).
    """

    route: Route | None
    fallback: Route | None
    meets_deadline: bool
    reason: str
    inputs: DecisionInputs

    @property
    def verdict(self) -> Verdict:
        """What policy said."""
        return self.inputs.verdict

    @property
    def candidates(self) -> tuple[Candidate, Candidate]:
        """Both routes and how they fared, the edge first."""
        return candidate("edge", self.inputs), candidate("cloud", self.inputs)

    def encode(self) -> bytes:
        """The decision record: msgpack, at most 1,024 bytes, free of content."""
        return msgspec.msgpack.encode(self)

    def error(self) -> NearfarError | None:
        """Why there is no route, as the error that an app meets; `None` when there is one."""
        return refusal(self.inputs) if self.route is None else None

    def raise_if_denied(self) -> None:
        """Raise when there is no route.

        Raises:
            PolicyDenied: Policy (alone, or together with the mode) leaves no route.
            ModelNotFound: A route is allowed, but the model is not there.
            CloudUnavailable: Only the cloud could answer, and it cannot be reached.
            EngineError: Only the device could answer, and its engine stalled a moment ago.
            ConfigError: Only a route that is not configured could answer.
        """
        error = self.error()
        if error is not None:
            raise error


def candidate(route: Route, inputs: DecisionInputs) -> Candidate:
    """How one route fares with these inputs."""
    return Candidate(
        route=route,
        note=exclusion(route, inputs),
        prediction=inputs.state(route).prediction,
        probability=inputs.probability_in_time(route),
        meets_deadline=inputs.meets_deadline(route),
    )


def exclusion(route: Route, inputs: DecisionInputs) -> str:
    """What keeps a route out: ``policy``, ``mode``, an obstacle, or ``""`` for nothing."""
    if not inputs.verdict.allows(route):
        return "policy"
    mode = inputs.mode
    if mode != "auto" and not mode_permits(route, mode):
        return "mode"
    return (inputs.edge if route == "edge" else inputs.cloud).obstacle


def mode_permits(route: Route, mode: Mode) -> bool:
    """Whether the mode lets a request take the route at all."""
    return mode != ("cloud_only" if route == "edge" else "edge_only")


def refusal(inputs: DecisionInputs) -> NearfarError:
    """Why no route is left, as the error that an app meets."""
    verdict = inputs.verdict
    rule = verdict.rule_ids[0] if verdict.rule_ids else ""
    if not (verdict.edge or verdict.cloud):
        return PolicyDenied(
            sentence(verdict.reason),
            rule=rule,
            fix="Label the request correctly, or change the policy; `nearfar policy explain` "
            "shows which rules match",
        )
    notes: dict[Route, str] = {route: exclusion(route, inputs) for route in ROUTES}
    if all(note in ("policy", "mode") for note in notes.values()):
        return PolicyDenied(
            f"The mode is {inputs.mode}, but {verdict.reason}",
            rule=rule,
            fix="Use mode 'auto', or change the policy",
        )
    # Say what stands in the way of each route that policy or mode has not closed already.
    problem = sentence("; ".join(obstacle_text(r, inputs) for r in ROUTES))
    if notes["edge"] == "unreachable" and notes["cloud"] != "unreachable":
        return EngineError(
            problem, fix="Try again in a moment: it is then loaded anew; or let the cloud answer"
        )
    if "unreachable" in notes.values():
        return CloudUnavailable(problem, fix="Check the network and the cloud's url, or try later")
    if "no_model" in notes.values():
        return ModelNotFound(
            problem, fix="Convert or copy the model's bundle to where it is missing"
        )
    return ConfigError(
        problem,
        field="cloud" if notes["cloud"] == "not_configured" else "models",
        fix="Add a [models] store or a [cloud.NAME] section to the configuration, "
        "or the same arguments to Client",
    )


def obstacle_text(route: Route, inputs: DecisionInputs) -> str:
    """Why a route is not taken, as a clause."""
    note = exclusion(route, inputs)
    state = inputs.state(route)
    if note == "policy":
        return inputs.verdict.reason
    if note == "mode":
        return f"the mode is {inputs.mode}"
    detail = f" ({state.detail})" if state.detail else ""
    if note == "no_model":
        place = "this device" if route == "edge" else "the cloud"
        return f"{place} cannot run model {inputs.model!r}{detail}"
    if note == "not_configured":
        return "no local models are configured" if route == "edge" else "no cloud is configured"
    if route == "edge":
        return f"the engine on this device does not answer{detail}"
    return f"the cloud cannot be reached{detail}"


def sentence(clause: str) -> str:
    """The clause with a capital letter."""
    return clause[:1].upper() + clause[1:]
