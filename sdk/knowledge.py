"""What a client knows about its two routes: models, offers, speed, health, and what binds it.

Reads the state of the edge runtime and of the cloud link; waits for nothing and connects nowhere.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from nearfar.bundle.manifest import HeadTailPreprocessing, Manifest
from nearfar.errors import (
    Cancelled,
    CloudUnavailable,
    DeadlineExceeded,
    InvalidInput,
    NearfarError,
)
from sdk.requests import TASK_OF_METHOD, Request
from sdk.results import ModelInfo, RouteName
from sdk.routing import (
    Attempt,
    CircuitBreaker,
    Observation,
    Prediction,
    Predictor,
    RequestSize,
    RouteState,
    Ticket,
)
from sdk.steps import Answer

if TYPE_CHECKING:
    from edge_runtime import EdgeModel
    from nearfar.wire.messages import ModelOffer
    from sdk.cloud.link import CloudLink
    from sdk.edge import EdgeRoute

logger = logging.getLogger(__name__)


class Knowledge:
    """Both routes as far as they are known. Thread-safe as far as `Predictor` is.

    Args:
        edge: The near route; `None` when the client has none.
        link: The far route; `None` when the client has none. Only its state is read here.
        state_file: Where what was measured is kept across restarts; `None` keeps nothing.
    """

    def __init__(
        self, *, edge: EdgeRoute | None, link: CloudLink | None, state_file: Path | None = None
    ) -> None:
        self.edge = edge
        self.link = link
        self.predictor = Predictor()
        self.breaker = CircuitBreaker()
        self._pins: dict[str, str] = {}
        self._seeded: set[tuple[str, str, str]] = set()
        self._row_bytes: dict[tuple[str, str], int] = {}
        self._state_file = state_file
        #: Told every answer that is learned from; `None` when nobody asked for it.
        self.record: Callable[[RouteName, str, Observation], None] | None = None
        if state_file is not None:
            _recall(self.predictor, state_file)

    def save(self) -> None:
        """Write what was measured to the state file, if there is one; only warns when it cannot."""
        if self._state_file is not None:
            _remember(self.predictor, self._state_file)

    def manifest(self, request: Request, route: RouteName) -> Manifest:
        """Manifest of the model on the route that answered."""
        if route == "edge":
            assert self.edge is not None
            return self.edge.find(request.model, request.version).manifest
        offer = self.offer(request)
        assert offer is not None
        return offer.manifest

    def observe(
        self,
        request: Request,
        route: RouteName,
        observation: Observation,
        received_bytes: int = 0,
        ticket: Ticket | None = None,
    ) -> None:
        """Learn from one complete answer."""
        size = self.size(request)
        if received_bytes:
            size = msgspec.structs.replace(size, download_bytes=received_bytes)
        self.predictor.observe(
            route, request.model, size, observation, now_s=time.monotonic(), ticket=ticket
        )
        if self.record is not None:
            self.record(route, request.model, observation)

    def observe_round_trip(self, rtt_ms: float) -> None:
        """Learn the link's round trip."""
        self.predictor.observe_round_trip(rtt_ms, now_s=time.monotonic())

    def models(self) -> tuple[ModelInfo, ...]:
        """Models of this device, and those of the cloud as far as it was asked."""
        found: dict[str, ModelInfo] = {}
        for manifest in self.edge.models() if self.edge is not None else ():
            found[manifest.name] = ModelInfo(
                name=manifest.name,
                version=manifest.version,
                task=manifest.task,
                edge_variant=self._edge_variant(manifest.name),
                cloud_variant=None,
                manifest=manifest,
            )
        offers = (self.link.state.offers if self.link is not None else None) or {}
        for name, offer in offers.items():
            here = found.get(name)
            found[name] = ModelInfo(
                name=name,
                version=here.version if here else offer.manifest.version,
                task=offer.manifest.task,
                edge_variant=here.edge_variant if here else None,
                cloud_variant=offer.variant,
                manifest=here.manifest if here else offer.manifest,
            )
        return tuple(found[name] for name in sorted(found))

    def task(self, request: Request) -> str:
        known = self.edge_model(request)
        if known is not None:
            return known.manifest.task
        offer = self.offer(request)
        return offer.manifest.task if offer is not None else TASK_OF_METHOD[request.method]

    def region(self) -> str | None:
        """Where the cloud stands: what the configuration states, unless the cloud contradicts."""
        if self.link is None:
            return None
        stated, claimed = self.link.config.region, self.link.state.region
        if stated and claimed and stated != claimed:
            return None  # one of them is wrong; rules that need a region then do not hold
        return stated or claimed

    def claimed_region(self) -> str | None:
        """Where the cloud itself says it stands; `None` before it was asked."""
        return None if self.link is None else self.link.state.region

    # -- what is known about the routes ----------------------------------------------------------

    def edge_model(self, request: Request) -> EdgeModel | None:
        if self.edge is None:
            return None
        try:
            return self.edge.find(request.model, request.version)
        except NearfarError:
            return None  # `_edge_state` says why

    def _edge_variant(self, name: str) -> str | None:
        assert self.edge is not None
        try:
            return self.edge.find(name, None).variant.id
        except NearfarError:
            return None

    def edge_state(self, request: Request, size: RequestSize, now_s: float) -> RouteState:
        edge, model = self.edge, request.model
        if edge is None:
            return RouteState(obstacle="not_configured", detail="this client runs no local models")
        try:
            found = edge.find(model, request.version)
            runtime = edge.runtime
            slots = runtime.state(model, request.version)
            loaded = runtime.is_loaded(model, request.version)
        except NearfarError as error:
            return RouteState(obstacle="no_model", detail=error.problem)
        variant = found.variant
        pin = self.variant_wanted(request)
        if pin is not None and pin != variant.id:
            return RouteState(obstacle="no_model", detail=_other_variant(model, variant.id, pin))
        self._seed("edge", model, variant.id, found.manifest)
        prediction = self.predictor.predict(
            "edge",
            model,
            size,
            now_s=now_s,
            queue_ms=slots.expected_wait_s * 1000.0,
            loaded=loaded,
        )
        return RouteState(
            prediction=prediction,
            quality_rank=variant.quality_rank,
            ahead=slots.running + slots.waiting,
        )

    def cloud_state(
        self, request: Request, size: RequestSize, now_s: float, *, is_alone: bool = False
    ) -> RouteState:
        """State of the cloud; when it is the only route, it is asked however often it failed."""
        link, model = self.link, request.model
        if link is None:
            return RouteState(obstacle="not_configured", detail="no cloud is configured")
        # A connection is no sign of life: a cloud may accept requests and never answer.
        if not (is_alone and link.state.is_connected) and not self.breaker.can_try(now_s):
            return RouteState(obstacle="unreachable", detail=self.breaker.describe(now_s))
        if link.state.offers is None:
            return RouteState(prediction=Prediction())
        offer = self.offer(request)
        if offer is None:
            return RouteState(obstacle="no_model", detail=f"the cloud does not serve {model!r}")
        if request.method == "embed" and self._is_other_space(request, offer.manifest):
            return RouteState(
                obstacle="no_model",
                detail="its vectors lie in another space than this device's",
            )
        pin = self.variant_wanted(request)
        variant = offer.manifest.variant(pin or offer.variant)
        if variant is None:
            return RouteState(
                obstacle="no_model", detail=_other_variant(model, offer.variant, pin or "")
            )
        if self._seed("cloud", model, variant.id, offer.manifest):
            self.predictor.report_queue(model, offer.queue_ms, now_s=link.state.offers_at_s)
        return RouteState(
            prediction=self.predictor.predict("cloud", model, size, now_s=now_s),
            quality_rank=variant.quality_rank,
            ahead=link.state.in_flight,
        )

    def _is_other_space(self, request: Request, there: Manifest) -> bool:
        """Whether the device has the model too, and gives vectors that cannot be compared."""
        here = self.edge_model(request)
        if here is None or not there.space or not here.manifest.space:
            return False
        return there.space != here.manifest.space

    def _seed(self, route: RouteName, model: str, variant_id: str, manifest: Manifest) -> bool:
        key = (route, model, variant_id)
        if key in self._seeded:
            return False
        self._seeded.add(key)
        variant = manifest.variant(variant_id)
        if variant is not None:
            self.predictor.seed(route, model, variant.latency, size_bytes=variant.size_bytes)
        return True

    def offer(self, request: Request) -> ModelOffer | None:
        if self.link is None:
            return None
        offers = self.link.state.offers
        offer = offers.get(request.model) if offers else None
        if offer is not None and request.version not in (None, offer.manifest.version):
            return None
        return offer

    def size(self, request: Request) -> RequestSize:
        """The request's size with what only a manifest knows: what comes back, and how many
        elements a model makes of byte strings, however long they are."""
        size = request.size
        if request.method == "generate":
            return size
        offer = self.offer(request)
        if offer is not None:
            manifest = offer.manifest
            key = (manifest.name, manifest.version)
            per_row = self._row_bytes.get(key)
            if per_row is None:
                per_row = self._row_bytes[key] = _bytes_per_row(manifest)
            size = msgspec.structs.replace(size, download_bytes=per_row * request.rows)
        if not size.input_elements:
            known = self.edge_model(request)
            manifest_here = known.manifest if known is not None else offer and offer.manifest
            features = manifest_here and manifest_here.preprocessing
            if isinstance(features, HeadTailPreprocessing):
                width = features.head_bytes + features.tail_bytes
                size = msgspec.structs.replace(size, input_elements=width * request.rows)
        return size

    def learn(self, request: Request, route: RouteName, answer: Answer, ticket: Ticket) -> None:
        self.observe(
            request,
            route,
            Observation(
                total_ms=answer.total_ms,
                queue_ms=answer.queue_ms,
                compute_ms=answer.compute_ms,
                load_ms=answer.load_ms,
            ),
            answer.received_bytes,
            ticket,
        )

    def observe_silence(self, request: Request, attempt: Attempt, *, since_s: float) -> None:
        """Learn that a streamed answer had not begun when another route's had."""
        expected = attempt.decision.inputs.state(attempt.route).prediction
        usual = expected.first_answer()
        if usual is None:
            return
        now_s = time.monotonic()
        size = self.size(request)
        ticket = self.predictor.start(
            attempt.route,
            request.model,
            size,
            Prediction(p50_ms=usual[1], p95_ms=usual[3]),
            now_s=since_s,
        )
        self.predictor.stop(ticket, now_s=now_s)
        self.predictor.observe_late(ticket, now_s=now_s)

    def under_way(self, request: Request, attempt: Attempt) -> _UnderWay:
        """Tell the predictor that an attempt runs, and whether it was given up as late."""
        return _UnderWay(self.predictor, request.model, self.size(request), attempt)

    def variant_wanted(self, request: Request) -> str | None:
        """The variant that this client's earlier vectors of the model came from, if that binds."""
        return self._pins.get(request.model) if request.method == "embed" else None

    def pin(self, request: Request, variant: str) -> None:
        """Vectors of different variants may be compared only if the bundle says so."""
        if request.method != "embed" or request.model in self._pins:
            return
        known = self.edge_model(request)
        offer = self.offer(request)
        manifest = known.manifest if known else offer.manifest if offer else None
        if manifest is not None and not manifest.mixed_routes:
            self._pins[request.model] = variant

    def guarded(self) -> _Guard:
        """Tell the circuit breaker how a use of the link went."""
        return _Guard(self.breaker)

    def wrong_variant(self, request: Request) -> InvalidInput | None:
        pin = self.variant_wanted(request)
        if pin is None:
            return None
        return InvalidInput(
            f"Vectors of {request.model!r} came from its variant {pin!r} so far, which no allowed "
            "route has now, and the bundle does not say that its variants can be mixed",
            field="model",
            fix="Embed everything that is compared in one call or under one policy class, or use "
            "another Client for the new set",
        )

    def available(self) -> str:
        """Which models there are, for the fix of an error."""
        offers = self.link.state.offers if self.link is not None else None
        parts = []
        if self.edge is not None:
            names = self.edge.names()
            parts.append(f"on this device: {', '.join(sorted(names)) or 'no models'}")
        if offers is not None:
            parts.append(f"on the cloud: {', '.join(sorted(offers)) or 'no models'}")
        return f"Available {'; '.join(parts)}" if parts else "Configure a store or a cloud"


