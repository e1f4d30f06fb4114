"""What `Client` and `AsyncClient` share: policy, prediction, decision, repair.

Nothing here waits. The life of a request is a generator that yields a step (connect, run here, run
there) and receives what came of it; each client performs the steps in its own way. So both decide
and repair alike, and all of it can be tested without a socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import msgspec

from nearfar.bundle.manifest import Manifest
from nearfar.errors import (
    EngineError,
    ModelNotFound,
    NearfarError,
    Overloaded,
)
from nearfar.generation import GenerationOptions, Prompt
from sdk import reaching
from sdk.knowledge import Knowledge
from sdk.policy import Policy, RequestFacts, Verdict, evaluate
from sdk.repair import repair
from sdk.requests import Request, check, request_id_of
from sdk.results import Route, RouteName
from sdk.routing import (
    Attempt,
    DecisionInputs,
    Outcome,
    RouteDecision,
    Ticket,
    decide,
)
from sdk.routing.budget import RETRY_SHARE, RetryBudget
from sdk.routing.hedging import Hedging, plan
from sdk.routing.types import CONFIDENCE, HEDGE_BUDGET
from sdk.steps import Answer, Connect, RunHere, RunThere, Step, Wait

if TYPE_CHECKING:
    from edge_runtime import EdgeGeneration
    from nearfar.engines.base import CancelToken, TokenWatch
    from nearfar.wire.messages import ModelOffer
    from sdk.cascade.run import Cascades
    from sdk.cascade.settings import CascadeConfig
    from sdk.cloud.egress import Permit
    from sdk.cloud.endpoints import Endpoint
    from sdk.racing import Race
    from sdk.results import Agreement
    from sdk.valuation import Valuation

#: Purposes and tenants come from the app and may be many.
_MAX_VERDICTS = 1024


class Completed(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A request that was answered: what `finish` functions make results from."""

    request: Request
    answer: Answer
    route: Route
    decision: RouteDecision
    manifest: Manifest
    total_ms: float
    bytes_sent: int
    agreement: Agreement | None = None


