"""What a client knows about its two routes: models, offers, speed, health, and what binds it.

Reads the state of the edge runtime and of the cloud link; waits for nothing and connects nowhere.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from nearfar.bundle.manifest import HeadTailPreprocessing, ImagePreprocessing, Manifest
from nearfar.errors import DeadlineExceeded, InvalidInput, NearfarError
from nearfar.processing.reduction import seen_of
from sdk.requests import TASK_OF_METHOD, Request
from sdk.results import ModelInfo, RouteName
from sdk.routing import (
    Attempt,
    CircuitBreaker,
    Observation,
    Prediction,
    Predictor,
    RequestSize,
    RouteDecision,
    RouteState,
    Ticket,
)
from sdk.steps import Answer

if TYPE_CHECKING:
    from edge_runtime import EdgeModel
    from nearfar.bundle.manifest import Variant
    from nearfar.wire.messages import ModelOffer
    from sdk.cloud.endpoints import Endpoint
    from sdk.cloud.link import CloudLink
    from sdk.cloud.pool import Pool
    from sdk.edge import EdgeRoute
    from sdk.steps import Link

logger = logging.getLogger(__name__)


class Knowledge:
    """Both routes as far as they are known. Thread-safe as far as `Predictor` is.

    Args:
        edge: The near route; `None` when the client has none.
        link: The far route; `None` when the client has none. Only its state is read here.
        state_file: Where what was measured is kept across restarts; `None` keeps nothing.

    Attributes:
        endpoints: The clouds, in the configuration's order.
        predictor: What the device takes, and the cloud where there is one only; several have their
            own, see `Endpoint.predictor`.
        breaker: Of the first cloud.
    """

    def __init__(
        self, *, edge: EdgeRoute | None, link: Link | None, state_file: Path | None = None
    ) -> None:
        self.edge = edge
        self.link = link
        self.predictor = Predictor()
        self.endpoints: tuple[Endpoint, ...] = ()
        self._by_name: dict[str, Endpoint] = {}
        if link is not None:
            self.endpoints = _endpoints_of(link, self.predictor)
            self._by_name = {endpoint.name: endpoint for endpoint in self.endpoints}
        self.breaker = self.endpoints[0].breaker if self.endpoints else CircuitBreaker()
        self._pins: dict[str, str] = {}
        self._seeded: set[tuple[str, str, str, str]] = set()
        self._row_bytes: dict[tuple[str, str], int] = {}
        self._state_file = state_file
        #: Told every answer that is learned from; `None` when nobody asked for it.
        self.record: Callable[[RouteName, str, Observation], None] | None = None
        for predictor, path in self._state_files():
            _recall(predictor, path)

    def save(self) -> None:
        """Write what was measured to the state file, if there is one; only warns when it cannot."""
        for predictor, path in self._state_files():
            _remember(predictor, path)

    def _state_files(self) -> list[tuple[Predictor, Path]]:
        """Each predictor and its file; several clouds have one each, beside that of the device."""
        path = self._state_file
        if path is None:
            return []
        several = self.endpoints if len(self.endpoints) > 1 else ()
        return [
            (self.predictor, path),
            *((one.predictor, path.with_name(f"{path.name}.{one.name}")) for one in several),
        ]

    def endpoint(self, name: str) -> Endpoint | None:
        """The cloud of that name, as decisions name it; the first for an empty name."""
        return self._by_name.get(name) or (self.endpoints[0] if self.endpoints else None)

    def named(self, name: str) -> Endpoint:
        """The cloud of that name.

        Raises:
            InvalidInput: There is none.
        """
        endpoint = self._by_name.get(name)
        if endpoint is None:
            raise InvalidInput(
                f"There is no cloud {name[:40]!r}",
                field="cloud",
                fix=f"Configured are: {', '.join(self._by_name) or 'none'}",
            )
        return endpoint

    def endpoint_of(self, decision: RouteDecision) -> Endpoint:
        """The cloud that a decision is about; there must be one."""
        endpoint = self.endpoint(decision.inputs.endpoint)
        assert endpoint is not None  # the router takes no route that is not configured
        return endpoint

    def is_reaching(self, name: str) -> bool:
        """Whether a connection to that cloud is being made; only where there are several."""
        return cast("Pool", self.link).is_reaching(name)

    def predictor_of(self, decision: RouteDecision, route: RouteName) -> Predictor:
        """What knows how long that route takes, on the endpoint that the decision is about."""
        return self.predictor if route == "edge" else self.endpoint_of(decision).predictor

    def manifest(self, request: Request, route: RouteName, decision: RouteDecision) -> Manifest:
        """Manifest of the model on the route that answered."""
        if route == "edge":
            assert self.edge is not None
            return self.edge.find(request.model, request.version).manifest
        offer = self.offer(request, self.endpoint_of(decision))
        assert offer is not None
        return offer.manifest

    def observe(
        self,
        request: Request,
        route: RouteName,
        observation: Observation,
        decision: RouteDecision,
        received_bytes: int = 0,
        ticket: Ticket | None = None,
    ) -> None:
        """Learn from one complete answer, of the cloud that `decision` is about if it is one's."""
        size = self.size(request)
        if received_bytes:
            size = msgspec.structs.replace(size, download_bytes=received_bytes)
        now_s = time.monotonic()
        self.predictor_of(decision, route).observe(
            route, request.model, size, observation, now_s=now_s, ticket=ticket
        )
        if route == "cloud" and len(self.endpoints) > 1:
            self.endpoint_of(decision).observe(request.model, observation, now_s)
        if self.record is not None:
            self.record(route, request.model, observation)

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

    def claimed_region(self) -> str | None:
        """Where the cloud itself says it stands (all of them); `None` before it was asked."""
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
        stalled = edge.breakers and edge.obstacle(model, now_s)
        if stalled:
            return RouteState(obstacle="unreachable", detail=stalled)
        variant = found.variant
        pin = self.variant_wanted(request)
        if pin is not None and pin != variant.id:
            return RouteState(obstacle="no_model", detail=_other_variant(model, variant.id, pin))
        self._seed("edge", model, variant.id, found.manifest)
        if self.endpoints or request.deadline.is_set:  # else nothing depends on its speed
            edge.sense(self.predictor.sense, now_s)
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
        self,
        request: Request,
        size: RequestSize,
        now_s: float,
        endpoint: Endpoint | None,
        *,
        is_alone: bool = False,
    ) -> RouteState:
        """State of one cloud; when it is the only route, it is asked however often it failed."""
        model = request.model
        if endpoint is None:
            return RouteState(obstacle="not_configured", detail="no cloud is configured")
        state = endpoint.link.state
        # A connection is no sign of life: a cloud may accept requests and never answer.
        if not (is_alone and state.is_connected) and not endpoint.can_try(model, now_s):
            return RouteState(obstacle="unreachable", detail=endpoint.describe(model, now_s))
        if state.offers is None:
            return RouteState(prediction=Prediction())
        offer = self.offer(request, endpoint)
        if offer is None:
            return RouteState(obstacle="no_model", detail=f"the cloud does not serve {model!r}")
        if request.method == "embed" and self._is_other_space(request, offer.manifest):
            return RouteState(
                obstacle="no_model",
                detail="vectors of another space",
            )
        pin = self.variant_wanted(request)
        variant = offer.manifest.variant(pin or offer.variant)
        if variant is None:
            return RouteState(
                obstacle="no_model", detail=_other_variant(model, offer.variant, pin or "")
            )
        predictor = endpoint.predictor
        if self._seed("cloud", model, variant.id, offer.manifest, endpoint):
            predictor.report_queue(model, offer.queue_ms, now_s=state.offers_at_s)
        return RouteState(
            prediction=predictor.predict("cloud", model, size, now_s=now_s),
            quality_rank=variant.quality_rank,
            ahead=state.in_flight,
        )

    def serves(self, request: Request, endpoint: Endpoint) -> bool | None:
        """Whether a cloud has the model as it is wanted; `None` before it was asked."""
        if endpoint.link.state.offers is None:
            return None
        offer = self.offer(request, endpoint)
        if offer is None:
            return False
        return offer.manifest.variant(self.variant_wanted(request) or offer.variant) is not None

    def variant(
        self, request: Request, route: RouteName, endpoint: Endpoint | None
    ) -> Variant | None:
        """The variant that would answer there; `None` when it is not known."""
        if route == "edge":
            known = self.edge_model(request)
            return None if known is None else known.variant
        offer = None if endpoint is None else self.offer(request, endpoint)
        if offer is None:
            return None
        return offer.manifest.variant(self.variant_wanted(request) or offer.variant)

    def _is_other_space(self, request: Request, there: Manifest) -> bool:
        """Whether the device has the model too, and gives vectors that cannot be compared."""
        here = self.edge_model(request)
        if here is None or not there.space or not here.manifest.space:
            return False
        return there.space != here.manifest.space

    def _seed(
        self,
        route: RouteName,
        model: str,
        variant_id: str,
        manifest: Manifest,
        endpoint: Endpoint | None = None,
    ) -> bool:
        key = (route, "" if endpoint is None else endpoint.name, model, variant_id)
        if key in self._seeded:
            return False
        self._seeded.add(key)
        variant = manifest.variant(variant_id)
        if variant is not None:
            predictor = self.predictor if endpoint is None else endpoint.predictor
            predictor.seed(route, model, variant.latency, size_bytes=variant.size_bytes)
        return True

    def offer(self, request: Request, endpoint: Endpoint | None = None) -> ModelOffer | None:
        """What a cloud offers for the request; without an endpoint, what any of them does."""
        if endpoint is None and len(self.endpoints) > 1:
            found = (self.offer(request, one) for one in self.endpoints)
            return next((offer for offer in found if offer is not None), None)
        link = self.link if endpoint is None else endpoint.link
        if link is None:
            return None
        offers = link.state.offers
        offer = offers.get(request.model) if offers else None
        if offer is not None and request.version not in (None, offer.manifest.version):
            return None
        return offer

    def size(self, request: Request) -> RequestSize:
        """The request's size with what only a manifest knows: what comes back, how many elements a
        model makes of byte strings, however long they are, and how much of them would leave."""
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
            if isinstance(features, (HeadTailPreprocessing, ImagePreprocessing)):
                seen = seen_of(features)
                size = msgspec.structs.replace(
                    size,
                    input_elements=seen.elements * request.rows,
                    upload_bytes=min(size.upload_bytes, seen.most_bytes * request.rows),
                )
        return size

    def learn(
        self,
        request: Request,
        route: RouteName,
        answer: Answer,
        ticket: Ticket,
        decision: RouteDecision,
    ) -> None:
        self.observe(
            request,
            route,
            Observation(
                total_ms=answer.total_ms,
                queue_ms=answer.queue_ms,
                compute_ms=answer.compute_ms,
                load_ms=answer.load_ms,
            ),
            decision,
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
        predictor = self.predictor_of(attempt.decision, attempt.route)
        ticket = predictor.start(
            attempt.route,
            request.model,
            size,
            Prediction(p50_ms=usual[1], p95_ms=usual[3]),
            now_s=since_s,
        )
        predictor.stop(ticket, now_s=now_s)
        predictor.observe_late(ticket, now_s=now_s)
        if attempt.route == "cloud":
            endpoint = self.endpoint_of(attempt.decision)
            endpoint.observe_latency(request.model, (now_s - since_s) * 1000.0, now_s)

    def under_way(self, request: Request, attempt: Attempt) -> _UnderWay:
        """Tell the predictor that an attempt runs, and whether it was given up as late."""
        return _UnderWay(self, request, attempt)

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

    def guarded(self, request: Request, decision: RouteDecision) -> _Guard:
        """Tell the circuit breakers how a request to the cloud of the decision went."""
        return _Guard(self.endpoint_of(decision), request.model)

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

    __slots__ = ("_attempt", "_endpoint", "_model", "_predictor", "_size", "_ticket")

    def __init__(self, known: Knowledge, request: Request, attempt: Attempt) -> None:
        decision = attempt.decision
        self._predictor = known.predictor_of(decision, attempt.route)
        self._endpoint = known.endpoint_of(decision) if attempt.route == "cloud" else None
        self._model = request.model
        self._size = known.size(request)
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
        ticket = self._ticket
        self._predictor.stop(ticket, now_s=now_s)
        if kind is not None and issubclass(kind, DeadlineExceeded):
            self._predictor.observe_late(ticket, now_s=now_s)
            if self._endpoint is not None:
                late_ms = (now_s - ticket.started_s) * 1000.0
                self._endpoint.observe_latency(self._model, late_ms, now_s)


class _Guard:
    """Reports the outcome of using a cloud to its circuit breakers."""

    __slots__ = ("_endpoint", "_model", "is_answered")

    def __init__(self, endpoint: Endpoint, model: str | None) -> None:
        self._endpoint = endpoint
        self._model = "" if model is None else model
        #: Whether the cloud had answered when the block ended without an error.
        self.is_answered = True

    def __enter__(self) -> _Guard:
        self._endpoint.acquire(self._model, time.monotonic())
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: object, trace: object) -> None:
        endpoint, now_s = self._endpoint, time.monotonic()
        if kind is not None:
            endpoint.failed(self._model, kind, now_s)
        elif self.is_answered:
            endpoint.answered(self._model, now_s)
        else:
            endpoint.released(self._model, now_s)


def _endpoints_of(link: Link, predictor: Predictor) -> tuple[Endpoint, ...]:
    """The clouds behind a link; several have a predictor each, but learn the same answers' lengths:
    how long a model talks is not the endpoint's doing."""
    from sdk.cloud.endpoints import Endpoint

    links: Sequence[CloudLink] | None = getattr(link, "links", None)
    if links is None:
        only = _listening(Endpoint(cast("CloudLink", link), predictor))
        only.link.on_reached = only.connected
        return (only,)
    endpoints = []
    for one in links:
        own = Predictor()
        own.answers = predictor.answers
        endpoints.append(_listening(Endpoint(one, own)))
    by_name = {endpoint.name: endpoint for endpoint in endpoints}

    def reached(name: str, error: NearfarError | None) -> None:
        by_name[name].reached(error, time.monotonic())

    cast("Pool", link).on_reached = reached
    return tuple(endpoints)


def _listening(endpoint: Endpoint) -> Endpoint:
    """The endpoint, told of its link's round trips."""
    predictor = endpoint.predictor
    endpoint.link.on_round_trip = lambda rtt_ms: predictor.observe_round_trip(
        rtt_ms, now_s=time.monotonic()
    )
    return endpoint


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