class _UnderWay:
    """An attempt as long as it runs. A cloud or a device that became slow shows before it answers;
    otherwise it would be asked again and again in vain."""

    __slots__ = ("_attempt", "_model", "_predictor", "_size", "_ticket")

    def __init__(
        self, predictor: Predictor, model: str, size: RequestSize, attempt: Attempt
    ) -> None:
        self._predictor = predictor
        self._model = model
        self._size = size
        self._attempt = attempt

    def __enter__(self) -> Ticket:
        attempt = self._attempt
        self._ticket = self._predictor.start(
            attempt.route,
            self._model,
            self._size,
            attempt.decision.inputs.state(attempt.route).prediction,
            now_s=time.monotonic(),
        )
        return self._ticket

    def __exit__(self, kind: type[BaseException] | None, exc: object, trace: object) -> None:
        now_s = time.monotonic()
        self._predictor.stop(self._ticket, now_s=now_s)
        if kind is not None and issubclass(kind, DeadlineExceeded):
            self._predictor.observe_late(self._ticket, now_s=now_s)


class _Guard:
    """Reports the outcome of using the link to the circuit breaker."""

    __slots__ = ("_breaker", "is_answered")

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker
        #: Whether the cloud had answered when the block ended without an error.
        self.is_answered = True

    def __enter__(self) -> _Guard:
        self._breaker.acquire(time.monotonic())
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: object, trace: object) -> None:
        now_s = time.monotonic()
        if kind is None and self.is_answered:
            self._breaker.record_success(now_s)
        elif kind is None:
            self._breaker.release(now_s)
        elif issubclass(kind, CloudUnavailable):
            self._breaker.record_failure(now_s)
        elif issubclass(kind, (DeadlineExceeded, Cancelled)) or not issubclass(kind, NearfarError):
            self._breaker.release(now_s)
        else:
            self._breaker.record_success(now_s)  # it answered, if only to refuse


