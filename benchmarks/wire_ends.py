"""The near end of `nearfar bench wire`: the server process, and a client for each of its ports."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from benchmarks.wire_server import MODEL
from benchmarks.wire_timed import TimedClientSession
from cloud_runtime.provision import provision, url_of
from cloud_runtime.state import StateDir
from nearfar.errors import EngineError
from nearfar.session import ClientSession, Limits, Received
from nearfar.transport import Transport
from nearfar.units import Deadline
from nearfar.wire.codec import describe
from nearfar.wire.messages import Infer
from sdk.cloud.connection import Connection
from sdk.cloud.egress import Permit
from sdk.cloud.websocket import ClientWebsocket
from sdk.config import CloudConfig
from sdk.policy import Verdict

if TYPE_CHECKING:
    from nearfar.eventloop import LoopName

_HOST = "127.0.0.1"
_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0


class Server:
    """`benchmarks.wire_server` in a process of its own; a context manager.

    Args:
        folder: Gets certificates, identity and API key; throw-away.
        loop: Its event loop.
        is_bare: Whether it is the baseline's, or that of all the others.
        max_connections: How many it must take.

    Raises:
        EngineError: It did not start.
    """

    def __init__(
        self, folder: Path, *, loop: LoopName, is_bare: bool, max_connections: int = 64
    ) -> None:
        self.state = StateDir(folder)
        if not self.state.identity.exists():
            provision(self.state, ("localhost", _HOST))
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "benchmarks.wire_server", "raw" if is_bare else "nearfar",
                folder, str(max_connections), loop,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        self.ports: dict[str, int] = self._answer()

    def cpu_s(self) -> float:
        """Processor time of its process so far."""
        return float(self._ask("cpu"))

    def handshakes_s(self) -> float:
        """Processor time of its timed sessions so far."""
        return float(self._ask("handshakes"))

    def memory_bytes(self) -> int:
        """Resident memory of its process."""
        return int(self._ask("memory"))

    def config(self, side: str) -> CloudConfig:
        """How a client reaches one of its ports."""
        return CloudConfig(
            url=url_of(_HOST, self.ports[side]),
            identity=self.state.pin.read_text(encoding="ascii").strip(),
            credentials=f"file:{self.state.client_key}",
            ca_file=self.state.ca_certificate,
        )

    def close(self) -> None:
        """End the process; idempotent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, question: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise EngineError(
                f"The benchmark's server ended with status {self._process.returncode}",
                fix="Its last words stand above, on standard error",
            )
        return json.loads(line)


class Echo(Protocol):
    """One connection to something that gives back what it is sent."""

    @classmethod
    async def open(cls, config: CloudConfig, tls: ssl.SSLContext) -> Echo:
        """Connect; done when the first echo may be sent."""
        ...

    async def echo(self, payload: np.ndarray) -> int:
        """Send bytes and wait until the same have come back; the size of the answer sealed."""
        ...

    async def pipeline(self, payload: np.ndarray, count: int, depth: int) -> None:
        """Echo `count` times with `depth` in flight."""
        ...

    async def close(self) -> None:
        """End the connection."""
        ...


class Raw:
    """The baseline: bare websockets over TLS 1.3."""

    def __init__(self, websocket: ClientConnection) -> None:
        self._websocket = websocket

    @classmethod
    async def open(cls, config: CloudConfig, tls: ssl.SSLContext) -> Raw:
        return cls(await _connect(config, tls))

    async def echo(self, payload: np.ndarray) -> int:
        await self._websocket.send(payload.data)
        answer = await self._websocket.recv()
        _check_came_back(payload, len(answer))
        return len(answer)

    async def pipeline(self, payload: np.ndarray, count: int, depth: int) -> None:
        for _ in range(min(depth, count)):
            await self._websocket.send(payload.data)
        for done in range(count):
            await self._websocket.recv()
            if done + depth < count:
                await self._websocket.send(payload.data)

    async def close(self) -> None:
        await self._websocket.close()


