"""``make autobahn``: runs the cases and compares each outcome with `expected.json`."""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import fnmatch
import json
import logging
import ssl
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

import cloud_runtime.server
from cloud_runtime.auth import Authenticator
from cloud_runtime.models import ServedModels
from cloud_runtime.provision import WEBSOCKET_PATH, provision
from cloud_runtime.server import CloudServer, GuardedConnection, tls_context
from cloud_runtime.settings import ServerSettings
from cloud_runtime.state import StateDir
from nearfar.secure.identity import ServerIdentity
from nearfar.secure.keys import KeyRing

DIRECTORY = Path(__file__).parent
#: More of these cases at once than this make each other late.
PARALLELISM = 4
#: For all cases of one server; they take one or two minutes.
LIMIT_S = 900.0
#: The cases open more connections than a test machine has clients.
SETTINGS = ServerSettings(max_connections=1000)
#: The longest messages of the cases; records of the runtime have 68 KiB at most.
MAX_ECHO_BYTES = 16 << 20


class EchoConnection(GuardedConnection):
    """The runtime's websocket, but text, which the runtime refuses, is collected and echoed."""

    _text: bytearray | None = None

    def _take(self, listener: Any, frame: Frame) -> None:
        if frame.opcode is Opcode.TEXT:
            self._text = bytearray()
        elif frame.opcode is not Opcode.CONT or self._text is None:
            super()._take(listener, frame)
            return
        assert self._text is not None
        self._text += frame.data
        if frame.fin:
            whole, self._text = bytes(self._text), None
            listener.echo(whole, is_text=True)


class Echo:
    """Sends back what comes (`nearfar.websocket.Listener`)."""

    def __init__(self, websocket: EchoConnection) -> None:
        self._websocket = websocket
        self._waiting: collections.deque[tuple[bytes, bool]] = collections.deque()
        self._closing: asyncio.Task[None] | None = None

    def message_received(self, data: bytes | bytearray) -> None:
        self.echo(bytes(data), is_text=False)

    def echo(self, data: bytes, *, is_text: bool) -> None:
        self._waiting.append((data, is_text))
        self.writing_resumed()

    def writing_resumed(self) -> None:
        websocket = self._websocket
        while self._waiting and websocket.is_writable:
            data, is_text = self._waiting.popleft()
            if not is_text:
                websocket.put(data)
                websocket.push()
            elif _is_utf8(data):
                websocket.protocol.send_text(data)
                websocket.send_data()
            else:
                self._closing = asyncio.ensure_future(websocket.close(1007))

    def text_received(self) -> None:
        raise AssertionError("`EchoConnection` takes all text")

    def message_began(self) -> None: ...

    def message_ended(self) -> None: ...

    def batch_ended(self) -> None: ...

    def writing_paused(self) -> None: ...

    def connection_ended(self, problem: ConnectionClosed) -> None: ...


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class EchoServer(CloudServer):
    """The cloud runtime's listener, with its settings; what comes goes back.

    Autobahn's cases expect an echo, and only with one do they get to what they test.
    """

    async def start(self, host: str, port: int) -> int:
        with mock.patch.multiple(
            cloud_runtime.server,
            GuardedConnection=EchoConnection,
            max_sealed_bytes=lambda _: MAX_ECHO_BYTES,
        ):
            return await super().start(host, port)

    async def _handle(self, websocket: ServerConnection) -> None:
        assert isinstance(websocket, EchoConnection)
        websocket.allowance_bytes = None
        websocket.listen(Echo(websocket))
        await websocket.wait_closed()


