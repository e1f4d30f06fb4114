"""What a request gives back: the answer, and where it came from, why, how fast and at what cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from sdk.routing.types import Route as RouteName

if TYPE_CHECKING:
    import numpy as np

    from nearfar.bundle.manifest import Manifest
    from sdk.routing import RouteDecision


Source = Literal["run", "in_flight", "cache"]
_SHOWN: dict[Source, str] = {"run": "", "in_flight": " (shared)", "cache": " (cached)"}


class Route(msgspec.Struct, frozen=True):
    """Where an answer came from, and why there.

    Attributes:
        name: ``edge`` (this device) or ``cloud``.
        reason: Why, for people.
        before: Routes that gave up before this one took over, in order, or, where an agreement is
            stated, were not sure enough; empty when the first choice held.
        source: ``run``: it was computed for this request; ``in_flight``: for an equal one that was
            under way; ``cache``: for an equal one before.
        hedge: What was started beside the first choice because that was late, why, and which of the
            two answered first; ``""`` when nothing was.
        endpoint: Which of the configured clouds answered, by name; ``""`` on the edge.
    """

    name: RouteName
    reason: str
    before: tuple[RouteName, ...] = ()
    source: Source = "run"
    hedge: str = ""
    endpoint: str = ""

    @property
    def path(self) -> str:
        """All routes in order: ``edge``, or ``cloud → edge`` after a repair."""
        return " → ".join((*self.before, self.name))

    def __str__(self) -> str:
        hedge = f" ({self.hedge})" if self.hedge else ""
        return f'{self.path}{_SHOWN[self.source]} · "{self.reason}"{hedge}'


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time went. All but `total_ms` as the route that answered measured it.

    Attributes:
        total_ms: From the call to the complete answer, as the app waited.
        queue_ms: Waiting for a slot.
        compute_ms: Inside the engine; for generation, prefill and decode together.
        network_ms: What is left on the cloud route: sealing, transfer, round trip. 0 on the edge.
        ttft_ms: Generation: from the call to the first text.
        ms_per_token: Generation: mean time per token after the first.
    """

    total_ms: float
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    network_ms: float = 0.0
    ttft_ms: float | None = None
    ms_per_token: float | None = None


class BatchUsage(msgspec.Struct, frozen=True, kw_only=True):
    """How much one `infer`, `embed` or `classify` call processed.

    Attributes:
        items: Rows of the batch.
        output_bytes: Size of the model's outputs.
    """

    items: int
    output_bytes: int


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a stated agreement with the cloud model.

    Attributes:
        target: The stated agreement, such as 0.98.
        outcome: ``kept``: the edge model was sure enough; ``escalated``: it was not, and the cloud
            answered; ``audited``: it was, and the cloud was asked all the same, to watch the
            agreement; ``cloud``: the cloud answered at once; ``unmet``: the edge model was not
            sure enough, and the cloud could not be asked.
        confidence: Score of the edge's answer (of a batch, its lowest); `None` without one.
        threshold: What it had to be above; infinite when the device may keep nothing.
    """

    target: float
    outcome: Literal["kept", "escalated", "audited", "cloud", "unmet"]
    confidence: float | None = None
    threshold: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the statement covers this answer."""
        return self.outcome != "unmet"


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """Common part of all results.

    Attributes:
        route: Where the answer came from, and why.
        decision: The routing decision, content-free and replayable.
        timings: Where the time went.
        usage: How much was processed.
        variant: Which variant of the bundle answered.
        execution_provider: What it ran on, as the engine reports it.
        bytes_sent: Sealed bytes that left the device for this request; 0 on the edge.
        agreement: What became of ``min_agreement``; `None` when none was stated.
    """

    route: Route
    decision: RouteDecision
    timings: Timings
    usage: BatchUsage
    variant: str
    execution_provider: str
    bytes_sent: int = 0
    agreement: Agreement | None = None

    @property
    def reason(self) -> str:
        """Why this route; the same as ``route.reason``."""
        return self.route.reason


class InferResult(Answered, frozen=True, kw_only=True, eq=False):
    """Result of `Client.infer`.

    Attributes:
        outputs: Output name to array, in model order. The arrays belong to the caller.
    """

    outputs: dict[str, np.ndarray]


class EmbedResult(Answered, frozen=True, kw_only=True, eq=False):
    """Result of `Client.embed`.

    Attributes:
        vectors: float32, shape (texts, dimensions), one row per text in order.
    """

    vectors: np.ndarray


class ClassifyResult(Answered, frozen=True, kw_only=True):
    """Result of `Client.classify`.

    Attributes:
        label: The best label.
        score: Its score, as the model gives it.
        top: The best `top_k` labels with their scores, best first.
    """

    label: str
    score: float
    top: tuple[tuple[str, float], ...]


class Chunk(msgspec.Struct, frozen=True):
    """A piece of a streamed answer.

    Attributes:
        text: Text to append to what came before; never empty.
        index: Position of its token in the whole answer, from 0, across a handover.
        route: Where this piece came from.
        handover: Whether this is the first piece after another route broke off.
    """

    text: str
    index: int
    route: RouteName
    handover: bool = False


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A model a client can use, and where.

    Attributes:
        name: The model's name.
        version: Newest version known.
        task: Its task.
        edge_variant: Variant that would run on this device, or `None` when it is not here.
        cloud_variant: Variant the cloud would answer with, or `None` when it does not serve it.
        manifest: The manifest it was read from: the device's when it is here, else the cloud's.
    """

    name: str
    version: str
    task: str
    edge_variant: str | None
    cloud_variant: str | None
    manifest: Manifest


__all__ = [
    "Agreement", "Answered", "BatchUsage", "Chunk", "ClassifyResult", "EmbedResult", "InferResult",
    "ModelInfo", "Route", "RouteName", "Timings",
]  # fmt: skip
