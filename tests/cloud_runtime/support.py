"""A real server on loopback, in this process, and a small client that speaks the real protocol."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from cloud_runtime.auth import Authenticator
from cloud_runtime.executor import ModelExecutor
from cloud_runtime.models import ServedModel, ServedModels
from cloud_runtime.provision import provision, url_of
from cloud_runtime.server import CloudServer, tls_context
from cloud_runtime.settings import ServerSettings
from cloud_runtime.state import StateDir
from cloud_runtime.tokens import TokenVerifier
from nearfar.bundle.manifest import Manifest, TensorSpec, Variant
from nearfar.engines.base import CancelToken
from nearfar.errors import CloudUnavailable, NearfarError, from_code
from nearfar.generation import GenerationChunk, GenerationOptions, Prompt, Usage
from nearfar.secure.attestation import Attester
from nearfar.secure.credentials import Credentials
from nearfar.secure.identity import ServerIdentity
from nearfar.secure.keys import KeyRing
from nearfar.session import ClientSession, Limits, max_sealed_bytes
from nearfar.wire.codec import describe
from nearfar.wire.messages import (
    Cancel,
    Credit,
    Error,
    Fin,
    Generate,
    GoAway,
    Infer,
    ListModels,
    Message,
    Models,
    Ready,
    Result,
    Resume,
    Token,
)
from nearfar.wire.retention import ticket_for

TIMEOUT_S = 60.0


def run(coroutine, timeout_s: float = TIMEOUT_S):
    """`asyncio.run` with a limit, so that a lost message fails a test instead of hanging it."""
    return asyncio.run(asyncio.wait_for(coroutine, timeout_s))


def make_state(path: Path, **options) -> StateDir:
    state = StateDir(path)
    provision(state, ("localhost", "127.0.0.1"), **options)
    return state


# The server's side.


class ScriptedModel:
    """Stands where a `LoadedModel` stands: answers at the pace a test needs.

    `infer` returns ``{"y": x}`` after `delay_s`; `generate` gives "t0 ", "t1 " … every
    `token_s`, as many as asked for. While `hold` is set it waits before each answer and token.
    """

    def __init__(
        self,
        name: str = "scripted",
        *,
        task: str = "tensor",
        delay_s: float = 0.0,
        token_s: float = 0.0,
        error: Exception | None = None,
    ) -> None:
        self.variant = Variant(
            id="fp32", engine="onnxruntime", precision="fp32", entry="none", files=()
        )
        spec = TensorSpec(name="x", datatype="FP32", shape=(-1, 4))
        self.manifest = Manifest(
            name=name, version="1.0.0", task=task, variants=(self.variant,), inputs=(spec,)
        )
        self.engine = SimpleNamespace(execution_provider="CPUExecutionProvider")
        self.delay_s = delay_s
        self.token_s = token_s
        self.error = error
        self.hold = threading.Event()
        self.runs = 0
        self.tokens = 0
        self.running = 0

    def _pause(self, cancel: CancelToken | None = None) -> None:
        while self.hold.is_set() and not (cancel and cancel.is_cancelled):
            time.sleep(0.002)

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.runs += 1
        self.running += 1
        try:
            time.sleep(self.delay_s)
            self._pause()
            if self.error:
                raise self.error
            return {"y": np.array(feeds["x"])}
        finally:
            self.running -= 1

    def infer_raw(self, form: str, items: Sequence[str | bytes]) -> dict[str, np.ndarray]:
        assert all(isinstance(item, str if form == "text" else bytes) for item in items)
        return self.infer({"x": np.array([len(item) for item in items], np.float32)})

    def generate(
        self, prompt: Prompt, options: GenerationOptions, cancel: CancelToken | None = None
    ) -> Iterator[GenerationChunk]:
        self.runs += 1
        self.running += 1
        try:
            for index in range(options.max_new_tokens):
                time.sleep(self.token_s)
                self._pause(cancel)
                if cancel and cancel.is_cancelled:
                    usage = Usage(prompt_tokens=1, completion_tokens=index)
                    yield GenerationChunk(
                        index=index, text="", finish_reason="cancelled", usage=usage
                    )
                    return
                if self.error and index == 3:
                    raise self.error
                self.tokens += 1
                yield GenerationChunk(index=index, text=f"t{index} ")
            yield GenerationChunk(
                index=options.max_new_tokens,
                text="end",
                finish_reason="length",
                usage=Usage(prompt_tokens=1, completion_tokens=options.max_new_tokens),
            )
        finally:
            self.running -= 1


def served(*models, slots: int = 1, max_waiting: int = 32) -> ServedModels:
    return ServedModels(
        [
            ServedModel(model, ModelExecutor(model, slots=slots, max_waiting=max_waiting))
            for model in models
        ]
    )


@dataclass
class Running:
    """A server and what a client needs to know to reach it."""

    server: CloudServer
    state: StateDir
    url: str
    pin: str

    @property
    def token(self) -> str:
        return self.state.client_key.read_text().strip()


@contextlib.asynccontextmanager
async def running(
    models: ServedModels,
    state: StateDir,
    settings: ServerSettings | None = None,
    *,
    allow_anonymous: bool = False,
    with_tokens: bool = False,
    attester: Attester | None = None,
) -> AsyncIterator[Running]:
    identity = ServerIdentity.load(state.identity)
    server = CloudServer(
        models=models,
        keys=KeyRing(identity, now_s=time.time(), attester=attester),
        authenticator=Authenticator(
            state.api_keys,
            allow_anonymous=allow_anonymous,
            tokens=TokenVerifier(state.token_issuers, audience=str(identity.pin))
            if with_tokens
            else None,
        ),
        tls=tls_context(state.server_chain, state.server_key),
        settings=settings or ServerSettings(),
    )
    try:
        async with server:
            port = await server.start("127.0.0.1", 0)
            yield Running(server, state, url_of("127.0.0.1", port), str(identity.pin))
    finally:
        models.close()


# The client's side.


@dataclass
class Answer:
    """What came on a generate stream."""

    texts: list[str] = field(default_factory=list)
    fin: Fin | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass
class Lost:
    """What a client remembers of an answer whose connection it lost."""

    request_id: bytes
    key: bytes
    texts: list[str]


def client_tls(state: StateDir) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(state.ca_certificate))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # Python 3.13's default
    return context


class WireClient:
    """One connection; its reader sorts messages by stream. Errors are raised as nearfar errors."""

    def __init__(self, websocket: ClientConnection, session: ClientSession) -> None:
        self.websocket = websocket
        self.session = session
        self.ready: Ready | None = None
        self.goaway: GoAway | None = None
        self._queues: dict[int, asyncio.Queue[tuple[Message, tuple[np.ndarray, ...]]]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        server: Running,
        *,
        token: str | None = None,
        credentials: Credentials | None = None,
        pin: str | None = None,
        limits: Limits | None = None,
    ) -> AsyncIterator[WireClient]:
        """Raises the error with which the server, or our own session, refused."""
        limits = limits or Limits()
        async with connect(
            server.url,
            ssl=client_tls(server.state),
            compression=None,
            max_size=max_sealed_bytes(limits),
            proxy=None,
        ) as websocket:
            session = ClientSession(
                pin=server.pin if pin is None else pin,
                token=server.token if token is None else token,
                credentials=credentials,
                limits=limits,
                now_s=time.time(),
            )
            client = cls(websocket, session)
            client._reader = asyncio.create_task(client._read())
            try:
                await client._opened
                yield client
            finally:
                client._reader.cancel()

    async def _read(self) -> None:
        error: Exception = CloudUnavailable("The connection was closed")
        try:
            async for data in self.websocket:
                for received in self.session.receive(data, now_s=time.time()):
                    message = received.message
                    if isinstance(message, Ready):
                        self.ready = message
                        self._opened.set_result(None)
                    elif isinstance(message, GoAway):
                        self.goaway = message
                    elif isinstance(message, Error) and not message.stream:
                        error = from_code(message.code, message.problem, message.fix)
                    else:
                        self._queue(message.stream).put_nowait((message, received.tensors))
                await self.flush()
        except ConnectionClosed:
            pass
        except NearfarError as refused:
            error = refused
        if not self._opened.done():
            self._opened.set_exception(error)
        for stream, queue in self._queues.items():
            lost = Error(stream=stream, code=error.code, problem=error.problem)
            queue.put_nowait((lost, ()))

    def _queue(self, stream: int) -> asyncio.Queue[tuple[Message, tuple[np.ndarray, ...]]]:
        return self._queues.setdefault(stream, asyncio.Queue())

    async def flush(self) -> None:
        for data in self.session.data_to_send():
            await self.websocket.send(data)

    async def send(self, message: Message, tensors: Sequence[np.ndarray] = ()) -> None:
        self.session.send(message, tensors)
        await self.flush()

    async def next(self, stream: int) -> tuple[Message, tuple[np.ndarray, ...]]:
        """Next message of a stream; raises if it is an error, or if the connection ended."""
        message, tensors = await self._queue(stream).get()
        if isinstance(message, Error):
            raise from_code(message.code, message.problem, message.fix)
        return message, tensors

    async def models(self) -> Models:
        stream = self.session.next_stream
        await self.send(ListModels(stream=stream))
        message, _ = await self.next(stream)
        assert isinstance(message, Models)
        return message

    async def start_infer(
        self, model: str, arrays: Mapping[str, np.ndarray], **options: object
    ) -> int:
        stream = self.session.next_stream
        options = {"request_id": os.urandom(16), **options}
        message = Infer(stream=stream, model=model, tensors=describe(arrays), **options)
        await self.send(message, tuple(arrays.values()))
        return stream

    async def infer(
        self, model: str, arrays: Mapping[str, np.ndarray], **options: object
    ) -> tuple[Result, dict[str, np.ndarray]]:
        message, tensors = await self.next(await self.start_infer(model, arrays, **options))
        assert isinstance(message, Result)
        names = [header.name for header in message.tensors]
        return message, dict(zip(names, tensors, strict=True))

    async def start_generate(
        self, model: str, *, tokens: int, credit: int = 1000, text: str = "Hello", **options: object
    ) -> int:
        stream = self.session.next_stream
        message = Generate(
            stream=stream,
            request_id=options.pop("request_id", None) or os.urandom(16),
            model=model,
            prompt=options.pop("prompt", Prompt(text=text)),
            options=GenerationOptions(max_new_tokens=tokens),
            credit=credit,
            **options,
        )
        await self.send(message)
        return stream

    async def start_resume(
        self, lost: Lost, *, key: bytes | None = None, next_index: int | None = None, **changes
    ) -> int:
        """Take up an answer that another connection lost; `key` and the like make it wrong."""
        stream = self.session.next_stream
        fields = {
            "request_id": lost.request_id,
            "ticket": ticket_for(lost.key if key is None else key, lost.request_id),
            "next_index": len(lost.texts) if next_index is None else next_index,
            "credit": 1000,
            **changes,
        }
        await self.send(Resume(stream=stream, **fields))
        digest = hashlib.sha256("".join(lost.texts[: fields["next_index"]]).encode())
        self.session.carry_over(stream, digest)
        return stream

    async def lose(self, stream: int, request_id: bytes, count: int) -> Lost:
        """Read that many tokens, then cut the connection."""
        texts = [(await self.next(stream))[0].text for _ in range(count)]
        self.websocket.transport.abort()
        await self.websocket.wait_closed()
        return Lost(request_id, self.ready.resume_key, texts)

    async def collect(self, stream: int) -> Answer:
        """The rest of an answer; the session has checked indices, count and digest."""
        answer = Answer()
        while answer.fin is None:
            message, _ = await self.next(stream)
            if isinstance(message, Token):
                answer.texts.append(message.text)
            else:
                assert isinstance(message, Fin)
                answer.fin = message
        return answer

    async def cancel(self, stream: int) -> None:
        await self.send(Cancel(stream=stream))

    async def grant(self, stream: int, tokens: int, received: int = 0) -> None:
        await self.send(Credit(stream=stream, tokens=tokens, received=received))


async def until(condition) -> None:
    """Wait until a condition of the other threads holds."""
    while not condition():
        await asyncio.sleep(0.005)
