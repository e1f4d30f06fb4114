"""One streamed answer, whatever brings its pieces: order, handover, deadline, end, timings.

Sans-IO: a stream (sync or async) opens the source that `AnswerState.attempt` asks for and feeds it
pieces and failures; the state says what the app gets and how it goes on. An answer ends in exactly
one of two ways: with a `finish_reason`, or with an error. It is never silently cut.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from nearfar.errors import (
    Cancelled,
    CloudUnavailable,
    DeadlineExceeded,
    EngineError,
    NearfarError,
    StreamInterrupted,
)
from nearfar.generation import FinishReason, GenerationChunk, GenerationOptions, Prompt, Usage
from nearfar.units import format_ms
from sdk.core import Core, route_of
from sdk.repair import repair
from sdk.requests import Request, request_id_of
from sdk.results import Chunk, Route, RouteName, Timings
from sdk.routing import Attempt, Observation, Outcome, RouteDecision
from sdk.routing.hedging import HedgePlan, loses_quality, plan, stalls_after_ms
from sdk.routing.types import exclusion

if TYPE_CHECKING:
    from nearfar.engines.base import TokenWatch
    from sdk.cloud.egress import Permit


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a source knows about a generation that ended well."""

    variant: str
    execution_provider: str
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    pause_ms: float | None = None