def _recall(predictor: Predictor, path: Path) -> None:
    from sdk.routing.memory import MAX_BYTES, recall

    try:
        with path.open("rb") as file:
            recall(predictor, file.read(MAX_BYTES + 1))
    except FileNotFoundError:
        return
    except (OSError, NearfarError) as exc:
        logger.warning("what routes took before is not known: %s: %s", path, exc)


def _remember(predictor: Predictor, path: Path) -> None:
    from sdk.routing.memory import remember

    # A file of its own first, so that a reader or a crash never meets half of one.
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        fresh.write_bytes(remember(predictor))
        fresh.chmod(0o600)
        fresh.replace(path)
    except OSError as exc:
        logger.warning("what routes took cannot be kept: %s", exc)
        fresh.unlink(missing_ok=True)


def _other_variant(model: str, here: str, wanted: str) -> str:
    return f"{model} runs as {here} there, and this client's vectors came from {wanted}"


def _bytes_per_row(manifest: Manifest) -> int:
    from nearfar.tensors import NUMPY_OF

    total = 0
    for spec in manifest.outputs:
        dtype = NUMPY_OF.get(spec.datatype)
        count = 1
        for size in spec.shape[1:]:
            count *= max(size, 1)
        total += count * (dtype.itemsize if dtype is not None else 4)
    return total
