"""Streamed answers as an app sees them.

`GenerationStream` and `AsyncGenerationStream` differ only in how they wait; what they say is in
`sdk.answer.AnswerState`, where their pieces come from in `sdk.sources`, and how the first piece is
waited for in `sdk.beginnings`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from nearfar.errors import NearfarError, StreamInterrupted
from nearfar.generation import FinishReason, Usage
from sdk.answer import AnswerState
from sdk.results import Agreement, Chunk, Route, Timings
from sdk.routing import RouteDecision
from sdk.sources import AsyncCloudSource, AsyncSource, CloudSource, Source

if TYPE_CHECKING:
    from nearfar.engines.base import CancelToken
    from sdk.background import BackgroundLoop
    from sdk.beginnings import AsyncBeginning, Beginning, OpenCloud

    #: Begins the answer on the device; waits for a slot.
    OpenEdge = Callable[[AnswerState, RouteDecision, CancelToken], Source]
    AsyncOpenEdge = Callable[[AnswerState, RouteDecision, CancelToken], Awaitable[AsyncSource]]
    #: What begins it on the cloud beside the device; `None` when that cannot be.
    CloudBeside = Callable[[AnswerState, RouteDecision], "OpenCloud | None"]


class _Facts:
    """The part of both streams that does not wait."""

    def __init__(self, state: AnswerState) -> None:
        self._state = state

    @property
    def partial_text(self) -> str:
        """What has come so far; also after an error."""
        return self._state.text

    @property
    def route(self) -> Route:
        """Where the answer comes from and why; shows all routes after a handover."""
        return self._state.route

    @property
    def reason(self) -> str:
        """Why this route; the same as ``route.reason``."""
        return self._state.route.reason

    @property
    def decision(self) -> RouteDecision:
        """The routing decision, content-free and replayable."""
        return self._state.decision

    @property
    def timings(self) -> Timings:
        """Where the time went, up to the last piece."""
        return self._state.timings

    @property
    def usage(self) -> Usage | None:
        """Token counts; `None` before the end. A route that was cut does not tell prompt tokens."""
        return self._state.usage

    @property
    def finish_reason(self) -> FinishReason | None:
        """``stop``, ``length``, ``stop_string``, ``deadline``, ``cancelled``; `None` before."""
        return self._state.finish_reason

    @property
    def variant(self) -> str:
        """Variant that answered; ``""`` before the end."""
        return self._state.variant

    @property
    def execution_provider(self) -> str:
        """What it ran on; ``""`` before the end."""
        return self._state.execution_provider

    @property
    def bytes_sent(self) -> int:
        """Sealed bytes that left the device for this answer so far; 0 on the edge."""
        return self._state.bytes_sent

    @property
    def agreement(self) -> Agreement | None:
        """What became of ``min_agreement``; `None` when none was stated, and before any text."""
        return None


class GenerationStream(_Facts):
    """An answer as it comes: iterate for `Chunk` values, or take it whole with `text`.

    Ends with a `finish_reason`, or with an error; never silently cut. When a route breaks off and
    policy allows the other one, the answer goes on there, and the first chunk from it has
    `handover` set. When the deadline passes, what came so far stands with `finish_reason`
    ``deadline``; `DeadlineExceeded` is raised only when nothing came.

    Not thread-safe, but `close` may be called from another thread.
    """

    def __init__(
        self,
        state: AnswerState,
        *,
        open_source: Callable[[AnswerState], Source],
        open_edge: OpenEdge,
        cloud_beside: CloudBeside,
        check: Callable[[str], None],
        loop: Callable[[], BackgroundLoop],
    ) -> None:
        super().__init__(state)
        self._check = check
        self._open = open_source
        self._open_edge = open_edge
        self._cloud_beside = cloud_beside
        self._loop = loop
        self._source: Source | None = None

    def begin(self) -> GenerationStream:
        """Send the request before the first piece is asked for, when it goes to the cloud.

        The edge waits for the first `next`: until then the stream holds no slot.
        """
        if self._state.attempt.route == "cloud":
            self._ensure_source()
        return self

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        state = self._state
        while not state.is_over:
            if self._ensure_source() is None:
                continue
            try:
                source = self._begun()
                if source is None:
                    continue
                piece, summary = source.pull()
                if piece is None:
                    raise StreamInterrupted("The answer stopped without its last word")
                state.refuse_empty(piece)
            except NearfarError as error:
                self._drop_source()
                if state.error is error:
                    raise
                state.fail(error)
                continue
            except BaseException:  # Ctrl-C: the work behind the answer stops as well
                self.close()
                raise
            try:
                chunk = state.take(piece, summary)
            finally:
                if state.is_over:
                    self._drop_source()
            if chunk is not None:
                return chunk
        raise StopIteration

    def text(self) -> str:
        """Wait for the end and return the whole answer, including what was iterated already.

        Raises:
            NearfarError: The answer could not be ended; `partial_text` has what came.
        """
        for _ in self:
            pass
        if self._state.error is not None:
            raise self._state.error
        return self._state.text

    def close(self) -> None:
        """Want no more: stop the work behind the answer. Idempotent."""
        self._state.cancel()
        self._drop_source()

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # An abandoned stream must not keep a slot of the engine or of the cloud.
        if getattr(self, "_source", None) is not None:
            self.close()

    def _ensure_source(self) -> Source | None:
        state = self._state
        while self._source is None and not state.is_over:
            try:
                if state.attempt.route == "edge" and state.is_raced:
                    state.opening()
                    self._source = self._begin_edge(state.attempt.decision)
                else:
                    self._source = self._open(state)
            except NearfarError as error:
                state.fail(error)
        return self._source

    def _begun(self) -> Source | None:
        """The source that gives the first piece; `None` when another attempt is to be made."""
        state, source = self._state, self._source
        if source is None or not state.is_raced:
            return source
        from sdk.beginnings import CloudOpened, EdgeBeginning, first_to_begin

        if isinstance(source, CloudSource):
            self._source = first = first_to_begin(state, CloudOpened(source), self._start_beside)
            if state.attempt.route == "edge":
                self._check(state.silent_endpoint)
            return first
        assert isinstance(source, EdgeBeginning)
        self._source = first = first_to_begin(state, source, self._start_beside)
        return first

    def _begin_edge(self, decision: RouteDecision) -> Beginning:
        from sdk.beginnings import EdgeBeginning

        return EdgeBeginning(lambda cancel: self._open_edge(self._state, decision, cancel))

    def _start_beside(self, again: RouteDecision) -> Beginning | None:
        state = self._state
        if state.attempt.route == "cloud":
            state.begins_beside("edge")
            return self._begin_edge(again)
        from sdk.beginnings import CloudBeginning

        open_cloud = self._cloud_beside(state, again)
        if open_cloud is None:
            return None
        return CloudBeginning(open_cloud, state.request.deadline, self._loop())

    def _drop_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()


class AsyncGenerationStream(_Facts):
    """As `GenerationStream`, with ``async for`` and ``await``."""

    def __init__(
        self,
        state: AnswerState,
        *,
        open_source: Callable[[AnswerState], Awaitable[AsyncSource]],
        open_edge: AsyncOpenEdge,
        cloud_beside: CloudBeside,
        check: Callable[[str], None],
    ) -> None:
        super().__init__(state)
        self._check = check
        self._open = open_source
        self._open_edge = open_edge
        self._cloud_beside = cloud_beside
        self._source: AsyncSource | None = None

    async def begin(self) -> AsyncGenerationStream:
        """As `GenerationStream.begin`."""
        if self._state.attempt.route == "cloud":
            await self._ensure_source()
        return self

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        state = self._state
        while not state.is_over:
            if await self._ensure_source() is None:
                continue
            try:
                source = await self._begun()
                if source is None:
                    continue
                piece, summary = await source.pull()
                if piece is None:
                    raise StreamInterrupted("The answer stopped without its last word")
                state.refuse_empty(piece)
            except NearfarError as error:
                await self._drop_source()
                if state.error is error:
                    raise
                state.fail(error)
                continue
            except BaseException:  # the task was cancelled: the work stops as well
                await self.close()
                raise
            try:
                chunk = state.take(piece, summary)
            finally:
                if state.is_over:
                    await self._drop_source()
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    async def text(self) -> str:
        """As `GenerationStream.text`."""
        async for _ in self:
            pass
        if self._state.error is not None:
            raise self._state.error
        return self._state.text

    async def close(self) -> None:
        """As `GenerationStream.close`."""
        self._state.cancel()
        await self._drop_source()

    async def __aenter__(self) -> AsyncGenerationStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _ensure_source(self) -> AsyncSource | None:
        state = self._state
        while self._source is None and not state.is_over:
            try:
                if state.attempt.route == "edge" and state.is_raced:
                    state.opening()
                    self._source = self._begin_edge(state.attempt.decision)
                else:
                    self._source = await self._open(state)
            except NearfarError as error:
                state.fail(error)
        return self._source

    async def _begun(self) -> AsyncSource | None:
        """As `GenerationStream._begun`."""
        state, source = self._state, self._source
        if source is None or not state.is_raced:
            return source
        from sdk.beginnings import AsyncCloudOpened, AsyncEdgeBeginning, first_task_to_begin

        if isinstance(source, AsyncCloudSource):
            opened = AsyncCloudOpened(source)
            self._source = first = await first_task_to_begin(state, opened, self._start_beside)
            if state.attempt.route == "edge":
                self._check(state.silent_endpoint)
            return first
        assert isinstance(source, AsyncEdgeBeginning)
        self._source = first = await first_task_to_begin(state, source, self._start_beside)
        return first

    def _begin_edge(self, decision: RouteDecision) -> AsyncBeginning:
        from sdk.beginnings import AsyncEdgeBeginning

        return AsyncEdgeBeginning(lambda cancel: self._open_edge(self._state, decision, cancel))

    def _start_beside(self, again: RouteDecision) -> AsyncBeginning | None:
        state = self._state
        if state.attempt.route == "cloud":
            state.begins_beside("edge")
            return self._begin_edge(again)
        from sdk.beginnings import AsyncCloudBeginning

        open_cloud = self._cloud_beside(state, again)
        if open_cloud is None:
            return None
        return AsyncCloudBeginning(open_cloud, state.request.deadline)

    async def _drop_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            await source.close()
