"""Choose a route: a pure function of `DecisionInputs`. See docs/explanation/how-a-request-is-routed.md."""

from __future__ import annotations

from sdk.routing.types import DecisionInputs, RouteDecision


def decide(inputs: DecisionInputs) -> RouteDecision:
    """Choose where a request runs: policy, then availability, mode, deadline, objective.

    Never raises for lack of a route: `RouteDecision.raise_if_denied` does.
    """
    raise NotImplementedError


def replay(record: RouteDecision | bytes) -> RouteDecision:
    """Decide again from a recorded decision's inputs; equal to what was recorded.

    Args:
        record: A decision, or the bytes of `RouteDecision.encode`.

    Raises:
        InvalidInput: The bytes are not a decision record.
    """
    raise NotImplementedError
