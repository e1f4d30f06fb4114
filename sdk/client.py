"""The client for ordinary (synchronous) programs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from nearfar.errors import CloudUnavailable, InvalidInput, NearfarError
from nearfar.generation import ChatMessage
from nearfar.units import Deadline
from sdk import requests
from sdk.calls import Calls, GenerateOptions, RequestOptions
from sdk.results import ClassifyResult, EmbedResult, InferResult, ModelInfo
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

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

    from nearfar.engines.base import CancelToken, TokenWatch
    from sdk.answer import AnswerState
    from sdk.audio import AudioStream
    from sdk.background import BackgroundLoop
    from sdk.core import Completed
    from sdk.jobs.handles import Job
    from sdk.jobs.runner import Runner
    from sdk.racing import Race
    from sdk.requests import Request
    from sdk.routing import RouteDecision
    from sdk.sources import Source
    from sdk.streams import GenerationStream

T = TypeVar("T")


class Client(Calls):
    """Asks models, near or far: on this device, or on a cloud runtime.

    Requests that run on the device run in the calling thread. The cloud is reached through one
    background thread, which starts with the first request that needs it. Thread-safe: one client
    may serve all threads of a program.

    Example::

        with Client.from_config("nearfar.toml") as client:
            print(client.classify("file-type", Path("report.pdf")).label)
    """

    _loop: BackgroundLoop | None = None
    _runner: Runner | None = None

    @classmethod
    def from_config(cls, path: str | Path, **arguments: Any) -> Client:
        """Client as a configuration file describes it; keyword arguments override it.

        Raises:
            ConfigError: Names the file, the key, what is wrong and the fix.
        """
        return cls(path, **arguments)

    def infer(
        self, model: str, feeds: Mapping[str, np.ndarray], **options: Unpack[RequestOptions]
    ) -> InferResult:
        """Run one batch of tensors.

        Args:
            model: Name of the model.
            feeds: Input name to array; names, dtypes and shapes as in the model's manifest.
            options: See `RequestOptions`.

        Raises:
            InvalidInput: The request does not fit the model; nothing ran and nothing left.
            ModelNotFound: Neither the device nor the cloud has the model.
            PolicyDenied: Policy leaves no route.
            DeadlineExceeded: The answer was not complete in time; says what was tried.
            CloudUnavailable, Overloaded, EngineError: Every allowed route failed; the last error.
            SecurityError: The cloud is not who it should be; never worked around.
        """
        result = self._plans.infer(model, feeds, options)
        if result is None:
            done = self._decided(self._infer_request(model, feeds, options), options)
            result = self._infer_result(done)
        return result

    def embed(
        self, model: str, texts: Sequence[str], **options: Unpack[RequestOptions]
    ) -> EmbedResult:
        """Embed texts; all vectors of one call come from one variant of the model.

        Across calls, vectors of different variants may be compared only if the bundle says so
        (`Manifest.mixed_routes`). If it does not, this client keeps to the variant that answered
        first, and routes that cannot run it are not taken.

        Raises:
            As `infer`.
        """
        return self._embed_result(self._run(self._embed_request(model, texts, options)))

    def classify(
        self,
        model: str,
        data: bytes | str | Path,
        *,
        top_k: int = 1,
        **options: Unpack[RequestOptions],
    ) -> ClassifyResult:
        """Classify one thing.

        Args:
            model: Name of the model.
            data: Bytes, or a `pathlib.Path` whose content is read, or text for a text model.
            top_k: How many of the best labels `ClassifyResult.top` holds.
            options: See `RequestOptions`.

        Raises:
            As `infer`.
        """
        request = self._classify_request(model, data, top_k, options)
        return self._classify_result(self._run(request))

    def generate(
        self, model: str, prompt: str, **options: Unpack[GenerateOptions]
    ) -> GenerationStream:
        """Continue raw text, streamed.

        Raises:
            As `infer`, here or while the stream is read.
        """
        request = self._generate_request(model, requests.text_prompt(prompt), options)
        return self._answer(request)

    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str] | ChatMessage],
        **options: Unpack[GenerateOptions],
    ) -> GenerationStream:
        """Answer a conversation, streamed.

        Args:
            model: Name of the model; its bundle brings the chat template.
            messages: Such as ``[{"role": "user", "content": "…"}]``; the last one is the user's.
            options: See `GenerateOptions`.

        Raises:
            As `infer`, here or while the stream is read.
        """
        request = self._generate_request(model, requests.chat_prompt(messages), options)
        return self._answer(request)

    def stream_audio(
        self,
        model: str,
        *,
        sample_rate_hz: int | None = None,
        **options: Unpack[RequestOptions],
    ) -> AudioStream:
        """Hear a signal piece by piece, such as speech from a microphone.

        The model's state and context are kept in the stream and travel with every window, so each
        window may be answered by another route::

            vad = client.stream_audio("vad", sample_rate_hz=16_000)
            for piece in microphone:
                for answer in vad.feed(piece):
                    print(answer.start_s, answer.score)

        Args:
            model: Name of a model whose bundle has preprocessing of the kind ``stream``.
            sample_rate_hz: The signal's; one that the model knows. `None` takes its only one.
            options: See `RequestOptions`; `deadline_ms` is for each window.

        Raises:
            InvalidInput: The model takes no signal, or none of that rate.
            ModelNotFound, PolicyDenied, CloudUnavailable: No route has the model.
        """
        from sdk.audio import AudioStream

        request = self._infer_request(model, {}, options)
        manifest = self._drive(self._core.manifest(request))
        return AudioStream(self, manifest, sample_rate_hz, options)

    def explain(
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
        """Where a request would go now, and why. Nothing runs and nothing leaves the device.

        Not even a connection is made: what a cloud serves is known only after the first request
        that needed it, or after `warm_up` or ``models(refresh=True)``.

        Args:
            model: Name of the model.
            prompt: As for `generate`. Give exactly one of the five inputs, or its size.
            messages: As for `chat`.
            texts: As for `embed`.
            data: As for `classify`.
            feeds: As for `infer`.
            input_tokens: Instead of an input: how many tokens it has.
            upload_bytes: Instead of an input, or beside `input_tokens`: how many bytes it has.
            cloud: Ask about that one of several clouds, by name, and not about the one that the
                balancer would take.
            options: See `GenerateOptions`.

        Returns:
            The decision; its `route` is `None` when there is none, and `error()` says why.

        Raises:
            InvalidInput: The request does not fit the model.
        """
        return self._core.explain(
            self._explain_request(
                model,
                prompt=prompt,
                messages=messages,
                texts=texts,
                data=data,
                feeds=feeds,
                options=options,
                input_tokens=input_tokens,
                upload_bytes=upload_bytes,
            ),
            cloud,
        )

    def submit(
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
    ) -> Job:
        """Put a request into the durable queue, to be run when policy and link allow.

        It is on disk, encrypted, when this returns; its answer is kept there too. What holds for
        jobs: docs/reference/jobs.md.

        Args:
            model: Name of the model.
            deferrable: Wait while there is no route; otherwise the job fails with the first
                failure of its routes, as a call would.
            prompt: As for `generate`. Give exactly one of the five inputs.
            messages: As for `chat`.
            texts: As for `embed`.
            data: As for `classify`.
            feeds: As for `infer`.
            options: See `GenerateOptions`; `top_k` is that of the method, `deadline_ms` the time
                for each attempt, without a default here.

        Raises:
            InvalidInput: The request does not fit the model.
            PolicyDenied, ModelNotFound: Nothing allows it now; nothing was kept.
            CloudUnavailable: There is no route now, and the job is not deferrable.
            Overloaded: The queue is full.
            ConfigError: No queue is configured, or it cannot be opened.
        """
        from sdk.jobs.handles import Job

        inputs = {
            "prompt": prompt, "messages": messages, "texts": texts, "data": data, "feeds": feeds,
        }  # fmt: skip
        request, deadline_ms = self._job_request(model, options, inputs)
        runner = self._jobs()
        job_id = runner.desk.submit(request, deferrable=deferrable, deadline_ms=deadline_ms)
        runner.start()
        return Job(runner.desk, job_id)

    def jobs(self) -> tuple[Job, ...]:
        """The jobs of the queue, oldest first, also those of before a restart.

        Raises:
            ConfigError, SecurityError: No queue is configured, or it cannot be opened.
        """
        from sdk.jobs.handles import Job

        runner = self._jobs()
        runner.start()
        return tuple(Job(runner.desk, info.id) for info in runner.desk.store.infos())

    def job(self, job_id: str) -> Job:
        """The handle of one job.

        Raises:
            InvalidInput: The queue does not hold it.
            ConfigError, SecurityError: No queue is configured, or it cannot be opened.
        """
        from sdk.jobs.desk import no_such_job
        from sdk.jobs.handles import Job

        runner = self._jobs()
        runner.start()
        if runner.desk.store.status(job_id) is None:
            raise no_such_job(job_id)
        return Job(runner.desk, job_id)

    def _jobs(self) -> Runner:
        from sdk.jobs.runner import Runner

        with _JOBS_LOCK:
            if self._runner is None:
                self._runner = Runner(self, self._desk())
            return self._runner

    def models(self, *, refresh: bool = False) -> tuple[ModelInfo, ...]:
        """Models this client can use, by name.

        Args:
            refresh: Ask the cloud now. Without it, the cloud's part is what it last said.

        Raises:
            CloudUnavailable, SecurityError: Only with `refresh`.
        """
        if refresh and self._link is not None:
            self._call(self._link.refresh(Deadline()))
        return self._models()

    def warm_up(self, model: str) -> None:
        """Load a model on the device and connect to the cloud, as far as there are any.

        Sends nothing but the connection's own handshake. A cloud that cannot be reached is no
        error here as long as the device has the model.

        Raises:
            ModelNotFound: Neither has it.
            EngineError, BundleError: The device has it and cannot run it.
            SecurityError: The cloud is not who it should be.
        """
        has_edge = self._core.warm_up_edge(model)
        if self._link is None:
            return
        try:
            self._call(self._link.connect(Deadline()))
        except CloudUnavailable:
            if not has_edge:
                raise
        self._core.require(model)

    def close(self) -> None:
        """Close connections, stop the background thread, free models. Idempotent."""
        if not self._is_closed:
            self._known.save()
        self._is_closed = True
        self._plans.clear()
        if self._sharing is not None:
            self._sharing.clear()
        with _LOOP_LOCK:
            loop, self._loop = self._loop, None
            runner, self._runner = self._runner, None
        if runner is not None:
            runner.stop()
        if loop is not None:
            if self._link is not None:
                loop.call(self._link.close())
            loop.close()
        if runner is not None:
            runner.close()
        if self._edge is not None:
            self._edge.close()
        if self._recorder is not None:
            self._recorder.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- performing steps ------------------------------------------------------------------------

    def _run(self, request: Request) -> Completed:
        done = self._plans.follow(request)
        return self._decided(request) if done is None else done

    def _decided(self, request: Request, options: RequestOptions | None = None) -> Completed:
        """Answer a request that no plan fits. What is shared or traced makes no plans, which know
        no cache and no spans."""
        sharing = self._sharing
        key = None if sharing is None else sharing.key(request)
        if sharing is not None and key is not None:
            self._refuse_if_closed()
            return sharing.run(key, request, lambda: self._drive(self._life(request)))
        done = self._drive(self._life(request))
        if self._telemetry is None:
            self._plans.keep(done, options)
        return done

    def _drive(self, life: Generator[Step, Any, T]) -> T:
        self._refuse_if_closed()
        try:
            step = next(life)
            while True:
                try:
                    came = self._perform(step)
                except NearfarError as error:
                    step = life.throw(error)
                else:
                    step = life.send(came)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            life.close()

    def _perform(self, step: Step) -> Answer | None:
        if isinstance(step, RunHere):
            assert self._edge is not None
            return run_here(self._edge, step)
        if isinstance(step, RunThere):
            assert self._link is not None
            answer: Answer = self._call(run_there(self._link, step), step.request.deadline)
            return answer
        if isinstance(step, Connect):
            assert self._link is not None
            if step.is_waited:
                self._call(connect(self._link, step), step.deadline)
            else:
                self._background().submit(connect(self._link, step))
            return None
        if isinstance(step, Wait):
            time.sleep(step.delay_s)
            return None
        return self._race(step)

    def _race(self, race: Race) -> Answer:
        from sdk.racing import race_in_thread

        link, edge, loop = self._link, self._edge, self._background()
        assert link is not None
        assert edge is not None
        try:
            return race_in_thread(
                race, edge, loop, there=lambda step: loop.submit(run_there(link, step))
            )
        finally:
            if race.is_silent:
                self._check_cloud(race.silent_endpoint)

    def _check_cloud(self, name: str) -> None:
        """Ask a cloud that was silent whether it lives."""
        from sdk.racing import look_after

        endpoint = self._known.endpoint(name)
        if endpoint is not None:
            self._background().submit(look_after(endpoint))

    def _answer(self, request: Request) -> GenerationStream:
        if self._core.states_agreement(request):
            from sdk.cascade.streams import CascadeStream

            return CascadeStream(self._core, request, self._stream)
        return self._stream(request)

    def _stream(self, request: Request, watch: TokenWatch | None = None) -> GenerationStream:
        # Here and below: not every client generates text, and importing should be quick.
        from sdk.answer import AnswerState
        from sdk.streams import GenerationStream

        life = self._core.route(request)
        if self._telemetry is None:
            state = AnswerState(self._core, request, self._drive(life))
        else:
            traced = self._telemetry.answer(request)
            state = traced.state(self._core, self._drive(traced.route(life)))
        state.watch = watch
        return GenerationStream(
            state,
            open_source=self._open,
            open_edge=self._open_edge,
            cloud_beside=self._cloud_beside,
            check=self._check_cloud,
            loop=self._background,
        ).begin()

    def _open_edge(
        self, state: AnswerState, decision: RouteDecision, cancel: CancelToken
    ) -> Source:
        generation = self._core.generate_here(
            state.request, decision, state.prompt(), state.options(), cancel, state.watch
        )
        return self._edge_source(generation, cancel, state)

    def _open(self, state: AnswerState) -> Source:
        from sdk.sources import CloudSource

        request, attempt = state.request, state.attempt
        if attempt.delay_s:
            time.sleep(attempt.delay_s)
        if attempt.route == "edge":
            from nearfar.engines.base import CancelToken

            state.opening()
            return self._open_edge(state, attempt.decision, CancelToken())
        permit, _ = self._drive(self._core.board(request, attempt))
        state.opening(permit)
        stream = self._call(self._ask_cloud(state, permit, attempt.decision), request.deadline)
        return CloudSource(
            stream, request.deadline, self._call, self._post, self._background().submit
        )

    def _call(self, coroutine: Any, deadline: Deadline = Deadline()) -> Any:  # noqa: B008 (frozen)
        try:
            loop = self._background()
        except InvalidInput:
            coroutine.close()
            raise
        return loop.call(coroutine, deadline)

    def _post(self, function: Callable[[], Any]) -> None:
        loop = self._loop
        if loop is not None:
            loop.post(function)

    def _background(self) -> BackgroundLoop:
        loop = self._loop
        if loop is not None:
            return loop
        from sdk.background import BackgroundLoop

        with _LOOP_LOCK:
            self._refuse_if_closed()
            if self._loop is None:
                self._loop = BackgroundLoop()
            return self._loop


#: Guards the making of background loops; taken once in a client's life.
_LOOP_LOCK = threading.Lock()

#: Guards the opening of queues of jobs, which may wait for a disk.
_JOBS_LOCK = threading.Lock()

__all__ = ["Client"]
