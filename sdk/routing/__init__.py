"""Where does a request run? Prediction, decision and repair, all sans-IO.

Why it works the way it does: docs/explanation/how-a-request-is-routed.md.
"""

from __future__ import annotations

from sdk.routing.attempts import Attempt, Outcome, attempts
from sdk.routing.breaker import BreakerState, CircuitBreaker
from sdk.routing.predictor import Observation, Predictor, Ticket
from sdk.routing.router import decide, replay
from sdk.routing.types import (
    MODES,
    OBJECTIVES,
    Candidate,
    DecisionInputs,
    Mode,
    Objective,
    Prediction,
    RequestSize,
    Route,
    RouteDecision,
    RouteState,
)

__all__ = [
    "MODES",
    "OBJECTIVES",
    "Attempt",
    "BreakerState",
    "Candidate",
    "CircuitBreaker",
    "DecisionInputs",
    "Mode",
    "Objective",
    "Observation",
    "Outcome",
    "Prediction",
    "Predictor",
    "RequestSize",
    "Route",
    "RouteDecision",
    "RouteState",
    "Ticket",
    "attempts",
    "decide",
    "replay",
]
