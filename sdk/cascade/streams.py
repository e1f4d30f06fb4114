"""Streams of an answer for which an agreement is stated; they perform what `TextCascade` asks for.

They look like any other stream, but the first piece comes only when the device's answer is whole
and sure enough, or the cloud has begun.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Union

import msgspec

from nearfar.errors import NearfarError
from sdk.cascade.text import Ask, TextCascade
from sdk.results import Agreement, Chunk, Route, Timings
from sdk.streams import AsyncGenerationStream, GenerationStream

if TYPE_CHECKING:
    from nearfar.engines.base import TokenWatch
    from sdk.answer import AnswerState
    from sdk.core import Core
    from sdk.requests import Request

    Opening = Callable[[Request, Union[TokenWatch, None]], GenerationStream]
    AsyncOpening = Callable[[Request, Union[TokenWatch, None]], Awaitable[AsyncGenerationStream]]


class _CascadeFacts:
    """The part of both streams that does not wait; mixed in before a stream."""

    _cascade: TextCascade
    _given: list[str]
    _state: AnswerState

    def _follow(self) -> None:
        """Tell what is known of the stream whose pieces the app gets."""
        stream = self._cascade.far or self._cascade.near
        assert stream is not None
        self._state = stream._state

    @property
    def partial_text(self) -> str:
        return "".join(self._given)

    @property
    def agreement(self) -> Agreement | None:
        return self._cascade.agreement

    @property
    def route(self) -> Route:
        route, cascade = self._state.route, self._cascade
        if not cascade.reason:
            return route
        before = ("edge", *route.before) if cascade.far is not None else route.before
        return msgspec.structs.replace(route, reason=cascade.reason, before=before)

    @property
    def reason(self) -> str:
        return self.route.reason

    @property
    def timings(self) -> Timings:
        """As of any stream; the time until the cloud was asked counts, too."""
        timings = self._state.timings
        spent_ms = self._cascade.spent_s * 1000.0 if self._cascade.far is not None else 0.0
        ttft_ms = timings.ttft_ms
        if self._cascade.agreement is not None and self._cascade.agreement.outcome == "kept":
            ttft_ms = timings.total_ms  # the app got nothing before the end
        return msgspec.structs.replace(
            timings,
            total_ms=timings.total_ms + spent_ms,
            ttft_ms=None if ttft_ms is None else ttft_ms + spent_ms,
        )

    @property
    def bytes_sent(self) -> int:
        streams = (self._cascade.near, self._cascade.far)
        return sum(stream.bytes_sent for stream in streams if stream is not None)


class CascadeStream(_CascadeFacts, GenerationStream):
    """As `GenerationStream`.

    Args:
        core: The client's.
        request: States an agreement, or the configuration does.
        open_stream: Makes an ordinary stream.

    Raises:
        InvalidInput, CalibrationError: As `TextCascade`.
        NearfarError: As an ordinary stream.
    """

    _source = None  # the streams behind it have theirs

    def __init__(self, core: Core, request: Request, open_stream: Opening) -> None:
        self._given = []
        self._open_stream = open_stream
        self._cascade = cascade = TextCascade(core, request)
        cascade.near = self._near = open_stream(cascade.first, cascade.scores)
        self._far: GenerationStream | None = None
        self._life = cascade.life()
        self._follow()

    def __next__(self) -> Chunk:
        try:
            step = self._life.send(None)
            while not isinstance(step, Chunk):
                try:
                    reply = self._perform(step)
                except NearfarError as error:
                    step = self._life.throw(error)
                else:
                    step = self._life.send(reply)
        except BaseException:  # also the end
            self._stop()
            raise
        finally:
            self._follow()
        self._given.append(step.text)
        return step

    def _perform(self, ask: Ask) -> Chunk | None:
        if ask is Ask.NEAR:
            return next(self._near, None)
        if ask is Ask.STOP_NEAR:
            self._near.close()
            return None
        if self._far is None:
            self._far = self._cascade.far = self._open_stream(self._cascade.second, None)
        return next(self._far, None)

    def text(self) -> str:
        for _ in self:
            pass
        return self.partial_text

    def close(self) -> None:
        self._life.close()
        self._stop()

    def _stop(self) -> None:
        self._near.close()
        if self._far is not None:
            self._far.close()


class AsyncCascadeStream(_CascadeFacts, AsyncGenerationStream):
    """As `CascadeStream`, with ``async for`` and ``await``."""

    _source = None

    def __init__(self, core: Core, request: Request, open_stream: AsyncOpening) -> None:
        self._given = []
        self._open_stream = open_stream
        self._cascade = TextCascade(core, request)
        self._near: AsyncGenerationStream | None = None
        self._far: AsyncGenerationStream | None = None
        self._life = self._cascade.life()

    async def begin(self) -> AsyncCascadeStream:
        """Route the request, as an ordinary stream does before it is given to the app."""
        cascade = self._cascade
        cascade.near = self._near = await self._open_stream(cascade.first, cascade.scores)
        self._follow()
        return self

    async def __anext__(self) -> Chunk:
        try:
            step: Any = self._life.send(None)
            while not isinstance(step, Chunk):
                try:
                    reply = await self._perform(step)
                except NearfarError as error:
                    step = self._life.throw(error)
                else:
                    step = self._life.send(reply)
        except StopIteration:
            await self._stop()
            raise StopAsyncIteration from None
        except BaseException:
            await self._stop()
            raise
        finally:
            self._follow()
        self._given.append(step.text)
        return step

    async def _perform(self, ask: Ask) -> Chunk | None:
        assert self._near is not None
        if ask is Ask.NEAR:
            return await anext(self._near, None)
        if ask is Ask.STOP_NEAR:
            await self._near.close()
            return None
        if self._far is None:
            self._far = self._cascade.far = await self._open_stream(self._cascade.second, None)
        return await anext(self._far, None)

    async def text(self) -> str:
        async for _ in self:
            pass
        return self.partial_text

    async def close(self) -> None:
        self._life.close()
        await self._stop()

    async def _stop(self) -> None:
        for stream in (self._near, self._far):
            if stream is not None:
                await stream.close()