class Core:
    """Decides and repairs for one client.

    Args:
        policy: What may leave the device.
        default_sensitivity: Class of requests that state none; `None` takes the strictest.
        known: What is known about both routes.
        confidence: Probability with which a route must be in time to count as being so.
        cascade: Agreements with the cloud model that the configuration states.
        hedge_budget: Extra requests that hedging may cause, as a part of all; 0 turns it off.
        retry_budget: Requests that may go to the clouds again, as a part of all; 0 turns it off.
        valuation: What routes cost and how much that counts; `None` when only speed may count.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        default_sensitivity: str | None,
        known: Knowledge,
        confidence: float = CONFIDENCE,
        cascade: CascadeConfig | None = None,
        hedge_budget: float = HEDGE_BUDGET,
        retry_budget: float = RETRY_SHARE,
        valuation: Valuation | None = None,
    ) -> None:
        self.policy = policy
        self.retries = RetryBudget(retry_budget)
        self.valuation = valuation
        self.weighs = valuation is not None and valuation.weights is not None
        self.max_attempts = 2 + max(1, len(known.endpoints))
        self.hedging = Hedging(hedge_budget)
        self.confidence = confidence
        self.default_sensitivity = default_sensitivity or policy.strictest
        self.known = known
        #: Told every decision that a request is bound by; `None` when nobody asked for it.
        self.record: Callable[[RouteDecision], None] | None = None
        self._verdicts: dict[tuple[Any, ...], Verdict] = {}
        self.cascade = cascade
        self.cascaded = cascade.models if cascade is not None else {}
        self.cascades: Cascades | None = None

    def states_agreement(self, request: Request) -> bool:
        """Whether the answer must agree with the cloud model's as often as somebody stated."""
        if request.min_agreement is None:
            return request.model in self.cascaded
        return request.min_agreement > 0

    # -- one batch -------------------------------------------------------------------------------

    def run(
        self, request: Request, permits: list[Permit] | None = None
    ) -> Generator[Step, Any, Completed]:
        """The life of one `infer`, `embed` or `classify` call.

        Args:
            request: What to answer.
            permits: Permits of this answer so far; what was sent under them counts.

        Raises:
            NearfarError: Every kind; see `Client.infer`.
        """
        if self.states_agreement(request):
            from sdk.cascade.run import run

            return (yield from run(self, request))
        started_s = time.perf_counter()
        self.hedging.request()
        decision = yield from self.route(request)
        plan = repair(self, request, decision)
        attempt = next(plan)
        before: list[RouteName] = []
        permits = [] if permits is None else permits
        ids: dict[str | None, bytes] = {}
        while True:
            try:
                answer, race = yield from self._attempt(request, attempt, permits, ids)
                request.deadline.check(*before, attempt.route)
            except NearfarError as error:
                if isinstance(error, Overloaded):
                    self.hedging.overloaded(time.monotonic())
                before.append(attempt.route)
                attempt = plan.send(Outcome(now_s=time.monotonic(), error=error))
                continue
            self.known.pin(request, answer.variant)
            route = route_of(attempt, before, race)
            decision = attempt.decision
            if race is not None and race.winner != attempt.route:
                decision = race.again or decision
            return Completed(
                request=request,
                answer=answer,
                route=route,
                decision=attempt.decision,
                manifest=self.known.manifest(request, route.name, decision),
                total_ms=(time.perf_counter() - started_s) * 1000.0,
                bytes_sent=sum(permit.bytes_sent for permit in permits),
            )

    def _attempt(
        self,
        request: Request,
        attempt: Attempt,
        permits: list[Permit],
        ids: dict[str | None, bytes],
    ) -> Generator[Step, Any, tuple[Answer, Race | None]]:
        if attempt.delay_s:
            yield Wait(attempt.delay_s)
        if attempt.route == "edge":
            here = self._here(request, attempt.decision)
            race = self._race(request, attempt, here, ids)
            with self.known.under_way(request, attempt) as ticket:
                answer: Answer = yield here if race is None else race
                _check_output(answer, request, "edge")
                self._settle(request, attempt, race, answer, ticket, permits)
            return answer, race
        permit, offer = yield from self.board(request, attempt)
        permits.append(permit)
        there = self._there(request, permit, offer, ids, attempt.decision)
        race = self._race(request, attempt, there, ids)
        guarded = self.known.guarded(request, attempt.decision)
        with self.known.under_way(request, attempt) as ticket, guarded as guard:
            answer = yield there if race is None else race
            guard.is_answered = race is None or race.winner == "cloud"
            _check_output(answer, request, "cloud" if guard.is_answered else "edge")
            self._settle(request, attempt, race, answer, ticket, permits)
        return answer, race

    def _here(self, request: Request, decision: RouteDecision) -> RunHere:
        from sdk.stalls import patience  # most requests of an app with plans do not come here

        return RunHere(request, _expected_s(decision), patience(self.known, request))

    def _there(
        self,
        request: Request,
        permit: Permit,
        offer: ModelOffer,
        ids: dict[str | None, bytes],
        decision: RouteDecision,
    ) -> RunThere:
        # Asked for again under the same id, it is computed once; another variant is another.
        variant = self.known.variant_wanted(request)
        request_id = ids.setdefault(variant, request_id_of(request, variant))
        return RunThere(
            request, permit, offer, variant, request_id, endpoint=decision.inputs.endpoint
        )

    def _settle(
        self,
        request: Request,
        attempt: Attempt,
        race: Race | None,
        answer: Answer,
        ticket: Ticket,
        permits: list[Permit],
    ) -> None:
        """Learn from an answer, and from the silence of a route that was outrun."""
        route, known, decision = attempt.route, self.known, attempt.decision
        if race is not None:
            if race.permit is not None:
                permits.append(race.permit)
            if race.winner != route:
                known.predictor_of(decision, route).observe_late(ticket, now_s=time.monotonic())
                assert race.winner is not None
                assert race.other_ticket is not None
                assert race.again is not None
                route, ticket, decision = race.winner, race.other_ticket, race.again
        known.learn(request, route, answer, ticket, decision)

    def _race(
        self, request: Request, attempt: Attempt, first: RunHere | RunThere,
        ids: dict[str | None, bytes],
    ) -> Race | None:  # fmt: skip
        """The attempt as one that may be joined by the other route; `None` when it may not."""
        decision = attempt.decision
        if decision.fallback is None:
            return None
        planned = plan(decision)
        if planned is None and attempt.route == "edge":
            return None
        from sdk.racing import Race

        def make_other(again: RouteDecision) -> RunHere | RunThere | None:
            if decision.fallback == "edge":
                return self._here(request, again)
            boarded = self.board_beside(request, again)
            if boarded is None:
                return None
            race.permit, offer = boarded
            return self._there(request, race.permit, offer, ids, again)

        race = Race(self, request, decision, first, planned, make_other)
        return race

    # -- shared by batches and streams -----------------------------------------------------------

    def route(self, request: Request) -> Generator[Connect, Any, RouteDecision]:
        """Check the request and decide where it goes; connects to the cloud if that may matter.

        Returns:
            A decision that has a route.

        Raises:
            InvalidInput, ModelNotFound, PolicyDenied, SecurityError, …: There is none.
        """
        edge = self.known.edge
        if edge is not None and not edge.is_ready and request.deadline.is_set:
            edge.make_ready(request.deadline)
        known = self.known.edge_model(request)
        if known is not None:
            check(request, known.manifest)
        yield from self._reach(request, has_edge=known is not None)
        offer = self.known.offer(request)
        if offer is not None and (
            known is None or known.manifest.version != offer.manifest.version
        ):
            check(request, offer.manifest)
        decision = self.decide(request)
        if self.record is not None:
            self.record(decision)
        error = decision.error()
        if error is not None:
            raise self._explained(error, request)
        return decision

    def manifest(self, request: Request) -> Generator[Connect, Any, Manifest]:
        """What the model of a request is like, before there are inputs for it.

        Asks the cloud only when the device does not have the model and policy allows the cloud.

        Raises:
            ModelNotFound, PolicyDenied, CloudUnavailable, …: No route has the model.
        """
        known = self.known.edge_model(request)
        if known is not None:
            return known.manifest
        yield from self._reach(request, has_edge=False)
        offer = self.known.offer(request)
        if offer is not None:
            return offer.manifest
        error = self.decide(request).error()
        assert error is not None  # no route has the model
        raise self._explained(error, request)

    def decide(
        self,
        request: Request,
        failed: tuple[RouteName, ...] = (),
        left: tuple[str, ...] = (),
        cloud: str | None = None,
    ) -> RouteDecision:
        """Ask policy and router with what is known now; nothing runs and nothing leaves.

        Args:
            request: What is asked for.
            failed: Routes that failed for this request.
            left: Clouds that failed for it; while there is another one, the cloud has not failed.
            cloud: Name of the cloud that is meant; `None` for the balancer's choice.

        Raises:
            InvalidInput: There is no cloud of that name.
        """
        now_s = time.monotonic()
        known = self.known
        endpoints = known.endpoints
        endpoint = endpoints[0] if endpoints else None
        if cloud is not None or len(endpoints) > 1:
            from sdk.several import endpoint_for

            endpoint = (
                endpoint_for(self, request, left, now_s) if cloud is None else known.named(cloud)
            )
        if left and endpoint is not None and endpoint.name not in left:
            failed = tuple(route for route in failed if route != "cloud")
        verdict = self.verdict(request, endpoint)
        size = known.size(request)
        edge = known.edge_state(request, size, now_s)
        is_alone = bool(edge.obstacle) or not verdict.edge or request.mode == "cloud_only"
        far = known.cloud_state(request, size, now_s, endpoint, is_alone=is_alone)
        weights = None
        if request.objective != "latency" or self.weighs:
            valuation = self.valuation or _unpriced()
            edge, far, weights = valuation.of(request, size, edge, far, known, endpoint)
        return decide(
            DecisionInputs(
                model=request.model,
                sensitivity=request.sensitivity or self.default_sensitivity,
                verdict=verdict,
                edge=edge,
                cloud=far,
                mode=request.mode,
                objective=request.objective,
                remaining_ms=request.deadline.remaining_ms(),
                size=size,
                failed=failed,
                confidence=self.confidence,
                hedge_tokens=self.hedging.tokens(now_s),
                endpoint="" if endpoint is None else endpoint.name,
                weights=weights,
            )
        )

    def board(
        self, request: Request, attempt: Attempt
    ) -> Generator[Connect, Any, tuple[Permit, ModelOffer]]:
        """What a request needs to go to the cloud: a permit, a connection, an offer that fits.

        Raises:
            PolicyDenied: No permit.
            CloudUnavailable, SecurityError: No connection.
            ModelNotFound, InvalidInput: The cloud's model does not fit the request.
        """
        from sdk.cloud.egress import Permit

        endpoint = self.known.endpoint_of(attempt.decision)
        permit = Permit(attempt.decision.verdict, request.model, region=endpoint.region())
        if not endpoint.link.state.is_connected:
            yield from reaching.board(self, request, attempt, endpoint.name)
            # The cloud may have said where it stands only now.
            verdict = self.verdict(request, endpoint)
            permit = Permit(verdict, request.model, region=endpoint.region())
        offer = self.known.offer(request, endpoint)
        if offer is None:
            raise ModelNotFound(
                f"The cloud does not have model {request.model!r}", fix=self.known.available()
            )
        check(request, offer.manifest)
        return permit, offer

    def board_beside(
        self, request: Request, again: RouteDecision
    ) -> tuple[Permit, ModelOffer] | None:
        """As `board`, for a request that is late on the device already.

        Returns:
            `None` when it cannot go at once: it is not made to wait for a connection, and repair
            would say what is wrong, but the device is still at work.
        """
        from sdk.cloud.egress import Permit

        endpoint = self.known.endpoint(again.inputs.endpoint)
        if endpoint is None or not endpoint.link.state.is_connected:
            return None
        offer = self.known.offer(request, endpoint)
        if offer is None:
            return None
        try:
            check(request, offer.manifest)
            return Permit(again.verdict, request.model, region=endpoint.region()), offer
        except NearfarError:
            return None

    def explain(self, request: Request, cloud: str | None = None) -> RouteDecision:
        """Decide with what is known; connects nowhere, so an unknown cloud stays unknown.

        Args:
            request: What would be asked for; without content its size is all that counts.
            cloud: Name of the cloud that is meant; `None` for the one that would be taken.

        Raises:
            InvalidInput: The request does not fit the model, or there is no such cloud.
        """
        model = self.known.edge_model(request)
        offer = self.known.offer(request)
        manifest = model.manifest if model is not None else offer.manifest if offer else None
        if manifest is not None and request.has_content:
            check(request, manifest)
        if self.states_agreement(request):
            from sdk.cascade.run import first_step

            request = first_step(self, request)
        return self.decide(request, cloud=cloud)

    # -- the device ------------------------------------------------------------------------------

    def generate_here(
        self,
        request: Request,
        decision: RouteDecision,
        prompt: Prompt,
        options: GenerationOptions,
        cancel: CancelToken,
        watch: TokenWatch | None = None,
    ) -> EdgeGeneration:
        """Begin an answer on this device; waits for a slot.

        Raises:
            NearfarError: What the edge runtime says.
        """
        from sdk.stalls import patience

        edge = self.known.edge
        assert edge is not None
        edge.asked(request.model)
        return edge.runtime.generate(
            request.model,
            prompt,
            options,
            version=request.version,
            deadline=request.deadline,
            cancel=cancel,
            expected_s=_expected_s(decision),
            watch=watch,
            patience=patience(self.known, request, so_far=prompt.answer_so_far),
        )

    def warm_up_edge(self, model: str) -> bool:
        """Load a model on this device; says whether it is here at all.

        Raises:
            EngineError, BundleError: It is here and cannot run.
        """
        edge = self.known.edge
        if edge is None:
            return False
        try:
            edge.find(model, None)
        except ModelNotFound:
            if self.known.link is None:
                raise
            return False
        edge.runtime.warm_up(model)
        return True

    def require(self, model: str) -> None:
        """Raise `ModelNotFound` when neither route has the model."""
        if not any(info.name == model for info in self.known.models()):
            raise ModelNotFound(f"There is no model {model!r}", fix=self.known.available())

    # -- policy ----------------------------------------------------------------------------------

    def verdict(self, request: Request, endpoint: Endpoint | None) -> Verdict:
        """What policy says, if the cloud is that one; the same facts have the same verdict, which
        is worth remembering."""
        facts = (
            request.model,
            self.known.task(request),
            request.sensitivity or self.default_sensitivity,
            request.purpose,
            request.tenant,
            None if endpoint is None else endpoint.region(),
            None if endpoint is None else endpoint.shaping(),
            None if endpoint is None else endpoint.attested(),
        )
        verdict = self._verdicts.get(facts)
        if verdict is None:
            model, task, sensitivity, purpose, tenant, region, shaping, attested = facts
            verdict = evaluate(
                self.policy,
                RequestFacts(
                    model=model,
                    task=task,
                    sensitivity=sensitivity,
                    purpose=purpose,
                    tenant=tenant,
                    region=region,
                    shaping=shaping,
                    attested=attested,
                ),
            )
            if len(self._verdicts) >= _MAX_VERDICTS:
                self._verdicts.clear()
            self._verdicts[facts] = verdict
        return verdict

    # -- connecting ------------------------------------------------------------------------------

    def _reach(self, request: Request, *, has_edge: bool) -> Generator[Connect, Any, None]:
        """Connect to a cloud, or to several, if the request may need that."""
        if len(self.known.endpoints) > 1:
            from sdk.several import reach

            yield from reach(self, request, has_edge=has_edge)
        elif reaching.is_needed(self, request, has_edge=has_edge):
            yield from reaching.connect(self, request, has_edge=has_edge)

    def _explained(self, error: NearfarError, request: Request) -> NearfarError:
        """The router's error, or a more exact one where more is known here."""
        if not isinstance(error, ModelNotFound):
            return error
        wrong_variant = self.known.wrong_variant(request)
        if wrong_variant is not None:
            return wrong_variant
        if self.known.edge is not None:
            try:
                self.known.edge.find(request.model, request.version)
            except ModelNotFound:
                pass
            except NearfarError as why:
                return why  # it is here, and cannot run
        return ModelNotFound(error.problem, fix=self.known.available())