class Session:
    """`ClientSession` and its transport with the least owner."""

    kind = ClientSession

    def __init__(self, websocket: ClientWebsocket, session: ClientSession) -> None:
        self._websocket = websocket
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[Received] = deque()
        self._waiter: asyncio.Future[None] = self._loop.create_future()
        self._transport = Transport(websocket, session, self, message_timeout_s=_TIMEOUT_S)
        self._transport.start()

    @classmethod
    async def open(cls, config: CloudConfig, tls: ssl.SSLContext) -> Session:
        session = cls.kind(
            pin=config.identity, token=config.token(), limits=Limits(), now_s=time.time()
        )
        websocket = await _connect(config, tls, create_connection=ClientWebsocket)
        assert isinstance(websocket, ClientWebsocket)
        side = cls(websocket, session)
        await side._next()  # `Ready`
        return side

    async def echo(self, payload: np.ndarray) -> int:
        self._send(payload)
        received = await self._next()
        _check_came_back(payload, received.tensors[0].nbytes if received.tensors else 0)
        return received.size_bytes

    async def pipeline(self, payload: np.ndarray, count: int, depth: int) -> None:
        for _ in range(min(depth, count)):
            self._send(payload)
        for done in range(count):
            await self._next()
            if done + depth < count:
                self._send(payload)

    async def close(self) -> None:
        self._session.close()
        await self._websocket.close()

    def _send(self, payload: np.ndarray) -> None:
        self._transport.send(
            Infer(
                stream=self._session.next_stream,
                request_id=os.urandom(16),
                model=MODEL,
                tensors=describe({"x": payload}),
            ),
            (payload,),
        )

    async def _next(self) -> Received:
        while not self._arrived:
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._arrived.popleft()

    def on_received(self, received: Received) -> None:
        self._arrived.append(received)
        if not self._waiter.done():
            self._waiter.set_result(None)

    def on_failed(self, error: Exception) -> None:
        if not self._waiter.done():
            self._waiter.set_exception(error)

    def on_late(self, _: str) -> None:
        self._websocket.transport.abort()

    def on_ended(self, problem: ConnectionClosed) -> None:
        self.on_failed(problem)


class Timed(Session):
    """The same with a session that keeps time of its handshake."""

    kind = TimedClientSession


class Runtime:
    """The client's own connection, as `CloudLink` uses it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        verdict = Verdict(edge=False, cloud=True, rule_ids=(), reason="benchmark", policy_hash="")
        self._permit = Permit(verdict, MODEL)

    @classmethod
    async def open(cls, config: CloudConfig, tls: ssl.SSLContext) -> Runtime:
        return cls(await Connection.open(config, client="bench", timeout_s=_TIMEOUT_S))

    async def echo(self, payload: np.ndarray) -> int:
        tensors = {"x": payload}
        stream = self._connection.open_stream(
            Infer,
            {"request_id": os.urandom(16), "model": MODEL, "tensors": describe(tensors)},
            (payload,),
            permit=self._permit,
        )
        received = await stream.reply(Deadline.after_ms(_TIMEOUT_S * 1000.0))
        _check_came_back(payload, received.tensors[0].nbytes if received.tensors else 0)
        return received.size_bytes

    async def pipeline(self, payload: np.ndarray, count: int, depth: int) -> None:
        async def some(share: int) -> None:
            for _ in range(share):
                await self.echo(payload)

        shares = [count // depth + (index < count % depth) for index in range(depth)]
        await asyncio.gather(*(some(share) for share in shares))

    async def close(self) -> None:
        await self._connection.close()


def _check_came_back(payload: np.ndarray, size_bytes: int) -> None:
    """Speeds of different work are not compared."""
    if size_bytes != payload.nbytes:
        raise EngineError(
            f"{payload.nbytes} bytes were sent but did not come back: {size_bytes} bytes did",
            fix="This is a defect in the benchmark; please report it",
        )


async def _connect(
    config: CloudConfig,
    tls: ssl.SSLContext,
    create_connection: type[ClientConnection] = ClientConnection,
) -> ClientConnection:
    return await connect(
        config.url,
        create_connection=create_connection,
        ssl=tls,
        compression=None,
        max_size=Limits().max_message_bytes,
        open_timeout=_TIMEOUT_S,
        proxy=None,
    )


#: By the name of the server's port.
SIDES: dict[str, type[Echo]] = {"raw": Raw, "session": Session, "runtime": Runtime}