class AnswerState:
    """What has come of one answer so far, and what is to be done next.

    Attributes:
        attempt: Route to open next, or the one that is open.
        finish_reason: Why the answer ended; `None` while it goes on or after an error.
        error: What broke it for good; `None` while it goes on or after a good end.
        usage: Token counts, at the end. `prompt_tokens` is as the last route counted them, so
            after a handover it includes the part of the answer that was handed over.
        variant: Variant that answers; ``""`` until it is known.
        execution_provider: What it runs on; ``""`` until it is known.
    """

    #: For the wire, when the answer is traced (`Generate.trace`).
    trace = b""
    #: Told the tokens of this device, when a cascade must know how sure they are.
    watch: TokenWatch | None = None

    def __init__(self, core: Core, request: Request, decision: RouteDecision) -> None:
        self._core = core
        self._request = request
        core.hedging.request()
        self._plan = repair(core, request, decision)
        self.attempt: Attempt = next(self._plan)
        self.finish_reason: FinishReason | None = None
        self.error: NearfarError | None = None
        self.usage: Usage | None = None
        self.variant = ""
        self.execution_provider = ""
        self._parts: list[str] = []
        self._base_tokens = 0  # tokens of routes that broke off
        self._kept_tokens = 0  # tokens whose text the app has
        self._before: list[RouteName] = []
        self._permits: list[Permit] = []
        self._is_handover = False
        self._request_id: bytes | None = None
        self._started_s = self._attempt_started_s = time.perf_counter()
        self._first_s: float | None = None
        self._last_s = self._started_s
        self._summary: Summary | None = None
        self._moments = self._moments_of(decision)
        self._has_begun = False  # the attempt has given its first piece
        self._hedge = ""
        self._why_beside = ""
        self._beside: tuple[RouteName, float] | None = None  # where, and since when
        #: The cloud that the device outran, by name.
        self.silent_endpoint = ""
        # A client with one cloud goes there again sooner rather than not at all; with several, one
        # that takes requests and breaks their answers is left for the others.
        self.is_answered_when_open = len(core.known.endpoints) < 2
        self._is_open = False

    # -- what the source needs ---------------------------------------------------------------------

    @property
    def request(self) -> Request:
        """The request that is being answered."""
        return self._request

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    def prompt(self) -> Prompt:
        """What the route that takes over continues."""
        prompt = self._request.prompt
        assert prompt is not None
        if not self._parts:
            return prompt
        return msgspec.structs.replace(prompt, answer_so_far=self.text)

    def options(self) -> GenerationOptions:
        """Options with the tokens that are left."""
        options = self._request.options
        if not self._base_tokens:
            return options
        left = options.max_new_tokens - self._base_tokens
        return msgspec.structs.replace(options, max_new_tokens=left)

    def request_id(self) -> bytes:
        """16 bytes; the same for every attempt that asks for the same, that is, until text came."""
        if self._parts:
            self._request_id = os.urandom(16)
        elif self._request_id is None:
            self._request_id = request_id_of(self._request)
        return self._request_id

    def opening(self, permit: Permit | None = None) -> None:
        """Note that the attempt's source is being opened."""
        self._attempt_started_s = time.perf_counter()
        if permit is not None:
            self._permits.append(permit)

    def opened(self) -> None:
        """Note that a cloud has taken the request."""
        self._is_open = True

    # -- while the answer has not begun -----------------------------------------------------------

    @property
    def is_raced(self) -> bool:
        """Whether something else is waited for beside the attempt's first piece.

        The other route, which may be started as well; or the deadline, because the device does not
        look up from a prompt.
        """
        if self._has_begun:
            return False
        on_device = self.attempt.route == "edge" and self._request.deadline.is_set
        return on_device or self.silence_s() is not None

    def silence_s(self) -> float | None:
        """How long to wait for the first piece before something is due; `None`: nothing is."""
        if not self._moments or self._parts or self.attempt.number > 1:
            return None
        return max(0.0, self._attempt_started_s + self._moments[0][0] - time.perf_counter())

    def patience_s(self) -> float | None:
        """How long to wait for the first piece before `wake` is called; `None`: for ever."""
        silence_s, left_s = self.silence_s(), self._request.deadline.timeout_s()
        if silence_s is None or left_s is None:
            return left_s if silence_s is None else silence_s
        return min(silence_s, left_s)

    def wake(self) -> RouteDecision | None:
        """The first piece is late: the decision under which the other route is to begin as well.

        Whoever begins it says so with `begins_beside`.

        Raises:
            DeadlineExceeded: The deadline has passed, and nothing came.
            CloudUnavailable: It has stalled, and the configuration wants no two at once.
        """
        if self._request.deadline.remaining_s() == 0.0:
            self.expire()
            return None
        if self.silence_s() != 0.0:
            return None
        at_s, planned = self._moments.pop(0)
        if planned is None:
            endpoint = self._core.known.endpoint_of(self.attempt.decision)
            endpoint.silent(self._request.model, time.monotonic())
            decision = self.attempt.decision
            if self._beside is not None or loses_quality(decision):
                return None
            again = self._core.decide(self._request)
            if exclusion("edge", again.inputs) or not decision.verdict.allows("edge"):
                return None
            silent = format_ms(at_s * 1000.0)
            if self._core.hedging.share <= 0.0:  # never two at once: one after the other
                raise CloudUnavailable(f"The cloud was silent for {silent}: it stalled")
            self._core.hedging.stalled()
            self._why_beside = (
                f"the edge was started as well: the cloud was silent for {silent}: it stalled"
            )
            return again
        if self._beside is not None:
            return None  # since it stalled
        again = self._core.decide(self._request)
        why = self._core.hedging.start(planned, self.attempt.decision, again)
        if isinstance(why, HedgePlan):  # not yet
            self._moments.append((why.after_ms / 1000.0, why))
            self._moments.sort(key=lambda moment: moment[0])
            return None
        if why is None:
            return None
        self._why_beside = f"the {planned.other} was started as well: {why}"
        return again

    def pauses(self, decision: RouteDecision) -> tuple[float | None, Callable[[], None]]:
        """How long a cloud may be silent between its tokens, and who is to be told when it was.

        Args:
            decision: The one under which it was asked.
        """
        from sdk.stalls import pause_limit_s

        known, model = self._core.known, self._request.model

        def tell() -> None:
            known.endpoint_of(decision).silent(model, time.monotonic())

        return pause_limit_s(known, self._request, decision), tell

    def begins_beside(self, route: RouteName, permit: Permit | None = None) -> None:
        """The other route was started as well."""
        self._hedge = self._why_beside
        self._beside = route, time.perf_counter()
        if permit is not None:
            self._permits.append(permit)

    def outrun(self) -> bool:
        """The other route has begun while the first one has not: the answer is the other's.

        Returns:
            Whether policy and router, asked once more, agree; otherwise the first is waited for.

        Raises:
            DeadlineExceeded: It came too late.
        """
        assert self._beside is not None
        other, since_s = self._beside
        first, now_s = self.attempt, time.monotonic()
        self.request.deadline.check(first.route, other)
        if self._core.decide(self._request, (first.route,)).route != other:
            self._hedge += f"; the {other} began first, and may not be taken any more"
            return False
        if first.route == "cloud":
            self.silent_endpoint = first.decision.inputs.endpoint
        silent_s = time.perf_counter() - self._attempt_started_s
        self._core.known.observe_silence(self._request, first, since_s=now_s - silent_s)
        problem = f"The {first.route} was silent for {silent_s * 1000.0:.0f} ms"
        kind = CloudUnavailable if first.route == "cloud" else EngineError
        try:
            self.attempt = self._plan.send(Outcome(now_s=now_s, error=kind(problem)))
        except NearfarError as error:
            self.error = error  # no route is allowed any more
            raise
        self._attempt_started_s = since_s
        self._hedge += f"; the {other} began first"
        return self.attempt.route == other

    def held(self) -> None:
        """The first route has begun although the other was started."""
        self._hedge += f"; the {self.attempt.route} began first"

    def goes_on_beside(self, error: BaseException) -> bool:
        """The first route broke: whether the answer is now the other's, which is under way.

        Raises:
            BaseException: What broke it, where nothing can go on.
        """
        if not isinstance(error, NearfarError):
            raise error
        self.fail(error)
        if self.is_over or self._beside is None or self.attempt.route != self._beside[0]:
            return False
        self._attempt_started_s = self._beside[1]
        return True

    def has_begun(self) -> None:
        """The first piece is here, or the attempt is over: nothing is waited for beside it."""
        self._has_begun = True
        self._moments = []

    def _moments_of(self, decision: RouteDecision) -> list[tuple[float, HedgePlan | None]]:
        if decision.fallback is None:
            return []
        moments: list[tuple[float, HedgePlan | None]] = []
        if decision.route == "cloud":  # a device that computes does not stall
            expected = decision.inputs.cloud.prediction
            moments.append((stalls_after_ms(expected) / 1000.0, None))
        planned = plan(decision)
        if planned is not None:
            moments.append((planned.after_ms / 1000.0, planned))
        moments.sort(key=lambda moment: moment[0])
        return moments

    # -- what comes of it --------------------------------------------------------------------------

    def refuse_empty(self, piece: GenerationChunk) -> None:
        """An answer without any text is a failure of the route, whatever it calls itself.

        Raises:
            EngineError: This piece ends such an answer.
        """
        if piece.finish_reason in ("stop", "length") and not piece.text and not self._parts:
            raise EngineError(
                f"The {self.attempt.route} gave an empty answer for {self._request.model!r}",
                fix="Ask differently, or look at the model there",
            )

    def take(self, piece: GenerationChunk, summary: Summary | None) -> Chunk | None:
        """Take the source's next piece.

        Args:
            piece: The piece.
            summary: Given with the last piece.

        Returns:
            What the app gets, or `None` when there is nothing to show.

        Raises:
            DeadlineExceeded: The deadline passed before any text came.
        """
        chunk = self._chunk(piece) if piece.text else None
        if piece.finish_reason is not None:
            self._finish(piece.finish_reason, piece.usage, summary)
        elif self._request.deadline.remaining_s() == 0.0:
            self.expire()
        return chunk

    def fail(self, error: NearfarError) -> None:
        """The source broke: either `attempt` is another one now, or the answer is over.

        Raises:
            StreamInterrupted: Text was given out and no route can go on with it.
            NearfarError: The error itself, when nothing was given out yet.
        """
        if self.is_over:
            return
        if isinstance(error, DeadlineExceeded):
            self.expire(error)
            return
        self._before.append(self.attempt.route)
        self._tell_breakers(type(error))
        if self._kept_tokens >= self._request.options.max_new_tokens:
            self._finish("length", None, None)  # every token came, only the last word is missing
            return
        try:
            self.attempt = self._plan.send(Outcome(now_s=time.monotonic(), error=error))
        except DeadlineExceeded as late:
            self.expire(late)
            return
        except NearfarError as final:
            self.error = self._cut(final)
            if self.error is final:
                raise
            raise self.error from final
        self._base_tokens = self._kept_tokens
        self._is_handover = bool(self._parts)
        self._has_begun = False

    def expire(self, error: DeadlineExceeded | None = None) -> None:
        """The deadline passed: what came so far is the answer, marked ``deadline``.

        Raises:
            DeadlineExceeded: Nothing came at all.
        """
        if self._parts:
            self._finish("deadline", None, None)
            return
        tried = tuple(dict.fromkeys((*self._before, self.attempt.route)))
        self.error = DeadlineExceeded(
            error.problem if error else "The deadline passed before the first token",
            tried=tried,
            fix=(error.fix if error else "") or "Allow more time with deadline_ms",
        )
        raise self.error from error

    def cancel(self) -> None:
        """The app wants no more."""
        if not self.is_over:
            self._finish("cancelled", None, None)

    # -- what the app sees -------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._parts)

    @property
    def route(self) -> Route:
        """Where the answer comes from, with the routes that broke off before."""
        route = route_of(self.attempt, self._before)
        return msgspec.structs.replace(route, hedge=self._hedge) if self._hedge else route

    @property
    def decision(self) -> RouteDecision:
        """The decision that chose the present route."""
        return self.attempt.decision

    @property
    def bytes_sent(self) -> int:
        """Sealed bytes that left the device for this answer so far."""
        return sum(permit.bytes_sent for permit in self._permits)

    @property
    def timings(self) -> Timings:
        """Where the time went; until the end, up to the last piece."""
        total_ms = (self._last_s - self._started_s) * 1000.0
        ttft_ms = None if self._first_s is None else (self._first_s - self._started_s) * 1000.0
        summary = self._summary
        per_token: float | None = None
        if self._first_s is not None and self._kept_tokens > 1:
            per_token = (self._last_s - self._first_s) * 1000.0 / (self._kept_tokens - 1)
        if summary is None:
            return Timings(total_ms=total_ms, ttft_ms=ttft_ms, ms_per_token=per_token)
        compute_ms = summary.prefill_ms + summary.decode_ms
        attempt_ms = (self._last_s - self._attempt_started_s) * 1000.0
        network_ms = attempt_ms - compute_ms - summary.queue_ms
        return Timings(
            total_ms=total_ms,
            queue_ms=summary.queue_ms,
            compute_ms=compute_ms,
            network_ms=max(0.0, network_ms) if self.attempt.route == "cloud" else 0.0,
            ttft_ms=ttft_ms,
            ms_per_token=per_token,
        )

    def _chunk(self, piece: GenerationChunk) -> Chunk:
        self._last_s = time.perf_counter()
        if self._first_s is None:
            self._first_s = self._last_s
        self._parts.append(piece.text)
        index = self._base_tokens + piece.index
        # The last piece carries the number of tokens as its index; it is no token of its own.
        is_token = piece.finish_reason is None
        self._kept_tokens = max(self._kept_tokens, index + 1 if is_token else index)
        chunk = Chunk(piece.text, index, self.attempt.route, self._is_handover)
        self._is_handover = False
        return chunk

    def _finish(self, reason: FinishReason, usage: Usage | None, summary: Summary | None) -> None:
        if reason == "deadline" and not self._parts:
            self.expire()
        self._last_s = time.perf_counter()
        self.finish_reason = reason
        self._summary = summary
        tokens = self._kept_tokens if usage is None else self._base_tokens + usage.completion_tokens
        self.usage = Usage(
            prompt_tokens=usage.prompt_tokens if usage is not None else 0, completion_tokens=tokens
        )
        self._plan.close()
        if summary is None:
            return
        self.variant, self.execution_provider = summary.variant, summary.execution_provider
        self._tell_breakers(None)
        if usage is None or self._base_tokens:
            return  # a continued answer has another size than the request
        self._core.known.observe(
            self._request,
            self.attempt.route,
            Observation(
                total_ms=(self._last_s - self._attempt_started_s) * 1000.0,
                queue_ms=summary.queue_ms,
                prefill_ms=summary.prefill_ms,
                decode_ms=summary.decode_ms,
                completion_tokens=usage.completion_tokens,
                finished=reason in ("stop", "length", "stop_string"),
                pause_ms=summary.pause_ms,
            ),
            self.attempt.decision,
        )

    def _tell_breakers(self, kind: type[BaseException] | None) -> None:
        """The answer of one of several clouds has ended, with that error or well."""
        is_open, self._is_open = self._is_open, False
        if not is_open or self.is_answered_when_open or self.attempt.route != "cloud":
            return
        endpoint, now_s = self._core.known.endpoint_of(self.attempt.decision), time.monotonic()
        if kind is None:
            endpoint.answered(self._request.model, now_s)
        else:
            endpoint.failed(self._request.model, kind, now_s)

    def _cut(self, error: NearfarError) -> NearfarError:
        """An answer that was begun and cannot be ended is an interrupted stream."""
        if not self._parts or isinstance(error, Cancelled):
            return error
        return StreamInterrupted(
            f"The answer was cut after {self._kept_tokens} tokens: {error.problem}",
            received_tokens=self._kept_tokens,
            fix=error.fix or "Ask again; the text so far is in the stream's `partial_text`",
        )
