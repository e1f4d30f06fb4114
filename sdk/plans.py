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

import sys
from collections.abc import Hashable, Mapping

# By its name: looking it up in its module is measurable here. The same clock as the slots'.
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from nearfar.bundle.manifest import (
    AudioPreprocessing,
    HeadTailPreprocessing,
    ImagePreprocessing,
)
from nearfar.errors import InvalidInput
from nearfar.processing.reduction import seen_of
from sdk.core import Completed
from sdk.requests import Request
from sdk.results import BatchUsage, InferResult, Timings
from sdk.routing import Observation
from sdk.routing.types import exclusion
from sdk.steps import Answer

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime import DirectCall
    from nearfar.bundle.manifest import Manifest
    from nearfar.patience import Patience
    from sdk.knowledge import Knowledge
    from sdk.results import Route
    from sdk.routing import RouteDecision

#: Decision records hold a prediction; this is how old it may be.
_LIFETIME_S = 1.0
#: More observations of the same size in less time teach the predictor nothing.
_LEARN_EVERY_S = 0.1
#: Sizes, purposes and tenants may be many.
_MAX_PLANS = 256
#: Shapes and options of one model that `infer` remembers; it compares them one after the other.
_MAX_SHAPES = 8
#: What keeps the cloud out for good, not just now.
_FOR_GOOD = ("policy", "mode", "not_configured")


class Plan(msgspec.Struct, kw_only=True, eq=False):
    """What was decided for one kind of request; holds none of its content.

    Attributes:
        call: The model, loaded.
        route: The device, and why.
        decision: The record.
        manifest: The model's manifest.
        variant: Id of the variant that runs.
        execution_provider: What it runs on.
        rows: Rows of the batch.
        most_bytes: How much of such a request would leave at most, however large it is.
        inputs: For `Plans.infer`: name, type, dtype and shape of each array.
        options: For `Plans.infer`: the keyword options of the call.
        region: Where the cloud said it stands; rules may depend on it.
        expected_s: How long it is expected to hold a slot.
        patience: How long the engine may be silent.
        expires_at_s: `time.monotonic` from which it does not count any more.
        learn_at_s: When the next answer is worth learning from.
    """

    call: DirectCall
    route: Route
    decision: RouteDecision
    manifest: Manifest
    variant: str
    execution_provider: str
    rows: int
    most_bytes: int
    inputs: tuple[tuple[str, Any, Any, tuple[int, ...]], ...]
    options: Mapping[str, Any]
    region: str | None
    expected_s: float | None
    patience: Patience
    expires_at_s: float
    learn_at_s: float

    def fits(
        self, feeds: Mapping[str, np.ndarray], options: Mapping[str, Any], region: str | None
    ) -> bool:
        """Whether checks, policy, router and predictor would see the same as they did."""
        if (
            type(feeds) is not dict  # may be anything; `Core.run` looks closer
            or len(feeds) != len(self.inputs)
            or options != self.options
            or region != self.region
        ):
            return False
        for name, kind, dtype, shape in self.inputs:
            array: Any = feeds.get(name)
            if type(array) is not kind or array.dtype is not dtype or array.shape != shape:
                return False
        return True


