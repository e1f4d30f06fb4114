"""The listening server: TLS, websockets, health checks, limits, and an orderly end."""

from __future__ import annotations

import asyncio
import http
import ipaddress
import logging
import math
import ssl
import time
from pathlib import Path

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response

from cloud_runtime.answers import Answers
from cloud_runtime.auth import Authenticator
from cloud_runtime.connection import Connection, ServerWebsocket, Services
from cloud_runtime.models import ServedModels
from cloud_runtime.provision import WEBSOCKET_PATH
from cloud_runtime.recent import RecentRuns
from cloud_runtime.settings import ServerSettings
from nearfar.errors import ConfigError
from nearfar.secure.keys import KeyRing
from nearfar.session import max_sealed_bytes
from nearfar.websocket import Buffer

logger = logging.getLogger(__name__)


class GuardedConnection(ServerWebsocket):
    """A websocket that may send little before its client is admitted.

    The size limit for messages must fit tensors, and cannot be changed on an open websocket; a
    stranger must not be able to make us hold that much.
    """

    #: Bytes that may still come; `None` once the client is admitted. Enough for the HTTP request,
    #: the handshake and `Auth`, each at its own limit.
    allowance_bytes: int | None = 256 * 1024

    def data_received(self, data: Buffer) -> None:
        """Called by asyncio with what came from the socket."""
        if self.allowance_bytes is not None:
            self.allowance_bytes -= len(data)
            if self.allowance_bytes < 0:
                self.transport.abort()
                return
        super().data_received(data)