class Bridge:
    """Plain TCP on one side, TLS on the other: the cases do not speak TLS."""

    def __init__(self, port: int, ca: Path) -> None:
        self._port = port
        self._tls = ssl.create_default_context(cafile=str(ca))

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(
                "127.0.0.1", self._port, ssl=self._tls, server_hostname="localhost"
            )
        except OSError:
            writer.close()
            return

        async def upwards() -> None:
            if not await _pump(reader, far_writer):
                # Nobody reads any more: a case that still sends must be cut off, or it waits.
                writer.transport.abort()

        await asyncio.gather(upwards(), _pump(far_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Until one side says that it is done; `False` when one was cut off."""
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        else:
            writer.close()
        return True
    writer.close()
    return False


async def outcomes(
    kind: type[CloudServer], cases: list[str], skipped: list[str], concurrency: int
) -> list[Any]:
    """Result of every case against one kind of server."""
    from kosoku import FailureError, run_fuzzingclient

    with tempfile.TemporaryDirectory() as directory:
        state = StateDir(Path(directory) / "state")
        provision(state, ("localhost", "127.0.0.1"))
        server = kind(
            models=ServedModels([]),
            keys=KeyRing(ServerIdentity.load(state.identity), now_s=time.time()),
            authenticator=Authenticator(state.api_keys),
            tls=tls_context(state.server_chain, state.server_key),
            settings=SETTINGS,
        )
        async with server:
            bridge = Bridge(await server.start("127.0.0.1", 0), state.ca_certificate)
            async with bridge.listening() as port:
                try:
                    results = await asyncio.wait_for(
                        run_fuzzingclient(
                            f"ws://127.0.0.1:{port}{WEBSOCKET_PATH}",
                            cases=cases,
                            exclude_cases=skipped,
                            concurrency=concurrency,
                        ),
                        LIMIT_S,
                    )
                except FailureError as failure:
                    results = failure.results
                except (TimeoutError, asyncio.TimeoutError):
                    raise SystemExit(
                        f"{kind.__name__}: not done after {LIMIT_S:.0f} s. A case waits for ever; "
                        "find it with --case"
                    ) from None
            await asyncio.sleep(0.5)
            assert not server.connections, "a connection outlived its peer"
    return list(results)


def outcome_of(result: Any) -> str:
    """Verdicts on the messages and on the close, and the close code that the server sent."""
    code = result.remote_close_code or "-"
    return f"{result.behavior.value} / {result.behavior_close.value} {code}"


def explanation_of(result: Any, explained: list[dict[str, Any]]) -> str | None:
    """The reason that `expected.json` has for this outcome of this case; `None` for none."""
    for entry in explained:
        if any(fnmatch.fnmatchcase(result.case_id, cases) for cases in entry["cases"]) and any(
            fnmatch.fnmatchcase(outcome_of(result), text) for text in entry["outcomes"]
        ):
            why: str = entry["why"]
            return why
    return None


def is_explained(result: Any, explained: list[dict[str, Any]]) -> bool:
    """Whether the case passed, or `expected.json` has its outcome."""
    return result.passed or explanation_of(result, explained) is not None


async def run(kind: type[CloudServer], cases: list[str], expected: dict[str, Any]) -> list[Any]:
    """Every case; those with an unexpected outcome once more, one at a time.

    The cases have time limits of their own, which a busy machine misses.
    """
    results = {
        result.case_id: result
        for result in await outcomes(kind, cases, expected["skipped"]["cases"], PARALLELISM)
    }
    again = [n for n, found in results.items() if not is_explained(found, expected["explained"])]
    if again:
        repeated = await outcomes(kind, again, [], 1)
        results.update({result.case_id: result for result in repeated})
    return list(results.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.autobahn", description=__doc__)
    parser.add_argument("--case", action="append", help="only these, such as '5.*' (repeatable)")
    parser.add_argument("--list", action="store_true", help="print every outcome")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    is_clean = True
    for name, expected in json.loads((DIRECTORY / "expected.json").read_text()).items():
        results = asyncio.run(run(SERVERS[name], options.case or ["*"], expected))
        counts = collections.Counter(outcome_of(result) for result in results)
        passed = sum(result.passed for result in results)
        print(f"{name}: {len(results)} cases, {passed} passed")
        for outcome, count in sorted(counts.items()):
            print(f"  {count:4d}  {outcome}")
        reasons = collections.Counter(
            explanation_of(result, expected["explained"]) for result in results if not result.passed
        )
        unexpected = reasons.pop(None, 0)
        print(f"  {len(results) - passed - unexpected} explained, {unexpected} unexpected")
        for why, count in reasons.most_common():
            print(f"  {count:4d}  {why}")
        skipped = expected["skipped"]
        if skipped["cases"]:
            print(f"  not run: {', '.join(skipped['cases'])}. {skipped['why']}")
        for result in results:
            explained = is_explained(result, expected["explained"])
            if options.list or not explained:
                mark = "" if explained else "UNEXPECTED "
                print(f"  {mark}{result.case_id}: {outcome_of(result)}. {result.result}")
            is_clean = is_clean and explained
        is_clean = is_clean and bool(results)
    return 0 if is_clean else 1


SERVERS: dict[str, type[CloudServer]] = {"echo": EchoServer, "cloud runtime": CloudServer}

if __name__ == "__main__":
    sys.exit(main())
