"""An answer in text through the cascade, without waiting for anything itself.

The device answers first, unseen by the app: nothing that was shown could be taken back. Its pieces
are given out when the whole answer turned out to be sure enough. No score of an answer rises while
it grows, so the cloud is asked at the first token that is not; the device's work stands still until
the cloud has begun, and goes on if it does not.

The streams of `sdk.cascade.streams` perform the steps.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Union

import msgspec

from nearfar.errors import (
    AgreementNotMet,
    CalibrationError,
    Cancelled,
    ConfigError,
    InvalidInput,
    LocalProtocolError,
    NearfarError,
    SecurityError,
)
from nearfar.units import Deadline
from sdk.cascade.calibration import Threshold
from sdk.cascade.run import Watched, applicable, cascades_of, first_step, sure, unsure, wish_of
from sdk.cascade.scores import AnswerScores, same_text
from sdk.requests import Request
from sdk.results import Agreement, Chunk

if TYPE_CHECKING:
    from nearfar.generation import GenerationOptions
    from sdk.cascade.settings import ModelCascade
    from sdk.core import Core
    from sdk.streams import AsyncGenerationStream, GenerationStream

    AnyStream = Union[GenerationStream, AsyncGenerationStream]

#: Longest wait for the cloud's whole answer when the device's could have been given.
_AUDIT_LIMIT_S = 10.0
_WHOLE = ("stop", "length", "stop_string")


class Ask(enum.Enum):
    """What the life of an answer waits for; each is answered with a `Chunk`, or `None`."""

    NEAR = "the next piece of the first stream"
    STOP_NEAR = "close the first stream"
    FAR = "the next piece of the second stream, which is opened for `TextCascade.second`"


Life = Generator[Union[Ask, Chunk], Union[Chunk, None], None]


class TextCascade:
    """One answer.

    Args:
        core: The client's.
        request: States an agreement, or its model's configuration does.

    Attributes:
        scores: To be told the device's tokens.
        first: The request that is asked first.
        second: The one that goes to the cloud; read when `Ask.FAR` comes for the first time.
        near: The first stream; set by whoever opened it.
        far: The second, likewise.
        agreement: What became of the statement; `None` until the first piece is given out.
        reason: Why this route, once that is known; ``""`` where the stream's own reason says it.
        spent_s: Seconds before the second stream was opened.

    Raises:
        InvalidInput: Tokens are to be drawn, so even the cloud would not agree with itself.
        CalibrationError: There is no calibration, or it is for other variants or options.
    """

    def __init__(self, core: Core, request: Request) -> None:
        if request.options.temperature > 0.0:
            raise InvalidInput(
                "An agreement is stated for an answer whose tokens are drawn",
                field="temperature",
                fix="Leave temperature out, or min_agreement (0 turns a configured one off)",
            )
        self._core = core
        self._request = request
        self._wish: ModelCascade = wish_of(core, request)
        self._watched = applicable(core, cascades_of(core), request)
        if self._watched is not None:
            _check_options(self._watched, request.options)
        self._started_s = time.perf_counter()
        self.spent_s = 0.0
        self.scores = AnswerScores()
        self.first = first_step(core, request)
        self.second = msgspec.structs.replace(request, min_agreement=0.0, mode="cloud_only")
        self.near: AnyStream | None = None
        self.far: AnyStream | None = None
        self.agreement: Agreement | None = None
        self.reason = ""

    def life(self) -> Life:
        """Yields what it waits for, and the pieces for the app, in order.

        Raises:
            AgreementNotMet: The device is not sure enough, the cloud cannot answer, and the app
                demands the agreement.
            NearfarError: As the streams.
        """
        near, watched = self.near, self._watched
        assert near is not None
        target = self._wish.min_agreement
        chunk = yield Ask.NEAR
        if watched is None or (chunk is not None and chunk.route == "cloud"):
            self.agreement = Agreement(target=target, outcome="cloud")
            yield from _pass(chunk, Ask.NEAR)
            return
        found, bound = watched.threshold(target)
        held: list[Chunk] = []
        while chunk is not None and chunk.route == "edge":
            held.append(chunk)
            if self.scores.value(found.score) <= bound:
                break
            chunk = yield Ask.NEAR
        confidence = self.scores.value(found.score)
        facts = {"target": target, "confidence": confidence, "threshold": bound}
        # An answer that broke off on the device, or that time cut, says nothing about a whole one.
        is_whole = near.finish_reason in _WHOLE and not near.route.before
        is_sure = is_whole and confidence > bound
        is_picked = self._wish.audit > 0.0 and cascades_of(self._core).coin() < self._wish.audit
        error: NearfarError | None = None
        if is_sure and is_picked:
            yield from self._audit(watched, held, found, facts)
            return
        if is_sure:
            self._say("kept", sure(found, facts), facts)
            yield from held
            return
        if self._request.mode != "edge_only":
            first, error = yield from self._begin_far()
            if first is not None:
                yield Ask.STOP_NEAR
                self._check_far(watched)
                if is_picked:
                    watched.observe(target, 0.0)
                self._say("escalated", unsure(found, facts), facts)
                yield from _pass(first, Ask.FAR)
                return
        yield from self._make_do(held, chunk, found, facts, error)

    def _make_do(
        self,
        held: list[Chunk],
        broken: Chunk | None,
        found: Threshold,
        facts: dict[str, Any],
        error: NearfarError | None,
    ) -> Life:
        """The device's answer, marked; or an error, where the app demands the agreement."""
        why_not = "the mode is edge_only"
        if error is not None:
            why_not = f"the cloud could not be asked: {error.problem}"
        unmet = f"{unsure(found, facts)}, and {why_not}"
        if self._wish.require:
            yield Ask.STOP_NEAR
            raise AgreementNotMet(
                f"{self._request.model!r}: {unmet}",
                target=self._wish.min_agreement,
                fix="Try later, let policy allow the cloud, or take the edge's answer with "
                "require_agreement=False",
            ) from error
        self._say("unmet", f"agreement not guaranteed: {unmet}", facts)
        yield from held
        is_last_held = bool(held) and broken is held[-1]
        yield from _pass((yield Ask.NEAR) if is_last_held else broken, Ask.NEAR)

    def _audit(
        self, watched: Watched, held: list[Chunk], found: Threshold, facts: dict[str, Any]
    ) -> Life:
        """The cloud's whole answer, to be compared; the device's, where the cloud has none."""
        target = self._wish.min_agreement
        # The app has an answer already; a cloud that hangs must not keep it for ever.
        at_s = min(self._request.deadline.at_s, time.monotonic() + _AUDIT_LIMIT_S)
        self.second = msgspec.structs.replace(self.second, deadline=Deadline(at_s))
        first, _ = yield from self._begin_far()
        pieces: list[Chunk] = []
        is_whole = False
        try:
            while first is not None:
                pieces.append(first)
                first = yield Ask.FAR
            is_whole = self.far is not None and self.far.finish_reason in _WHOLE
        except (SecurityError, Cancelled, LocalProtocolError):
            raise
        except NearfarError:
            pieces.clear()
        if not pieces or not is_whole:
            self.far = None
            self._say("kept", sure(found, facts), facts)
            yield from held
            return
        self._check_far(watched)
        texts = ["".join(piece.text for piece in answer) for answer in (held, pieces)]
        watched.observe(target, 0.0 if same_text(*texts) else 1.0)
        self._say("audited", f"picked to watch the agreement of {target:g}", facts)
        yield from pieces

    def _begin_far(
        self,
    ) -> Generator[Ask, Chunk | None, tuple[Chunk | None, NearfarError | None]]:
        """The cloud's first piece; or why there is none, if the device's answer has to do."""
        self.spent_s = time.perf_counter() - self._started_s
        try:
            return (yield Ask.FAR), None
        except (SecurityError, Cancelled, LocalProtocolError):
            raise  # somebody must look at it, or nobody wants an answer any more
        except NearfarError as error:
            if type(error) is ConfigError and self._core.known.link is not None:
                raise
            self.far = None
            return None, error

    def _check_far(self, watched: Watched) -> None:
        offer = self._core.known.offer(self._request)
        if offer is not None:
            watched.check("cloud", offer.manifest, offer.variant)

    def _say(self, outcome: Any, reason: str, facts: dict[str, Any]) -> None:
        self.agreement = Agreement(outcome=outcome, **facts)
        self.reason = reason


def _pass(chunk: Chunk | None, ask: Ask) -> Life:
    """Give out this piece and all that follow."""
    while chunk is not None:
        yield chunk
        chunk = yield ask


def _check_options(watched: Watched, options: GenerationOptions) -> None:
    made_for = watched.calibration.generation
    if made_for is None:
        return
    for name in ("max_new_tokens", "stop", "repetition_penalty"):
        wanted, given = getattr(made_for, name), getattr(options, name)
        if wanted != given:
            raise CalibrationError(
                f"The calibration of {watched.calibration.model!r} is for answers with {name} = "
                f"{wanted!r}, and this one has {given!r}",
                field=name,
                fix=f"Ask with {name}={wanted!r}, or run `nearfar calibrate` for these answers",
            )
