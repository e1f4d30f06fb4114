"""How a streamed answer begins: on its route, or on the other one when that gives no first piece.

As `sdk.racing` does for batches, but an answer is won by its first piece. Who gives it goes on
alone; the other one is cancelled before any of its text was seen, so two texts never mix.
`sdk.answer.AnswerState` says when the other route is asked and whether it may take over.

The device begins in a thread of its own: a prompt takes seconds there, and whoever waits for it
must be able to hear the cloud, and the deadline.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol

from nearfar.engines.base import CancelToken
from nearfar.errors import Cancelled, EngineError, NearfarError, StreamInterrupted
from nearfar.eventloop import mark_seen
from nearfar.generation import GenerationChunk
from sdk.sources import AsyncBegun, AsyncCloudSource, AsyncSource, Begun, CloudSource, Source

if TYPE_CHECKING:
    from nearfar.units import Deadline
    from nearfar.wire.messages import Token
    from sdk.answer import AnswerState, Summary
    from sdk.background import BackgroundLoop
    from sdk.cloud.resumption import ResumableStream
    from sdk.routing import RouteDecision

logger = logging.getLogger(__name__)

#: Begins the answer on the cloud: connected, permitted, and not waited for.
OpenCloud = Callable[[], Coroutine[Any, Any, "ResumableStream"]]


class Beginning(Source, Protocol):
    """An attempt that has not given its first piece; to be closed unless it is gone on with."""

    @property
    def future(self) -> concurrent.futures.Future[Any]:
        """Done when the first piece is here, or the news that none comes."""


class EdgeBeginning:
    """An answer that the device begins, in a thread of its own.

    Args:
        open_edge: Waits for a slot; runs in that thread.
    """

    def __init__(self, open_edge: Callable[[CancelToken], Source]) -> None:
        self.future: concurrent.futures.Future[Begun] = concurrent.futures.Future()
        self._cancel = CancelToken()
        threading.Thread(
            target=self._run, args=(open_edge,), name="nearfar-first-token", daemon=True
        ).start()

    def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        return self.future.result().pull()

    def close(self) -> None:
        self._cancel.cancel()
        if self.future.done() and self.future.exception() is None:
            self.future.result().close()
        # Otherwise the thread sees the token, and closes what it has opened.

    def _run(self, open_edge: Callable[[CancelToken], Source]) -> None:
        source: Source | None = None
        try:
            source = open_edge(self._cancel)
            begun = Begun(source, _first(*source.pull()))
        except BaseException as error:  # noqa: BLE001 (crosses to the thread that waits)
            if source is not None:
                source.close()
            self.future.set_exception(error)
            return
        self.future.set_result(begun)
        if self._cancel.is_cancelled:
            source.close()


class CloudBeginning:
    """An answer that the cloud was asked to begin as well, on the client's background loop.

    Args:
        open_cloud: Opens the stream.
        deadline: When the answer is due.
        loop: Where it runs.
    """

    def __init__(self, open_cloud: OpenCloud, deadline: Deadline, loop: BackgroundLoop) -> None:
        self._deadline = deadline
        self._loop = loop
        self._source: CloudSource | None = None
        self._opened: list[ResumableStream] = []
        self.future = loop.submit(_begin_on_cloud(open_cloud, deadline, self._opened))

    def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        if self._source is None:
            loop = self._loop
            self._source = CloudSource(
                self._opened[0], self._deadline, loop.call, loop.post, loop.submit,
                first=self.future.result(),
            )  # fmt: skip
        return self._source.pull()

    def close(self) -> None:
        self.future.cancel()
        self._loop.post(self._cancel)  # it may have been opened just before

    def _cancel(self) -> None:
        for stream in self._opened:
            stream.cancel()


class CloudOpened:
    """The cloud's answer that an attempt began with: asked for before anybody waits for it.

    Args:
        source: Its pieces.
    """

    def __init__(self, source: CloudSource) -> None:
        self.future = source.beginning()
        self._source = source

    def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        return self._source.pull()

    def close(self) -> None:
        self._source.close()


def first_to_begin(
    state: AnswerState, first: Beginning, start_other: Callable[[RouteDecision], Beginning | None]
) -> Source | None:
    """Wait for the first piece, from whichever route gives it.

    Args:
        state: The answer.
        first: What it began with.
        start_other: Begins it on the other route as well; `None` when that cannot be.

    Returns:
        What to go on with; `None` when `state` has another attempt now, or is over.

    Raises:
        NearfarError: Nobody begins it; also when the deadline has passed.
    """
    other: Beginning | None = None
    try:
        while True:
            done, _ = concurrent.futures.wait(
                [one.future for one in (first, other) if one is not None],
                state.patience_s(),
                return_when=concurrent.futures.FIRST_COMPLETED,
            )
            if not done:
                again = state.wake()
                if again is not None:
                    other = start_other(again)
                if state.is_over:
                    first.close()
                    return None
            elif first.future in done:
                error = _error_of(first.future)
                if other is None or error is None:
                    if other is not None:
                        state.held()
                        other.close()
                    return first
                if not state.goes_on_beside(error):
                    other.close()
                    return None
                return other
            else:
                assert other is not None
                error = _error_of(other.future)
                if error is None and state.outrun():
                    first.close()
                    return other
                if error is not None:
                    _tell(error)
                other.close()
                other = None
    except BaseException:
        first.close()
        if other is not None:
            other.close()
        raise
    finally:
        state.has_begun()


def _error_of(future: concurrent.futures.Future[Any]) -> BaseException | None:
    if future.cancelled():
        return Cancelled("The client was closed before the answer came")
    return future.exception()


def _tell(error: BaseException) -> None:
    if not isinstance(error, NearfarError):
        raise error
    logger.debug("the route that was asked as well did not begin: %s", error)


def _first(
    piece: GenerationChunk | None, summary: Summary | None
) -> tuple[GenerationChunk, Summary | None]:
    if piece is None:
        raise StreamInterrupted("The answer stopped without its last word")
    if piece.finish_reason in ("stop", "length") and not piece.text:
        raise EngineError("The device gave an empty answer", fix="Look at the model there")
    return piece, summary


async def _begin_on_cloud(
    open_cloud: OpenCloud, deadline: Deadline, opened: list[ResumableStream]
) -> list[Token]:
    """The first tokens of a stream, which is put into `opened`."""
    stream = await open_cloud()
    opened.append(stream)
    try:
        tokens = await stream.tokens(deadline)
        if not tokens:
            raise EngineError("The cloud gave an empty answer", fix="Look at the model there")
    except BaseException:
        stream.cancel()
        raise
    return tokens


# -- the same on the app's event loop --------------------------------------------------------------


class AsyncBeginning(AsyncSource, Protocol):
    """As `Beginning`."""

    @property
    def future(self) -> asyncio.Future[Any]:
        """As `Beginning.future`."""


class AsyncEdgeBeginning:
    """As `EdgeBeginning`, in the client's worker threads."""

    def __init__(self, open_edge: Callable[[CancelToken], Awaitable[AsyncSource]]) -> None:
        self._cancel = CancelToken()
        self.future: asyncio.Future[AsyncBegun] = asyncio.ensure_future(self._run(open_edge))

    async def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        return await self.future.result().pull()

    async def close(self) -> None:
        self._cancel.cancel()
        if not self.future.done():
            self.future.add_done_callback(mark_seen)
        elif not self.future.cancelled() and self.future.exception() is None:
            await self.future.result().close()

    async def _run(self, open_edge: Callable[[CancelToken], Awaitable[AsyncSource]]) -> AsyncBegun:
        source: AsyncSource | None = None
        try:
            source = await open_edge(self._cancel)
            begun = AsyncBegun(source, _first(*await source.pull()))
            if self._cancel.is_cancelled:
                raise Cancelled("The request was cancelled")
        except BaseException:
            self._cancel.cancel()
            if source is not None:
                await source.close()
            raise
        return begun