def tls_context(chain: Path, key: Path) -> ssl.SSLContext:
    """Server side of TLS 1.3, and of nothing older.

    Raises:
        ConfigError: A file is missing, or the two do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(chain, key)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(
            f"TLS certificate {chain} with key {key} cannot be used: {exc}",
            field="certificate",
            fix="Make them with `nearfar cloud init`, or point --certificate and --certificate-key "
            "to a PEM chain and its key",
        ) from exc
    return context


class CloudServer:
    """Serves models to nearfar clients; an async context manager.

    Args:
        models: Loaded and ready; not closed by the server.
        keys: The server's key configurations.
        authenticator: Decides who is let in.
        tls: From `tls_context`.
        settings: Limits and time limits.

    Attributes:
        connections: Those that are open.
    """

    def __init__(
        self,
        *,
        models: ServedModels,
        keys: KeyRing,
        authenticator: Authenticator,
        tls: ssl.SSLContext,
        settings: ServerSettings = ServerSettings(),  # noqa: B008 (frozen)
    ) -> None:
        self._services = Services(
            models=models,
            keys=keys,
            authenticator=authenticator,
            recent=RecentRuns(),
            answers=Answers(settings.retention),
            settings=settings,
        )
        self._tls = tls
        self._serves_with = _connection_class(settings)
        self._settings = settings
        self.connections: set[Connection] = set()
        self._server: Server | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._is_draining = False

    async def start(self, host: str, port: int) -> int:
        """Begin to listen.

        Args:
            host: Address to bind; an empty one binds all.
            port: 0 lets the system choose.

        Returns:
            The port.

        Raises:
            ConfigError: The address cannot be bound.
        """
        settings = self._settings
        # websockets logs frames, which hold ciphertext, at DEBUG, and every port scanner's failed
        # handshake with a stack trace at ERROR. What matters is logged by `Connection`.
        quiet = logging.getLogger("cloud_runtime.websockets")
        quiet.setLevel(logging.CRITICAL)
        try:
            self._server = await serve(
                self._handle,
                host or None,
                port,
                ssl=self._tls,
                ssl_handshake_timeout=settings.handshake_timeout_s,
                compression=None,  # ciphertext does not compress; compressing it could leak
                create_connection=GuardedConnection,
                process_request=self._process_request,
                server_header=None,
                open_timeout=settings.handshake_timeout_s,
                ping_interval=settings.ping_interval_s,
                ping_timeout=settings.ping_timeout_s,
                close_timeout=settings.close_timeout_s,
                max_size=max_sealed_bytes(settings.limits),
                logger=quiet,
            )
        except OSError as exc:
            raise ConfigError(
                f"Cannot listen on {host or '*'}:{port}: {exc.strerror or exc}",
                field="listen",
                fix="Choose another --listen address, or --port 0 for any free port",
            ) from exc
        self._watcher = asyncio.create_task(self._watch_keys())
        sockets = list(self._server.sockets)
        bound: int = sockets[0].getsockname()[1]
        return bound

    async def drain(self) -> None:
        """Take no new streams, finish the open ones for up to `drain_s`, close all connections."""
        self._is_draining = True
        self._services.answers.close()  # nobody can come back for them any more
        draining = [asyncio.create_task(found.drain()) for found in set(self.connections)]
        if draining:
            _, late = await asyncio.wait(draining, timeout=self._settings.drain_s)
            for task in late:
                task.cancel()
            if late:
                logger.warning("%d connections were cut after the drain time", len(late))

    async def close(self) -> None:
        """Stop listening and end what is still open."""
        self._is_draining = True
        self._services.answers.close()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def __aenter__(self) -> CloudServer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _process_request(self, websocket: ServerConnection, request: Request) -> Response | None:
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return websocket.respond(http.HTTPStatus.OK, "ok\n")
        if path == "/readyz":
            if self._is_draining:
                return websocket.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "draining\n")
            return websocket.respond(http.HTTPStatus.OK, "ready\n")
        if path != WEBSOCKET_PATH:
            return websocket.respond(
                http.HTTPStatus.NOT_FOUND, f"Not found. The websocket is at {WEBSOCKET_PATH}\n"
            )
        if self._is_draining:
            return websocket.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "Shutting down.\n")
        if len(self.connections) >= self._settings.max_connections:
            logger.warning("a client was turned away: %d connections", len(self.connections))
            return websocket.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "Too many clients.\n")
        strangers = sum(
            found.key is None and found.address == _address_of(websocket)
            for found in self.connections
        )
        if strangers >= self._settings.max_strangers_per_address:
            logger.warning("an address was turned away: %d of its clients shake hands", strangers)
            return websocket.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE, "Too many handshakes at once.\n"
            )
        return None

    async def _handle(self, websocket: ServerConnection) -> None:
        assert isinstance(websocket, GuardedConnection)

        def lift() -> None:
            websocket.allowance_bytes = None

        connection = self._serves_with(
            websocket, self._services, address=_address_of(websocket), on_ready=lift
        )
        self.connections.add(connection)
        try:
            await connection.run()
        finally:
            self.connections.discard(connection)

    async def _watch_keys(self) -> None:
        """Close the connections of withdrawn API keys; keep key configurations fresh.

        A connection whose token has expired is told to go: it opens no more streams, and its client
        comes back with a fresh token.
        """
        authenticator = self._services.authenticator
        revision = authenticator.revision
        leaving: dict[Connection, asyncio.Task[None]] = {}
        while True:
            await asyncio.sleep(self._settings.key_check_s)
            now_s = time.time()
            self._services.keys.current(now_s)  # drops expired private keys while idle, too
            leaving = {found: task for found, task in leaving.items() if not task.done()}
            for connection in self.connections - leaving.keys():
                caller = connection.key
                if caller is not None and (caller.expires_s or math.inf) <= now_s:
                    leaving[connection] = asyncio.create_task(connection.drain("token expired"))
            authenticator.reload_if_changed()
            if authenticator.revision == revision:
                continue
            revision = authenticator.revision
            withdrawn = [
                asyncio.create_task(connection.withdraw())
                for connection in set(self.connections)
                if connection.key is not None and not authenticator.is_accepted(connection.key)
            ]
            if withdrawn:
                logger.info("%d connections end: their API keys were withdrawn", len(withdrawn))
                await asyncio.wait(withdrawn, timeout=self._settings.close_timeout_s)


def _connection_class(settings: ServerSettings) -> type[Connection]:
    """What serves the connections.

    Raises:
        ConfigError: Telemetry is asked for, and OpenTelemetry is not installed.
    """
    if not settings.telemetry:
        return Connection
    from nearfar.telemetry import require

    require()
    from cloud_runtime.telemetry import TracedConnection

    return TracedConnection


def _address_of(websocket: ServerConnection) -> str:
    """Where a client comes from, as far as limits go: IPv6 hosts own a /64."""
    remote = websocket.remote_address
    if not remote:
        return ""
    host = str(remote[0])
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 6 and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return host
