"""Do again what was just decided, for requests whose decision cannot depend on the moment.

Deciding takes some two hundred Python functions. They are quick while the processor has them in
its caches, and a model that has just run leaves nothing there: what took 60 µs around a tiny model
took 400 µs around a real one. The cure is to touch less. Where policy, mode or configuration leave
the device as the only route, nothing that is measured can change the choice, so what was decided
for one request holds for the next ones like it. `Core.run` decides, and what it decided is kept
here as a `Plan` for a second.

A plan only ever says "the device, now". Whatever else comes up (a deadline, a busy slot, a model
that is not loaded, an input that does not fit) is `Core.run`'s business again.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import TYPE_CHECKING

import msgspec

from nearfar.errors import NearfarError
from sdk.core import Completed
from sdk.requests import Request
from sdk.routing.types import exclusion
from sdk.steps import answer_here

if TYPE_CHECKING:
    from nearfar.bundle.manifest import Manifest
    from sdk.knowledge import Knowledge
    from sdk.results import Route
    from sdk.routing import RouteDecision

#: Decision records hold a prediction; this is how old it may be.
_LIFETIME_S = 1.0
#: More observations of the same size in less time teach the predictor nothing.
_LEARN_EVERY_S = 0.1
#: Sizes, purposes and tenants may be many.
_MAX_PLANS = 256
#: What keeps the cloud out for good, not just now.
_FOR_GOOD = ("policy", "mode", "not_configured")


class Plan(msgspec.Struct, kw_only=True, eq=False):
    """What was decided for one kind of request; holds none of its content.

    Attributes:
        route: The device, and why.
        decision: The record.
        manifest: The model's manifest.
        region: Where the cloud stood then; rules may depend on it.
        expected_s: How long it is expected to hold a slot.
        expires_at_s: `time.perf_counter` from which it does not count any more.
        learn_at_s: When the next answer is worth learning from.
    """

    route: Route
    decision: RouteDecision
    manifest: Manifest
    region: str | None
    expected_s: float | None
    expires_at_s: float
    learn_at_s: float


class Plans:
    """The plans of one client. Thread-safe: races lose a plan or an observation, never more.

    Args:
        known: What is known about both routes.
    """

    def __init__(self, known: Knowledge) -> None:
        self._known = known
        self._plans: dict[Hashable, Plan] = {}

    def keep(self, done: Completed) -> None:
        """Make a plan of what `Core.run` did, if it would do the same again."""
        known, request, inputs = self._known, done.request, done.decision.inputs
        prediction = inputs.edge.prediction
        if (
            done.route.path != "edge"
            or request.deadline.is_set
            or exclusion("cloud", inputs) not in _FOR_GOOD
            # The record must not tell of a queue or of loading that later calls do not meet.
            or inputs.edge.ahead
            or prediction.load_ms
            or prediction.basis != "measured"
        ):
            return
        if len(self._plans) >= _MAX_PLANS:
            self._plans.clear()
        now_s = time.perf_counter()
        service_ms = prediction.service_ms
        self._plans[_kind(request)] = Plan(
            route=done.route,
            decision=done.decision,
            manifest=done.manifest,
            region=known.region(),
            expected_s=None if service_ms is None else service_ms / 1000.0,
            expires_at_s=now_s + _LIFETIME_S,
            learn_at_s=now_s + _LEARN_EVERY_S,
        )

    def follow(self, request: Request) -> Completed | None:
        """Answer a request by its plan; `None` when `Core.run` has to."""
        started_s = time.perf_counter()
        plan = self._plans.get(_kind(request))
        known = self._known
        edge = known.edge
        if (
            plan is None
            or edge is None
            or started_s >= plan.expires_at_s
            or request.deadline.is_set
            or (known.link is not None and known.region() != plan.region)
        ):
            return None
        try:
            ran = edge.runtime.infer_now(
                request.model,
                request.feeds,
                form=request.form,
                items=request.items,
                version=request.version,
                expected_s=plan.expected_s,
            )
        except NearfarError:
            return None  # to meet it again where errors are explained and repaired
        if ran is None:
            return None
        ended_s = time.perf_counter()
        total_ms = (ended_s - started_s) * 1000.0
        answer = answer_here(ran, total_ms, was_loaded=True)
        if ended_s >= plan.learn_at_s:
            plan.learn_at_s = ended_s + _LEARN_EVERY_S
            known.learn(request, "edge", answer)
        decision = plan.decision
        if request.size.upload_bytes != decision.inputs.size.upload_bytes:
            decision = _of_size(decision, request.size.upload_bytes)
        return Completed(
            request=request,
            answer=answer,
            route=plan.route,
            decision=decision,
            manifest=plan.manifest,
            total_ms=total_ms,
            bytes_sent=0,
        )

    def clear(self) -> None:
        """Forget all plans."""
        self._plans.clear()


def _kind(request: Request) -> Hashable:
    """All that policy, router and predictor look at; requests of one kind have one decision."""
    return (
        request.method,
        request.model,
        request.version,
        request.sensitivity,
        request.purpose,
        request.tenant,
        request.mode,
        request.objective,
        request.form,
        request.rows,
        # Byte strings have none: there the number of rows says it all.
        request.size.input_elements,
    )


def _of_size(decision: RouteDecision, upload_bytes: int) -> RouteDecision:
    """The record for a request that differs only in how much it would upload."""
    replace, inputs = msgspec.structs.replace, decision.inputs
    size = replace(inputs.size, upload_bytes=upload_bytes)
    return replace(decision, inputs=replace(inputs, size=size))
