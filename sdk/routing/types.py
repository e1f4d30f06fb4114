"""The words of routing: sizes, predictions, route states, decisions.

All are immutable msgspec Structs encoded as arrays, so that a whole decision with its inputs
stays under 1 KB and can be written down, sent and replayed. None holds any content.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from nearfar.errors import CloudUnavailable, InvalidInput, ModelNotFound, NearfarError, PolicyDenied
from sdk.policy.model import Verdict

Route = Literal["edge", "cloud"]
Mode = Literal["auto", "edge_only", "prefer_edge", "prefer_cloud", "cloud_only"]
Objective = Literal["latency", "quality"]
Basis = Literal["measured", "seeded", "unknown"]
Obstacle = Literal["", "no_model", "not_configured", "unreachable", "failed"]

ROUTES: tuple[Route, ...] = get_args(Route)
MODES: tuple[Mode, ...] = get_args(Mode)
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


class RequestSize(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How big a request is; what predictions are a function of.

    Attributes:
        input_tokens: Prompt length for text generation (an estimate will do), else 0.
        max_new_tokens: Upper bound of the answer for text generation, else 0.
        upload_bytes: What would be sent to the cloud.
        download_bytes: What would come back, where it is known; else 0.
    """

    input_tokens: int = 0
    max_new_tokens: int = 0
    upload_bytes: int = 0
    download_bytes: int = 0


class Prediction(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How long a route would take for one request.

    Attributes:
        basis: ``measured`` from this process's own answers, ``seeded`` from the bundle's figures
            or assumptions about the link, ``unknown`` when there is nothing to go by.
        p50_ms: Median time to the complete answer; `None` when unknown.
        p95_ms: Time within which 19 of 20 answers are complete; `None` when unknown.
        ttft_ms: Median time to the first token, queue and network included (text generation).
        ms_per_token: Median time per output token after the first (text generation).
        queue_ms: Wait for a slot, part of the above.
        network_ms: Round trip and transfer, part of the above; 0 on the edge.
    """

    basis: Basis = "unknown"
    p50_ms: float | None = None
    p95_ms: float | None = None
    ttft_ms: float | None = None
    ms_per_token: float | None = None
    queue_ms: float = 0.0
    network_ms: float = 0.0


UNKNOWN = Prediction()


class RouteState(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What is known about one route when a decision is made.

    Attributes:
        obstacle: Why the route cannot be taken at all, ``""`` when it can: ``no_model`` (it does
            not have the model), ``not_configured`` (no cloud, or no edge runtime), ``unreachable``
            (the circuit breaker is open), ``failed`` (it was tried for this very request).
        detail: The obstacle in words, for example "it did not answer 3 times and is tried again
            in 4 s"; clipped in the decision.
        prediction: How long it would take.
        quality_rank: `Variant.quality_rank` of the variant that would answer; 0 is the best,
            `None` when unknown.
        ahead: Requests running or waiting there.
    """

    obstacle: Obstacle = ""
    detail: str = ""
    prediction: Prediction = UNKNOWN
    quality_rank: int | None = None
    ahead: int = 0


class DecisionInputs(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
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

    def state(self, route: Route) -> RouteState:
        """State of one route."""
        return self.edge if route == "edge" else self.cloud


class Candidate(msgspec.Struct, frozen=True, array_like=True):
    """How one route fared in a decision.

    Attributes:
        route: Which.
        eligible: Whether policy, mode and availability let it take part.
        note: Why not, or what counted against it; ``""`` when nothing did.
        p50_ms: Predicted median; `None` when unknown.
        p95_ms: Predicted 95th percentile; `None` when unknown.
        basis: What the prediction rests on.
        meets_deadline: Whether p95 fits into the time left; `True` without a deadline, and `True`
            when nothing is known (a route nobody has tried is not held to be late).
    """

    route: Route
    eligible: bool
    note: str
    p50_ms: float | None
    p95_ms: float | None
    basis: Basis
    meets_deadline: bool


class RouteDecision(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Where a request goes and why. Encode it with `encode`; `router.replay` reproduces it.

    Attributes:
        inputs: What the decision was made from (names and reasons clipped to keep it small).
        route: Where to run; `None` when no route is left, see `error`.
        fallback: Where to go when `route` fails (policy is asked again first); `None` when
            nothing else is allowed and available.
        reason: One sentence for people, starting with the route.
        meets_deadline: Whether the chosen route is expected to meet the deadline.
        candidates: Both routes, the edge first.
    """

    inputs: DecisionInputs
    route: Route | None
    fallback: Route | None
    reason: str
    meets_deadline: bool
    candidates: tuple[Candidate, ...]

    @property
    def verdict(self) -> Verdict:
        """What policy said."""
        return self.inputs.verdict

    @property
    def candidate(self) -> Candidate | None:
        """The chosen candidate."""
        return next((c for c in self.candidates if c.route == self.route), None)

    def encode(self) -> bytes:
        """The decision record: msgpack, at most 1,024 bytes, free of content."""
        raise NotImplementedError

    def error(self) -> NearfarError | None:
        """Why there is no route, as the error an app meets; `None` when there is one."""
        raise NotImplementedError

    def raise_if_denied(self) -> None:
        """Raise when there is no route.

        Raises:
            PolicyDenied: Policy (alone, or together with the mode) leaves no route.
            ModelNotFound: Policy allows a route, but the model is not there.
            CloudUnavailable: Only the cloud could answer, and it cannot be reached.
            InvalidInput: The mode asks for a route that is not configured.
        """
        error = self.error()
        if error is not None:
            raise error


__all__ = [
    "MODES", "OBJECTIVES", "ROUTES", "UNKNOWN", "Basis", "Candidate", "CloudUnavailable",
    "DecisionInputs", "InvalidInput", "Mode", "ModelNotFound", "Objective", "Obstacle",
    "PolicyDenied", "Prediction", "RequestSize", "Route", "RouteDecision", "RouteState",
]  # fmt: skip
