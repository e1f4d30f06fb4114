"""A cloud on loopback that does what a test tells it to, also what no honest cloud would do.

Real TLS, real websockets, the real secure channel and wire; only the models are scripted. It runs
in a thread of its own and writes down every message it saw.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from cloud_runtime.provision import provision
from cloud_runtime.state import StateDir
from nearfar.bundle.manifest import Manifest, TensorSpec, TextPreprocessing, Variant
from nearfar.generation import Usage
from nearfar.secure.identity import ServerIdentity
from nearfar.secure.keys import KeyRing
from nearfar.session import ServerSession
from nearfar.wire import messages as wire
from nearfar.wire.codec import describe
from sdk.config import CloudConfig


def manifest(
    name: str, task: str, *, variants: Sequence[str] = ("fp32",), **fields: object
) -> Manifest:
    """A manifest as a cloud offers it."""
    return Manifest(
        name=name,
        version="1.0.0",
        task=task,  # type: ignore[arg-type]
        variants=tuple(
            Variant(id=v, engine="onnxruntime", precision=v, entry="m.onnx", files=())
            for v in variants
        ),
        **fields,  # type: ignore[arg-type]
    )


TENSOR = manifest(
    "tensor",
    "tensor",
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 4)),),
)
EMBEDDING = manifest(
    "embedder",
    "embedding",
    preprocessing=TextPreprocessing(tokenizer="tokenizer.json", max_length_tokens=16),
    embedding_output="vectors",
)
STORY = manifest("story", "text-generation", context_length_tokens=512)


class ScriptedCloud:
    """One server; a context manager.

    Attributes:
        seen: Messages in the order they came.
        connections: Websockets that were opened.
        behaviour: What happens on `Infer` and `Generate`: called with (session, message, tensors),
            yields seconds to wait; sends with the session; raising `Abort` cuts the connection.
    """

    def __init__(
        self,
        directory: Path,
        *,
        models: Sequence[Manifest] = (TENSOR, EMBEDDING, STORY),
        region: str = "",
        **provisioning: object,
    ) -> None:
        self.state = StateDir(directory)
        if not self.state.identity.exists():
            provision(self.state, ("localhost", "127.0.0.1"), **provisioning)  # type: ignore[arg-type]
        self.identity = ServerIdentity.load(self.state.identity)
        self.models = models
        self.region = region
        self.seen: list[wire.Message] = []
        self.connections = 0
        self.port = 0
        self.refuse_auth = False
        self.behaviour: Callable[..., Iterator[float]] = obliging
        self._sockets: set[ServerConnection] = set()
        self._loop = asyncio.new_event_loop()
        self._stop: asyncio.Event | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scripted-cloud")

    def config(self, **changes: object) -> CloudConfig:
        """What a client needs to come here."""
        fields: dict[str, object] = {
            "url": f"wss://localhost:{self.port}/v1/nearfar",
            "identity": str(self.identity.pin),
            "credentials": f"file:{self.state.client_key}",
            "ca_file": self.state.ca_certificate,
            "region": "eu",
        }
        return CloudConfig(**{**fields, **changes})  # type: ignore[arg-type]

    def saw(self, kind: type) -> list[wire.Message]:
        """Messages of one kind."""
        return [message for message in self.seen if isinstance(message, kind)]

    def cut_all(self) -> None:
        """Cut every connection without a goodbye, as a crash does."""
        done = threading.Event()

        def cut() -> None:
            for socket in self._sockets:
                socket.transport.abort()
            done.set()

        self._loop.call_soon_threadsafe(cut)
        assert done.wait(5)

    def wait_for(self, kind: type, count: int = 1) -> None:
        """Wait until that many messages of a kind have come."""
        ends_s = time.monotonic() + 5
        while len(self.saw(kind)) < count:
            assert time.monotonic() < ends_s, f"no {kind.__name__} came"
            time.sleep(0.005)

    def __enter__(self) -> ScriptedCloud:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self.state.server_chain, self.state.server_key)
        async with serve(
            self._connection, "127.0.0.1", self.port, ssl=tls, compression=None, max_size=None
        ) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            self._started.set()
            await self._stop.wait()

    async def _connection(self, socket: ServerConnection) -> None:
        self.connections += 1
        self._sockets.add(socket)
        session = ServerSession(keys=KeyRing(self.identity, now_s=time.time()), now_s=time.time())
        tasks: set[asyncio.Task[None]] = set()
        flushing = asyncio.Lock()

        async def flush() -> None:
            async with flushing:
                for data in session.data_to_send():
                    await socket.send(data)

        async def act(message: wire.Message, tensors: tuple[np.ndarray, ...]) -> None:
            try:
                for wait_s in self.behaviour(session, message, tensors):
                    await flush()
                    await asyncio.sleep(wait_s)
                await flush()
            except Abort:
                await flush()
                socket.transport.abort()
            except ConnectionClosed:
                pass

        try:
            await flush()
            async for data in socket:
                assert isinstance(data, bytes)
                for received in session.receive(data, now_s=time.time()):
                    message = received.message
                    self.seen.append(message)
                    if isinstance(message, wire.Auth):
                        self._admit(session)
                    elif isinstance(message, wire.ListModels):
                        session.send(wire.Models(stream=message.stream, models=self._offers()))
                    elif isinstance(message, wire.Cancel):
                        if session.is_open(message.stream):
                            session.send(
                                wire.Error(stream=message.stream, code="cancelled", problem="bye")
                            )
                    elif isinstance(message, (wire.Infer, wire.Generate)):
                        tensors = tuple(t.copy() for t in received.tensors)
                        tasks.add(asyncio.ensure_future(act(message, tensors)))
                await flush()
        except ConnectionClosed:
            pass
        finally:
            self._sockets.discard(socket)
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    def _admit(self, session: ServerSession) -> None:
        if self.refuse_auth:
            session.send(wire.Error(stream=0, code="security", problem="The API key is not known"))
            return
        session.send(
            wire.Ready(
                protocol_version=1,
                server="scripted",
                max_streams=8,
                max_message_bytes=1 << 24,
                region=self.region,
            )
        )

    def _offers(self) -> tuple[wire.ModelOffer, ...]:
        return tuple(wire.ModelOffer(manifest=m, variant=m.variants[0].id) for m in self.models)


class Abort(Exception):
    """Cut the connection here."""


def obliging(
    session: ServerSession, message: wire.Message, tensors: tuple[np.ndarray, ...]
) -> Iterator[float]:
    """Answer at once: tensors come back as ``y``, texts as vectors, prompts as numbered words."""
    if isinstance(message, wire.Infer):
        yield from answer_infer(session, message, tensors)
    else:
        yield from tell(session, message, message.options.max_new_tokens)


def answer_infer(
    session: ServerSession, message: wire.Infer, tensors: tuple[np.ndarray, ...]
) -> Iterator[float]:
    """Answer an `Infer`."""
    yield 0
    if message.form == "tensors":
        outputs = {"y": tensors[0]}
    else:
        outputs = {"vectors": np.ones((len(tensors[0]), 3), np.float32)}
    if not session.is_open(message.stream):
        return
    session.send(
        wire.Result(
            stream=message.stream,
            tensors=describe(outputs),
            variant="fp32",
            execution_provider="CPUExecutionProvider",
            queue_ms=0.1,
            compute_ms=0.2,
        ),
        tuple(outputs.values()),
    )


def tell(
    session: ServerSession,
    message: wire.Generate,
    count: int,
    *,
    pause_s: float = 0.0,
    first: int = 0,
    cut_after: int | None = None,
) -> Iterator[float]:
    """Stream ``w0 w1 …``, then `Fin`; or cut the connection after so many tokens."""
    stream = message.stream
    for index in range(count):
        if cut_after is not None and index >= cut_after:
            raise Abort
        while session.is_open(stream) and session.credit(stream) <= 0:
            yield 0.001
        if not session.is_open(stream):
            return
        session.send(wire.Token(stream=stream, index=index, text=f"w{first + index} "))
        yield pause_s
    if cut_after is not None:
        raise Abort
    if not session.is_open(stream):
        return
    session.send(
        wire.Fin(
            stream=stream,
            count=session.token_count(stream),
            digest=session.digest(stream),
            finish_reason="length",
            usage=Usage(prompt_tokens=3, completion_tokens=count),
            variant="fp32",
            execution_provider="CPUExecutionProvider",
            queue_ms=0.0,
            prefill_ms=1.0,
            decode_ms=1.0,
        )
    )