class Plans:
    """The plans of one client. Thread-safe: races lose a plan or an observation, never more.

    Args:
        known: What is known about both routes.
    """

    def __init__(self, known: Knowledge) -> None:
        self._known = known
        self._of_tensors: dict[str, tuple[Plan, ...]] = {}
        self._of_items: dict[Hashable, Plan] = {}

    def infer(
        self, model: str, feeds: Mapping[str, np.ndarray], options: Mapping[str, Any]
    ) -> InferResult | None:
        """Run a batch of tensors by its plan; `None` when `Core.run` has to.

        Raises:
            EngineError: The engine failed, and no other route is open to the request.
        """
        started_s = monotonic()
        link = self._known.link
        region = None if link is None else link.state.region
        for plan in self._of_tensors.get(model, ()):
            if started_s < plan.expires_at_s and plan.fits(feeds, options, region):
                break
        else:
            return None
        try:
            ran = plan.call.infer(feeds, plan.expected_s, plan.patience)
        except InvalidInput:
            return None  # `Core.run` finds the words
        if ran is None:
            return None
        outputs, compute_s = ran
        output_bytes = 0
        for array in outputs.values():
            output_bytes += array.nbytes
        ended_s = monotonic()
        total_ms, compute_ms = (ended_s - started_s) * 1000.0, compute_s * 1000.0
        if ended_s >= plan.learn_at_s:
            self._learn(plan, compute_ms, total_ms, ended_s)
        return InferResult(
            outputs=outputs,
            route=plan.route,
            decision=plan.decision,
            timings=Timings(total_ms=total_ms, compute_ms=compute_ms),
            usage=BatchUsage(items=plan.rows, output_bytes=output_bytes),
            variant=plan.variant,
            execution_provider=plan.execution_provider,
        )

    def follow(self, request: Request) -> Completed | None:
        """Run a batch of texts or byte strings by its plan; `None` when `Core.run` has to.

        Raises:
            EngineError: The engine failed, and no other route is open to the request.
        """
        started_s = monotonic()
        plan = self._of_items.get(_kind(request))
        if (
            plan is None
            or started_s >= plan.expires_at_s
            or request.deadline.is_set
            or plan.region != self._known.claimed_region()
        ):
            return None
        assert request.form != "tensors"
        try:
            ran = plan.call.infer(None, plan.expected_s, plan.patience, request.form, request.items)
        except InvalidInput:
            return None  # `Core.run` finds the words
        if ran is None:
            return None
        outputs, compute_s = ran
        decision = plan.decision
        upload_bytes = min(request.size.upload_bytes, plan.most_bytes)
        if upload_bytes != decision.inputs.size.upload_bytes:
            decision = _of_size(decision, upload_bytes)
        ended_s = monotonic()
        answer = Answer(
            outputs=outputs,
            variant=plan.variant,
            execution_provider=plan.execution_provider,
            queue_ms=0.0,
            compute_ms=compute_s * 1000.0,
            total_ms=(ended_s - started_s) * 1000.0,
        )
        if ended_s >= plan.learn_at_s:
            self._learn(plan, answer.compute_ms, answer.total_ms, ended_s)
        return Completed(
            request=request,
            answer=answer,
            route=plan.route,
            decision=decision,
            manifest=plan.manifest,
            total_ms=answer.total_ms,
            bytes_sent=0,
        )

    def keep(self, done: Completed, options: Mapping[str, Any] | None = None) -> None:
        """Make a plan of what `Core.run` did, if it would do the same again.

        Args:
            done: What `Core.run` returned.
            options: For `infer`: the keyword options of the call.
        """
        request = done.request
        plan = self._plan(done, options or {})
        if plan is None:
            return
        if request.form == "tensors":
            others = self._of_tensors.get(request.model, ())
            fresh = [
                other for other in others if other.expires_at_s > plan.expires_at_s - _LIFETIME_S
            ]
            self._of_tensors[request.model] = (plan, *fresh[: _MAX_SHAPES - 1])
            return
        if len(self._of_items) >= _MAX_PLANS:
            self._of_items.clear()
        self._of_items[_kind(request)] = plan

    def _plan(self, done: Completed, options: Mapping[str, Any]) -> Plan | None:
        known, request, inputs = self._known, done.request, done.decision.inputs
        prediction, spec = inputs.edge.prediction, done.manifest.preprocessing
        if (
            done.route.path != "edge"
            or known.edge is None
            or request.deadline.is_set
            or done.agreement is not None
            or exclusion("cloud", inputs) not in _FOR_GOOD
            # The record must not tell of a queue or of loading that later calls do not meet.
            or inputs.edge.ahead
            or prediction.load_ms
            or prediction.basis != "measured"
            # Sounds differ in length, and what is expected of a short one is too little for a long.
            or (request.form == "bytes" and isinstance(spec, AudioPreprocessing))
        ):
            return None
        call = known.edge.runtime.direct(request.model, request.version)
        if call is None:
            return None
        from sdk.stalls import patience

        now_s = monotonic()
        service_ms = prediction.service_ms
        return Plan(
            call=call,
            route=done.route,
            decision=done.decision,
            manifest=done.manifest,
            variant=done.answer.variant,
            execution_provider=done.answer.execution_provider,
            rows=request.rows,
            most_bytes=_most_bytes(done.manifest) * request.rows,
            inputs=tuple(
                (name, type(array), array.dtype, array.shape)
                for name, array in (request.feeds or {}).items()
            ),
            options=dict(options),
            region=known.claimed_region(),
            expected_s=None if service_ms is None else service_ms / 1000.0,
            patience=patience(known, request),
            expires_at_s=now_s + _LIFETIME_S,
            learn_at_s=now_s + _LEARN_EVERY_S,
        )

    def clear(self) -> None:
        """Forget all plans."""
        self._of_tensors.clear()
        self._of_items.clear()

    def _learn(self, plan: Plan, compute_ms: float, total_ms: float, now_s: float) -> None:
        plan.learn_at_s = now_s + _LEARN_EVERY_S
        inputs = plan.decision.inputs
        self._known.predictor.observe(
            "edge",
            inputs.model,
            inputs.size,
            Observation(total_ms=total_ms, compute_ms=compute_ms),
            now_s=now_s,
        )


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
        request.min_agreement,
        request.form,
        request.rows,
        # Byte strings have none: there the number of rows says it all.
        request.size.input_elements,
    )


def _most_bytes(manifest: Manifest) -> int:
    spec = manifest.preprocessing
    if isinstance(spec, (HeadTailPreprocessing, ImagePreprocessing)):
        return seen_of(spec).most_bytes
    return sys.maxsize


def _of_size(decision: RouteDecision, upload_bytes: int) -> RouteDecision:
    """The record for a request that differs only in how much it would upload."""
    replace, inputs = msgspec.structs.replace, decision.inputs
    size = replace(inputs.size, upload_bytes=upload_bytes)
    return replace(decision, inputs=replace(inputs, size=size))
