"""What a request needs done, as values: the steps that a client performs in its own way."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Union

import msgspec

from nearfar.bundle.manifest import Manifest
from nearfar.errors import Cancelled
from nearfar.processing.reduction import is_slow, reduced
from nearfar.units import Deadline, exceeded
from sdk.requests import Request

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime import EdgeResult
    from nearfar.engines.base import CancelToken
    from nearfar.patience import Patience
    from nearfar.wire.messages import ModelOffer
    from sdk.cloud.connection import TensorReply
    from sdk.cloud.egress import Permit
    from sdk.cloud.link import CloudLink
    from sdk.cloud.pool import Pool
    from sdk.edge import EdgeRoute
    from sdk.racing import Race

    Link = Union[CloudLink, Pool]


class Connect(msgspec.Struct, frozen=True):
    """Step: make sure the cloud can be asked. Carries nothing of the request.

    Attributes:
        deadline: How long it may take.
        endpoints: Where there are several clouds: which; one of them is enough.
        is_waited: Whether the request waits for it.
    """

    deadline: Deadline
    endpoints: tuple[str, ...] = ()
    is_waited: bool = True


class RunHere(msgspec.Struct, frozen=True):
    """Step: run one batch on this device; the answer is an `Answer`.

    Attributes:
        expected_s: How long it is expected to hold a slot; `None` when unknown.
        patience: How long the engine may be silent; `None` does not watch it.
    """

    request: Request
    expected_s: float | None
    patience: Patience | None = None


class RunThere(msgspec.Struct, frozen=True):
    """Step: run one batch on the cloud; the answer is an `Answer`.

    Attributes:
        permit: Proof that policy allows it.
        offer: What the cloud serves.
        variant: Variant to ask for; `None` for the cloud's choice.
        request_id: The same when the same is asked again, so that it is computed only once.
        trace: For the wire, when the request is traced (`Infer.trace`).
        endpoint: Which cloud, as the decision says.
    """

    request: Request
    permit: Permit
    offer: ModelOffer
    variant: str | None
    request_id: bytes
    trace: bytes = b""
    endpoint: str = ""


class Wait(msgspec.Struct, frozen=True):
    """Step: wait before trying again."""

    delay_s: float


Step = Union[Connect, Wait, RunHere, RunThere, "Race"]


class Answer(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Outputs of one batch, from either route; durations in milliseconds."""

    outputs: dict[str, np.ndarray]
    variant: str
    execution_provider: str
    queue_ms: float
    compute_ms: float
    total_ms: float
    load_ms: float = 0.0
    received_bytes: int = 0


def run_here(edge: EdgeRoute, step: RunHere, cancel: CancelToken | None = None) -> Answer:
    """Perform `RunHere`, in the calling thread.

    Args:
        edge: The device.
        step: What to run.
        cancel: Ends it early.

    Raises:
        DeadlineExceeded: The deadline passed; also in the middle of computing.
        NearfarError: What the edge runtime says.
    """
    deadline = step.request.deadline
    if not deadline.is_set:
        return _run_here(edge, step, cancel)
    from nearfar.engines.base import CancelToken

    cancel = cancel or CancelToken()
    watched = edge.watch(deadline, cancel)
    try:
        with watched:
            return _run_here(edge, step, cancel)
    except Cancelled:
        if watched.is_stopped:
            raise exceeded("edge") from None
        deadline.check("edge")
        raise


def _run_here(edge: EdgeRoute, step: RunHere, cancel: CancelToken | None) -> Answer:
    request = step.request
    started_s = time.perf_counter()
    runtime = edge.runtime
    was_loaded = runtime.is_loaded(request.model, request.version)
    edge.asked(request.model)
    is_answered = False
    try:
        done = runtime.infer(
            request.model,
            request.feeds,
            form=request.form,
            items=request.items or None,
            version=request.version,
            deadline=request.deadline,
            expected_s=step.expected_s,
            cancel=cancel,
            patience=step.patience,
        )
        is_answered = True
    finally:
        edge.ended(request.model, is_answered=is_answered)
    total_ms = (time.perf_counter() - started_s) * 1000.0
    return answer_here(done, total_ms, was_loaded=was_loaded)


def answer_here(done: EdgeResult, total_ms: float, *, was_loaded: bool) -> Answer:
    """What the edge runtime's result says."""
    queue_ms, compute_ms = done.queue_s * 1000.0, done.compute_s * 1000.0
    return Answer(
        outputs=done.outputs,
        variant=done.variant,
        execution_provider=done.execution_provider,
        queue_ms=queue_ms,
        compute_ms=compute_ms,
        total_ms=total_ms,
        load_ms=0.0 if was_loaded else max(0.0, total_ms - queue_ms - compute_ms),
    )


async def connect(link: Link, step: Connect) -> None:
    """Perform `Connect`.

    Raises:
        NearfarError: What `CloudLink.connect` or `Pool.connect` says.
    """
    if step.is_waited:
        await link.connect(step.deadline, step.endpoints)
    else:
        link.reach(step.endpoints)


async def run_there(link: Link, step: RunThere) -> Answer:
    """Perform `RunThere`.

    Raises:
        InvalidInput: The input is nothing that the model takes; nothing was sent.
        NearfarError: What `CloudLink.infer` says.
    """
    request, manifest = step.request, step.offer.manifest
    started_s = time.perf_counter()
    if request.form == "bytes" and is_slow(manifest.preprocessing):
        import asyncio

        tensors = await asyncio.to_thread(wire_tensors, request, manifest)
    else:
        tensors = wire_tensors(request, manifest)
    reply = await link.at(step.endpoint).infer(
        step.permit,
        model=request.model,
        form=request.form,
        tensors=tensors,
        deadline=request.deadline,
        version=request.version,
        variant=step.variant,
        priority=request.priority,
        request_id=step.request_id,
        trace=step.trace,
    )
    return answer_of(reply, started_s)


def answer_of(reply: TensorReply, started_s: float) -> Answer:
    """What the cloud's reply to `RunThere` says.

    Args:
        reply: The reply.
        started_s: `time.perf_counter()` when the step began.
    """
    result = reply.message
    return Answer(
        outputs=reply.outputs,
        variant=result.variant,
        execution_provider=result.execution_provider,
        queue_ms=result.queue_ms,
        compute_ms=result.compute_ms,
        total_ms=(time.perf_counter() - started_s) * 1000.0,
        received_bytes=reply.bytes_received,
    )


def minimised(item: str | bytes, manifest: Manifest) -> str | bytes:
    """What of one input the model can see; the rest need not leave the device.

    Raises:
        InvalidInput: It is nothing that the model takes.
    """
    return reduced(item, manifest.preprocessing) if isinstance(item, bytes) else item


def wire_tensors(request: Request, manifest: Manifest) -> dict[str, np.ndarray]:
    """The tensors of an `Infer` message.

    Raises:
        InvalidInput: See `minimised`.
    """
    if request.form == "tensors":
        return dict(request.feeds or {})
    import numpy as np

    array = np.empty(len(request.items), dtype=object)
    for index, item in enumerate(request.items):
        small = minimised(item, manifest)
        array[index] = small.encode() if isinstance(small, str) else small
    return {"input": array}