def route_of(attempt: Attempt, before: list[RouteName], race: Race | None = None) -> Route:
    """The route as results show it."""
    # The decision's own reason starts with the route, which `Route` shows in another place.
    decision = attempt.decision
    reason = decision.reason.removeprefix(f"{attempt.route}: ")
    if race is None or not race.hedge:
        endpoint = decision.inputs.endpoint if attempt.route == "cloud" else ""
        return Route(attempt.route, reason, tuple(before), endpoint=endpoint)
    winner = race.winner or attempt.route
    if winner != attempt.route:
        reason = f"the {attempt.route} was late, and this route answered first"
        decision = race.again or decision
    endpoint = decision.inputs.endpoint if winner == "cloud" else ""
    return Route(winner, reason, tuple(before), hedge=race.hedge, endpoint=endpoint)


def _unpriced() -> Valuation:
    from sdk.valuation import UNPRICED

    return UNPRICED


def _check_output(answer: Answer, request: Request, route: RouteName) -> None:
    """An answer without anything in it is a failure of the route, whatever it calls itself."""
    if not answer.outputs:
        raise EngineError(
            f"The {route} gave an empty answer for {request.model!r}",
            fix="Look at the model there; the other route is taken where policy allows it",
        )


def _expected_s(decision: RouteDecision) -> float | None:
    """How long an attempt should hold a slot of the device, for the estimates of others."""
    service_ms = decision.inputs.edge.prediction.service_ms
    return None if service_ms is None else service_ms / 1000.0
