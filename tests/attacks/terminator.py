"""A proxy that terminates TLS, as companies and load balancers do, and writes down what it sees."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

from cloud_runtime.server import tls_context
from cloud_runtime.state import StateDir


class Terminator:
    """Ends the client's TLS with a certificate the client trusts, and opens its own to the server.

    Attributes:
        port: Where it listens.
        from_client: Every byte of plaintext that clients sent, over all connections.
        from_server: The same of the server.
    """

    def __init__(self, state: StateDir, server_port: int, server_ca: Path) -> None:
        self.port = 0
        self.from_client = bytearray()
        self.from_server = bytearray()
        self._tls = tls_context(state.server_chain, state.server_key)
        self._server_port = server_port
        self._server_tls = ssl.create_default_context(cafile=str(server_ca))

    @property
    def seen(self) -> bytes:
        return bytes(self.from_client) + bytes(self.from_server)

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Terminator]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        try:
            self.port = server.sockets[0].getsockname()[1]
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(
            "127.0.0.1", self._server_port, ssl=self._server_tls, server_hostname="localhost"
        )
        await asyncio.gather(
            self._pump(reader, far_writer, self.from_client),
            self._pump(far_reader, writer, self.from_server),
        )

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: bytearray
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                seen += data
                writer.write(data)
                await writer.drain()
        writer.close()
