"""The far end of `nearfar bench wire`: one process that answers with what it was sent.

It is a process of its own, so that both ends use a core each, as a client and a cloud do, and so
that its memory is the server's alone. Its sides, always with TLS 1.3:

- ``raw``: a bare `websockets` echo, the baseline, as asyncio comes; alone in its process, since the
  others' has smaller TLS buffers, which would slow it down;
- ``session``: `ServerSession` in the least shell that serves it, what the protocol itself costs;
- ``runtime``: the whole `CloudServer` with a model that gives its input back.

Started by `benchmarks.wire_ends.Server`, which asks for its processor time and memory, one JSON
line each, over standard input and output.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import sys
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from benchmarks.machine import resident_bytes
from benchmarks.wire_timed import CLOCK, TimedServerSession
from cloud_runtime.auth import Authenticator
from cloud_runtime.connection import ServerWebsocket
from cloud_runtime.executor import InferOutcome, InferWork, Ticket
from cloud_runtime.models import ServedModels
from cloud_runtime.server import CloudServer, tls_context
from cloud_runtime.settings import ServerSettings
from cloud_runtime.state import StateDir
from nearfar.bundle.manifest import Manifest, TensorSpec, Variant
from nearfar.errors import EngineError
from nearfar.eventloop import LoopName, limit_tls_buffers, run
from nearfar.secure.identity import ServerIdentity
from nearfar.secure.keys import KeyRing
from nearfar.session import Limits, Received, ServerSession
from nearfar.transport import Transport
from nearfar.units import Deadline
from nearfar.wire.codec import describe
from nearfar.wire.messages import PROTOCOL_VERSION, Auth, Infer, Ready, Result

if TYPE_CHECKING:
    from cloud_runtime.models import ServedModel

#: The model that the runtime serves here.
MODEL = "echo"
VARIANT = "none"
PROVIDER = "CPUExecutionProvider"

#: Descriptors beside those of the connections.
_SPARE_FILES = 256


class EchoModel:
    """Stands where a `ServedModel` stands; its outputs are its inputs, at once."""

    def __init__(self) -> None:
        self.variant = Variant(
            id=VARIANT, engine="onnxruntime", precision="fp32", entry="none", files=()
        )
        self.manifest = Manifest(
            name=MODEL,
            version="1.0.0",
            task="tensor",
            variants=(self.variant,),
            inputs=(TensorSpec(name="x", datatype="UINT8", shape=(-1,)),),
        )
        self.execution_provider = PROVIDER

    def infer(
        self, work: InferWork, *, deadline: Deadline, ticket: Ticket, priority: int = 5
    ) -> asyncio.Future[InferOutcome]:
        """As `ServedModel.infer`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[InferOutcome] = loop.create_future()
        outcome = InferOutcome(outputs=dict(work.feeds), queue_ms=0.0, compute_ms=0.0)
        loop.call_soon(_settle, future, outcome)  # later, as a model's thread does
        return future


def _settle(future: asyncio.Future[InferOutcome], outcome: InferOutcome) -> None:
    if not future.done():
        future.set_result(outcome)


async def echo_raw(websocket: ServerConnection) -> None:
    """The baseline: give every message back."""
    with suppress(ConnectionClosed):
        async for data in websocket:
            await websocket.send(data)


class SessionEcho:
    """`ServerSession` and its transport with the least owner: answers each request at once."""

    def __init__(
        self, keys: KeyRing, limits: Limits, kind: type[ServerSession] = ServerSession
    ) -> None:
        self._keys = keys
        self._limits = limits
        self._kind = kind

    async def serve(self, websocket: ServerConnection) -> None:
        """Serve one websocket until it closes."""
        assert isinstance(websocket, ServerWebsocket)
        session = self._kind(keys=self._keys, limits=self._limits, now_s=time.time())
        _SessionEcho(websocket, session, self._limits)
        await websocket.wait_closed()


class _SessionEcho:
    """One connection."""

    def __init__(self, websocket: ServerWebsocket, session: ServerSession, limits: Limits) -> None:
        self._limits = limits
        self._websocket = websocket
        self._transport = Transport(websocket, session, self, message_timeout_s=30.0)
        self._transport.start()

    def on_received(self, received: Received) -> None:
        message = received.message
        if isinstance(message, Infer):
            names = [header.name for header in message.tensors]
            arrays = dict(zip(names, received.tensors, strict=True))
            self._transport.send(
                Result(
                    stream=message.stream,
                    tensors=describe(arrays),
                    variant=VARIANT,
                    execution_provider=PROVIDER,
                    queue_ms=0.0,
                    compute_ms=0.0,
                ),
                received.tensors,
            )
        elif isinstance(message, Auth):
            self._transport.send(
                Ready(
                    protocol_version=PROTOCOL_VERSION,
                    server="bench",
                    max_streams=self._limits.max_streams,
                    max_message_bytes=self._limits.max_message_bytes,
                )
            )

    def on_failed(self, error: Exception) -> None:
        raise error  # a defect: the benchmark must not go on

    def on_late(self, _: str) -> None:
        self._websocket.transport.abort()

    def on_ended(self, _: ConnectionClosed) -> None:
        pass  # `wait_closed` returns


async def main(state: StateDir, *, is_bare: bool, max_connections: int) -> None:
    """Listen, tell where, and answer questions until standard input ends."""
    limits = Limits()
    tls = tls_context(state.server_chain, state.server_key)
    keys = KeyRing(ServerIdentity.load(state.identity), now_s=time.time())
    options: dict[str, Any] = {
        "ssl": tls,
        "compression": None,
        "max_size": limits.max_message_bytes,
        "server_header": None,
    }
    runtime = CloudServer(
        models=ServedModels([cast("ServedModel", EchoModel())]),
        keys=keys,
        authenticator=Authenticator(state.api_keys),
        tls=tls,
        settings=ServerSettings(limits=limits, max_connections=max_connections),
    )
    handlers: dict[str, Any] = {"raw": echo_raw}
    if not is_bare:
        options["create_connection"] = ServerWebsocket
        handlers = {
            "session": SessionEcho(keys, limits).serve,
            "timed": SessionEcho(keys, limits, TimedServerSession).serve,
        }
    async with AsyncExitStack() as stack:
        ports = {}
        for side, handler in handlers.items():
            server = await stack.enter_async_context(serve(handler, "127.0.0.1", 0, **options))
            ports[side] = _port(server)
        if not is_bare:
            await stack.enter_async_context(runtime)
            ports["runtime"] = await runtime.start("127.0.0.1", 0)
        _say(ports)
        while True:
            question = await asyncio.to_thread(sys.stdin.readline)
            if not question:
                return
            if question.strip() == "memory":
                gc.collect()
                _say(resident_bytes())
            elif question.strip() == "handshakes":
                _say(CLOCK.spent_s)
            else:
                _say(time.process_time())


def _port(server: Server) -> int:
    port: int = next(iter(server.sockets)).getsockname()[1]
    return port


def allow_files(count: int) -> None:
    """Raise this process's limit of open files, as far as the system lets it.

    Raises:
        EngineError: It does not let it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise EngineError(
                f"{count} open files are needed and the system allows {hard}",
                fix="Raise the limit (ulimit -Hn), or ask for fewer connections",
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    kind, folder, connections, loop = sys.argv[1:]
    allow_files(int(connections) + _SPARE_FILES)
    if kind != "raw":
        limit_tls_buffers()  # as `nearfar cloud serve` does
    run(
        main(StateDir(Path(folder)), is_bare=kind == "raw", max_connections=int(connections)),
        cast("LoopName", loop),
    )