class AsyncCloudBeginning:
    """As `CloudBeginning`."""

    def __init__(self, open_cloud: OpenCloud, deadline: Deadline) -> None:
        self._deadline = deadline
        self._source: AsyncCloudSource | None = None
        self._opened: list[ResumableStream] = []
        self.future = asyncio.ensure_future(_begin_on_cloud(open_cloud, deadline, self._opened))

    async def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        if self._source is None:
            tokens = self.future.result()
            self._source = AsyncCloudSource(self._opened[0], self._deadline, first=tokens)
        return await self._source.pull()

    async def close(self) -> None:
        self.future.cancel()
        self.future.add_done_callback(mark_seen)
        for stream in self._opened:
            stream.cancel()


class AsyncCloudOpened:
    """As `CloudOpened`."""

    def __init__(self, source: AsyncCloudSource) -> None:
        self.future = source.beginning()
        self._source = source

    async def pull(self) -> tuple[GenerationChunk | None, Summary | None]:
        return await self._source.pull()

    async def close(self) -> None:
        self.future.add_done_callback(mark_seen)
        await self._source.close()


async def first_task_to_begin(
    state: AnswerState,
    first: AsyncBeginning,
    start_other: Callable[[RouteDecision], AsyncBeginning | None],
) -> AsyncSource | None:
    """As `first_to_begin`."""
    other: AsyncBeginning | None = None
    try:
        while True:
            done, _ = await asyncio.wait(
                [one.future for one in (first, other) if one is not None],
                timeout=state.patience_s(),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not done:
                again = state.wake()
                if again is not None:
                    other = start_other(again)
                if state.is_over:
                    await first.close()
                    return None
            elif first.future in done:
                error = _task_error(first.future)
                if other is None or error is None:
                    if other is not None:
                        state.held()
                        await other.close()
                    return first
                if not state.goes_on_beside(error):
                    await other.close()
                    return None
                return other
            else:
                assert other is not None
                error = _task_error(other.future)
                if error is None and state.outrun():
                    await first.close()
                    return other
                if error is not None:
                    _tell(error)
                await other.close()
                other = None
    except BaseException:
        await first.close()
        if other is not None:
            await other.close()
        raise
    finally:
        state.has_begun()


def _task_error(future: asyncio.Future[Any]) -> BaseException | None:
    if future.cancelled():
        return Cancelled("The request was cancelled")
    return future.exception()
