"""Streamed answers that outlive the connection on which they were asked for.

A generation belongs to nobody's connection: a `Reader` takes its tokens, one at a time. When that
reader's connection breaks, the tokens go on into what `nearfar.wire.retention` keeps, until the
client comes back with its ticket (or with the same request) and a new reader, or until its time has
passed and the generation is stopped, which frees its slot.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from cloud_runtime.models import ServedModel
from cloud_runtime.relay import Completion, TokenRelay
from nearfar.errors import Cancelled, DeadlineExceeded, InvalidInput, ResumeMissed
from nearfar.wire.messages import Generate
from nearfar.wire.retention import Kept, Key, Retention, RetentionLimits

logger = logging.getLogger(__name__)

#: Tokens moved at once while nobody reads; keeps the bounds of retention meaningful.
_BATCH_TOKENS = 16


class _Answer:
    """One generation, what is kept of it, and who reads it now.

    Attributes:
        aborted: Why it was stopped before its end, if it was.
        reader: Who takes its tokens; a new one takes over from an old one at once.
    """

    __slots__ = ("aborted", "kept", "reader", "relay", "served", "timer")

    def __init__(self, kept: Kept, relay: TokenRelay, served: ServedModel) -> None:
        self.kept = kept
        self.relay = relay
        self.served = served
        self.aborted: BaseException | None = None
        self.reader: object = None
        self.timer: asyncio.TimerHandle | None = None

    @property
    def has_failed(self) -> bool:
        outcome = self.aborted or self.relay.outcome
        return outcome is not None and not isinstance(outcome, Completion)

    def abort(self, error: BaseException) -> None:
        """Stop the work, without effect after its end; the reader hears it at once."""
        if self.aborted is None and not isinstance(self.relay.outcome, Completion):
            self.aborted = error
        self.relay.abort(error)
        if self.timer is not None:
            self.timer.cancel()
        if isinstance(self.reader, Reader):
            self.reader.wake()


class Reader:
    """One connection's hold on an answer. Made by `Answers`.

    Attributes:
        served: The model that answers.
    """

    def __init__(self, answers: Answers, answer: _Answer) -> None:
        self.served = answer.served
        self._answers = answers
        self._answer = answer
        self._news = asyncio.Event()
        previous, answer.reader = answer.reader, self
        answer.relay.nudge()  # a previous reader that waits there returns with nothing
        if isinstance(previous, Reader):
            previous.wake()

    @property
    def _is_current(self) -> bool:
        return self._answer.reader is self

    def outcome(self, next_index: int) -> Completion | BaseException | None:
        """How the answer ended, for a client that has the tokens before `next_index`.

        Returns:
            `None` while there is more to read. Also an error when another connection took over.
        """
        answer = self._answer
        if not self._is_current:
            return Cancelled("The answer goes on on another connection of this client")
        if answer.aborted is not None:
            return answer.aborted
        return None if answer.kept.next_index > next_index else answer.relay.outcome

    async def read(self, next_index: int, credit: int) -> Sequence[str]:
        """Texts from `next_index` on, at most `credit`; waits for the first.

        Returns:
            Nothing at the end (see `outcome`), or when there is news to look at first.
        """
        answer = self._answer
        if not self._is_current or answer.aborted is not None:
            return ()
        if answer.kept.next_index > next_index:  # what came while nobody read
            if not credit:
                self._news.clear()
                await self._news.wait()
                return ()
            return answer.kept.since(next_index, credit)
        texts = [chunk.text for chunk in await answer.relay.read(credit)]
        self._answers.keep(answer, texts)
        return texts

    def digest_at(self, index: int) -> hashlib._Hash:
        """Running SHA-256 of the texts before `index`."""
        return self._answer.kept.digest_at(index)

    def on_credit(self, received: int) -> None:
        """The client gave credit, and has the tokens before `received`."""
        if self._is_current:
            self._answers.acknowledge(self._answer, received)
            self._answer.relay.nudge()
        self.wake()

    def abort(self, error: BaseException) -> None:
        """The client wants no more: stop the work."""
        if self._is_current:
            self._answer.abort(error)

    def wake(self) -> None:
        """Let a waiting `read` look around."""
        self._news.set()

    def leave(self, *, is_kept: bool) -> None:
        """Read no more.

        Args:
            is_kept: The client may come back for it; otherwise the work stops.
        """
        if self._is_current:
            self._answers.leave(self._answer, is_kept=is_kept)


class Answers:
    """All generations of a server. Used from one event loop.

    Args:
        limits: What is kept of them.
        clock: Monotonic seconds.

    Attributes:
        retention: What is kept.
    """

    def __init__(
        self,
        limits: RetentionLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.retention = Retention(limits)
        self._clock = clock
        self._answers: dict[Key, _Answer] = {}
        self._is_open = True
        self._keepers: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(
        self,
        key: Key,
        request: Generate,
        ticket: bytes,
        start: Callable[[], TokenRelay],
        served: ServedModel,
        *,
        deadline_s: float | None,
    ) -> Reader:
        """Start an answer, or take over the one that the same request started before.

        Args:
            key: Who asks, and the request's id.
            request: What is asked for.
            ticket: With which the new reader's client may come back.
            start: Begins the generation.
            served: What it runs on.
            deadline_s: Seconds until it is too late; `None` for no deadline.

        Raises:
            InvalidInput: The id belongs to another request of this minute.
            ResumeMissed: It is a repetition, and the beginning is not kept any more.
            NearfarError: What `start` raises.
        """
        self._sweep()
        fingerprint = _fingerprint_of(request)
        found = self._answers.get(key)
        if found is not None and not found.has_failed:
            if found.kept.fingerprint != fingerprint:
                raise InvalidInput(
                    "The request id was used for another request within the last minute",
                    field="request_id",
                    fix="Draw 16 random bytes for each request",
                )
            if found.kept.first:
                raise ResumeMissed(
                    "The request was answered before, and the beginning is not kept any more",
                    fix="Ask again with a new request id",
                )
            self.retention.read(found.kept, ticket)
            return Reader(self, found)
        if found is not None:
            self._forget(found)
        relay = start()
        answer = _Answer(self.retention.begin(key, fingerprint, ticket), relay, served)
        self._answers[key] = answer
        if deadline_s is not None:
            loop = asyncio.get_running_loop()
            answer.timer = loop.call_later(deadline_s, answer.abort, too_late())
        return Reader(self, answer)

    def resume(
        self,
        key: Key,
        ticket: bytes,
        next_index: int,
        *,
        new_ticket: bytes,
        permit: Callable[[str], None] = lambda _: None,
    ) -> Reader:
        """Go on with an answer on another connection.

        Args:
            key: Who asks, and the request's id.
            ticket: Of the connection before.
            next_index: First token that the client does not have.
            new_ticket: With which the client may come back once more.
            permit: Called with the name of the model that answers; raises to refuse.

        Raises:
            ResumeMissed: As `Retention.resume`.
        """
        self._sweep()
        if (found := self._answers.get(key)) is not None:
            permit(found.served.manifest.name)
        self.retention.resume(key, ticket, next_index, new_ticket=new_ticket, now_s=self._clock())
        answer = self._answers[key]
        logger.info("an answer goes on at token %d on another connection", next_index)
        return Reader(self, answer)

    def keep(self, answer: _Answer, texts: Sequence[str]) -> None:
        """Keep what was taken from the relay."""
        for text in texts:
            self.retention.add(answer.kept, text)
        if self.retention.given_up:
            self._sweep()

    def acknowledge(self, answer: _Answer, index: int) -> None:
        """Forget what the client has."""
        self.retention.acknowledge(answer.kept, index)

    def leave(self, answer: _Answer, *, is_kept: bool) -> None:
        """The reader is gone: keep the answer for its client, or end it."""
        answer.reader = None
        is_kept = is_kept and self._is_open and self._answers.get(answer.kept.key) is answer
        if not is_kept or answer.has_failed:
            self._forget(answer)
            return
        is_running = answer.relay.outcome is None
        self.retention.leave(answer.kept, self._clock(), is_running=is_running)
        if is_running:
            keeper = asyncio.get_running_loop().create_task(self._go_on(answer))
            answer.reader = keeper
            self._keepers.add(keeper)
            keeper.add_done_callback(self._keepers.discard)
        self._sweep()

    def close(self) -> None:
        """Stop what nobody reads; what is read goes on, but is not kept any more afterwards."""
        self._is_open = False
        for answer in list(self._answers.values()):
            if not isinstance(answer.reader, Reader):
                self._forget(answer)
        self._sweep()

    async def _go_on(self, answer: _Answer) -> None:
        """Take tokens while nobody reads; ends when somebody does, at the end, or when full."""
        keeper, relay, kept = asyncio.current_task(), answer.relay, answer.kept
        while (
            answer.reader is keeper and relay.outcome is None and not self.retention.is_full(kept)
        ):
            self.keep(answer, [chunk.text for chunk in await relay.read(_BATCH_TOKENS)])

    def _forget(self, answer: _Answer) -> None:
        answer.abort(Cancelled("The client is gone"))
        if self._answers.get(answer.kept.key) is answer:
            del self._answers[answer.kept.key]
            self.retention.drop(answer.kept.key)

    def _sweep(self) -> None:
        """Stop what was given up, and come back when the next one's time has passed."""
        retention = self.retention
        gone, retention.given_up = retention.given_up, []
        for kept in [*gone, *retention.expire(self._clock())]:
            answer = self._answers.get(kept.key)
            if answer is not None and answer.kept is kept:
                self._forget(answer)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        expiry_s = retention.next_expiry_s
        if expiry_s is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the server
                loop = asyncio.get_running_loop()
                delay_s = max(0.0, expiry_s - self._clock()) + 0.001  # clocks are granular
                self._timer = loop.call_later(delay_s, self._sweep)


def _fingerprint_of(request: Generate) -> bytes:
    """Equal for equal requests, and no content."""
    asked = (request.model, request.version, request.variant, request.prompt, request.options)
    return hashlib.sha256(msgspec.msgpack.encode(asked)).digest()


def too_late() -> DeadlineExceeded:
    """What a request is told whose time has passed here."""
    return DeadlineExceeded(
        "The deadline passed before the answer was complete",
        tried=("cloud",),
        fix="Allow more time with deadline_ms, or ask for a shorter answer",
    )
