"""The client for asyncio programs: the names of `Client`, with ``await`` and ``async for``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from nearfar.errors import CloudUnavailable, EngineError, InvalidInput, NearfarError
from nearfar.generation import ChatMessage
from nearfar.units import Deadline
from sdk import requests
from sdk.answer import AnswerState
from sdk.calls import Calls, GenerateOptions, RequestOptions
from sdk.results import ClassifyResult, EmbedResult, InferResult, ModelInfo
from sdk.sources import AsyncCloudSource, AsyncEdgeSource, AsyncSource
from sdk.steps import (
    Answer,
    Connect,
    RunHere,
    RunThere,
    Step,
    Wait,
    connect,
    run_here,
    run_there,
)
from sdk.streams import AsyncGenerationStream

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

    from nearfar.engines.base import CancelToken, TokenWatch
    from sdk.audio import AsyncAudioStream
    from sdk.jobs.desk import Desk
    from sdk.jobs.handles import AsyncJob
    from sdk.jobs.runner import AsyncRunner
    from sdk.racing import Race
    from sdk.requests import Request
    from sdk.routing import RouteDecision

T = TypeVar("T")

#: Threads in which the device computes or waits for its turn; more requests than that queue here.
_EDGE_THREADS = 32


class AsyncClient(Calls):
    """As `Client`, for one asyncio event loop.

    Requests that run on the device run in worker threads, the cloud is awaited on the app's loop.
    Cancelling a task cancels its request. A client belongs to the loop that first used it.
    """

    _workers: ThreadPoolExecutor | None = None
    _owner: asyncio.AbstractEventLoop | None = None
    _opening: asyncio.Task[Desk] | None = None
    _runner: AsyncRunner | None = None

    @classmethod
    def from_config(cls, path: str | Path, **arguments: Any) -> AsyncClient:
        """As `Client.from_config`."""
        return cls(path, **arguments)

    async def infer(
        self, model: str, feeds: Mapping[str, np.ndarray], **options: Unpack[RequestOptions]
    ) -> InferResult:
        """As `Client.infer`."""
        return self._infer_result(await self._run(self._infer_request(model, feeds, options)))

    async def embed(
        self, model: str, texts: Sequence[str], **options: Unpack[RequestOptions]
    ) -> EmbedResult:
        """As `Client.embed`."""
        return self._embed_result(await self._run(self._embed_request(model, texts, options)))

    async def classify(
        self,
        model: str,
        data: bytes | str | Path,
        *,
        top_k: int = 1,
        **options: Unpack[RequestOptions],
    ) -> ClassifyResult:
        """As `Client.classify`."""
        request = self._classify_request(model, data, top_k, options)
        return self._classify_result(await self._run(request))

    async def generate(
        self, model: str, prompt: str, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerationStream:
        """As `Client.generate`; await it for the stream."""
        request = self._generate_request(model, requests.text_prompt(prompt), options)
        return await self._answer(request)

    async def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str] | ChatMessage],
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerationStream:
        """As `Client.chat`; await it for the stream."""
        request = self._generate_request(model, requests.chat_prompt(messages), options)
        return await self._answer(request)

    async def stream_audio(
        self,
        model: str,
        *,
        sample_rate_hz: int | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncAudioStream:
        """As `Client.stream_audio`; await it for the stream, and each of its methods."""
        from sdk.audio import AsyncAudioStream

        request = self._infer_request(model, {}, options)
        manifest = await self._drive(self._core.manifest(request))
        return AsyncAudioStream(self, manifest, sample_rate_hz, options)

    async def explain(
        self,
        model: str,
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str] | ChatMessage] | None = None,
        texts: Sequence[str] | None = None,
        data: bytes | str | Path | None = None,
        feeds: Mapping[str, np.ndarray] | None = None,
        input_tokens: int | None = None,
        upload_bytes: int | None = None,
        cloud: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> RouteDecision:
        """As `Client.explain`."""
        request = self._explain_request(
            model,
            prompt=prompt,
            messages=messages,
            texts=texts,
            data=data,
            feeds=feeds,
            options=options,
            input_tokens=input_tokens,
            upload_bytes=upload_bytes,
        )
        await self._prepare()
        return self._core.explain(request, cloud)

    async def submit(
        self,
        model: str,
        *,
        deferrable: bool = False,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str] | ChatMessage] | None = None,
        texts: Sequence[str] | None = None,
        data: bytes | str | Path | None = None,
        feeds: Mapping[str, np.ndarray] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncJob:
        """As `Client.submit`."""
        from sdk.jobs.handles import AsyncJob

        inputs = {
            "prompt": prompt, "messages": messages, "texts": texts, "data": data, "feeds": feeds,
        }  # fmt: skip
        request, deadline_ms = self._job_request(model, options, inputs)
        await self._prepare()
        runner = await self._jobs()
        job_id = await asyncio.to_thread(
            runner.desk.submit, request, deferrable=deferrable, deadline_ms=deadline_ms
        )
        runner.start()
        return AsyncJob(runner.desk, job_id)

    async def jobs(self) -> tuple[AsyncJob, ...]:
        """As `Client.jobs`."""
        from sdk.jobs.handles import AsyncJob

        runner = await self._jobs()
        runner.start()
        infos = await asyncio.to_thread(runner.desk.store.infos)
        return tuple(AsyncJob(runner.desk, info.id) for info in infos)

    async def job(self, job_id: str) -> AsyncJob:
        """As `Client.job`."""
        from sdk.jobs.desk import no_such_job
        from sdk.jobs.handles import AsyncJob

        runner = await self._jobs()
        runner.start()
        if await asyncio.to_thread(runner.desk.store.status, job_id) is None:
            raise no_such_job(job_id)
        return AsyncJob(runner.desk, job_id)

    async def _jobs(self) -> AsyncRunner:
        from sdk.jobs.runner import AsyncRunner

        self._own_loop()
        if self._opening is None:
            # One task for all who come meanwhile: a queue that is opened twice is run once only.
            self._opening = asyncio.ensure_future(asyncio.to_thread(self._desk))
        try:
            desk = await asyncio.shield(self._opening)
        except NearfarError:
            self._opening = None
            raise
        if self._runner is None:
            self._runner = AsyncRunner(self, desk)
        return self._runner

    async def models(self, *, refresh: bool = False) -> tuple[ModelInfo, ...]:
        """As `Client.models`."""
        await self._prepare()
        if refresh and self._link is not None:
            await self._link.refresh(Deadline())
        return self._models()

    async def warm_up(self, model: str) -> None:
        """As `Client.warm_up`."""
        await self._prepare()
        has_edge = await self._work(lambda: self._core.warm_up_edge(model))
        if self._link is None:
            return
        try:
            await self._link.connect(Deadline())
        except CloudUnavailable:
            if not has_edge:
                raise
        self._core.require(model)

    async def close(self) -> None:
        """Close connections, end worker threads, free models. Idempotent."""
        if not self._is_closed:
            self._known.save()
        self._is_closed = True
        if self._sharing is not None:
            self._sharing.clear()
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.close()
        if self._link is not None:
            await self._link.close()
        workers, self._workers = self._workers, None
        if workers is not None:
            # What an engine has begun it finishes, streams at their next token.
            running = [asyncio.wrap_future(future) for future in tuple(self._running)]
            await asyncio.gather(*running, return_exceptions=True)
            workers.shutdown()
        if self._edge is not None:
            self._edge.close()
        if self._recorder is not None:
            self._recorder.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # -- performing steps ------------------------------------------------------------------------

    async def _run(self, request: Request) -> Any:
        sharing = self._sharing
        key = None if sharing is None else sharing.key(request)
        if sharing is not None and key is not None:
            self._own_loop()
            return await sharing.run_async(key, request, lambda: self._drive(self._life(request)))
        return await self._drive(self._life(request))

    async def _drive(self, life: Generator[Step, Any, T]) -> T:
        await self._prepare()
        try:
            step = next(life)
            while True:
                try:
                    came = await self._perform(step)
                except NearfarError as error:
                    step = life.throw(error)
                else:
                    step = life.send(came)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            life.close()

    async def _perform(self, step: Step) -> Answer | None:
        if isinstance(step, RunHere):
            here, edge = step, self._edge
            assert edge is not None
            return await self._work(lambda: run_here(edge, here))
        if isinstance(step, RunThere):
            assert self._link is not None
            return await run_there(self._link, step)
        if isinstance(step, Connect):
            assert self._link is not None
            await connect(self._link, step)
            return None
        if isinstance(step, Wait):
            await asyncio.sleep(step.delay_s)
            return None
        return await self._race(step)

    async def _race(self, race: Race) -> Answer:
        from sdk.racing import race_in_tasks

        link, edge = self._link, self._edge
        assert link is not None
        assert edge is not None

        def here(step: RunHere, cancel: CancelToken) -> Awaitable[Answer]:
            return self._work(lambda: run_here(edge, step, cancel))

        try:
            return await race_in_tasks(race, here, lambda step: run_there(link, step))
        finally:
            if race.is_silent:
                self._check_cloud(race.silent_endpoint)

    def _check_cloud(self, name: str) -> None:
        """Ask a cloud that was silent whether it lives."""
        from sdk.racing import look_after

        endpoint = self._known.endpoint(name)
        if endpoint is not None and not self._is_closed:
            check = asyncio.ensure_future(look_after(endpoint))
            self._checks.add(check)
            check.add_done_callback(self._checks.discard)

    async def _answer(self, request: Request) -> AsyncGenerationStream:
        if self._core.states_agreement(request):
            from sdk.cascade.streams import AsyncCascadeStream

            return await AsyncCascadeStream(self._core, request, self._stream).begin()
        return await self._stream(request)

    async def _stream(
        self, request: Request, watch: TokenWatch | None = None
    ) -> AsyncGenerationStream:
        life = self._core.route(request)
        if self._telemetry is None:
            state = AnswerState(self._core, request, await self._drive(life))
        else:
            traced = self._telemetry.answer(request)
            state = traced.state(self._core, await self._drive(traced.route(life)))
        state.watch = watch
        stream = AsyncGenerationStream(
            state,
            open_source=self._open,
            open_edge=self._open_edge,
            cloud_beside=self._cloud_beside,
            check=self._check_cloud,
        )
        return await stream.begin()

    async def _open_edge(
        self, state: AnswerState, decision: RouteDecision, cancel: CancelToken
    ) -> AsyncSource:
        prompt, options = state.prompt(), state.options()
        try:
            generation = await self._work(
                lambda: self._core.generate_here(
                    state.request, decision, prompt, options, cancel, state.watch
                )
            )
        except asyncio.CancelledError:
            cancel.cancel()  # the worker leaves the queue, or gives its slot back
            raise
        return AsyncEdgeSource(self._edge_source(generation, cancel, state), self._work)

    async def _open(self, state: AnswerState) -> AsyncSource:
        request, attempt = state.request, state.attempt
        if attempt.delay_s:
            await asyncio.sleep(attempt.delay_s)
        if attempt.route == "edge":
            from nearfar.engines.base import CancelToken

            state.opening()
            return await self._open_edge(state, attempt.decision, CancelToken())
        permit, _ = await self._drive(self._core.board(request, attempt))
        state.opening(permit)
        stream = await self._ask_cloud(state, permit, attempt.decision)
        return AsyncCloudSource(stream, request.deadline)

    async def _work(self, function: Callable[[], T]) -> T:
        self._refuse_if_closed()
        if self._workers is None:
            self._running: set[Future[Any]] = set()
            self._workers = ThreadPoolExecutor(_EDGE_THREADS, thread_name_prefix="nearfar-edge")
        future = self._workers.submit(function)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return await asyncio.wrap_future(future)

    async def _prepare(self) -> None:
        self._own_loop()
        edge = self._edge
        if edge is not None and not edge.is_ready:
            with contextlib.suppress(EngineError):  # the router hears it when it asks
                await self._work(lambda: edge.runtime)  # imports engines: not on the app's loop

    def _own_loop(self) -> None:
        self._refuse_if_closed()
        loop = asyncio.get_running_loop()
        if self._owner is None:
            self._owner = loop
            self._checks: set[asyncio.Future[None]] = set()
        elif self._owner is not loop:
            raise InvalidInput(
                "This AsyncClient is used on two event loops",
                field="client",
                fix="Make one AsyncClient per event loop (per asyncio.run)",
            )
