"""What tests of a real server on loopback ask it, and how."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from websockets.asyncio.client import connect

from nearfar.errors import NearfarError
from tests.cloud_runtime.support import ScriptedModel, WireClient, client_tls

X = np.arange(8, dtype=np.float32).reshape(2, 4)
CANARY = "canary-7f3a"


def chat(**options) -> ScriptedModel:
    return ScriptedModel("chat", task="text-generation", **options)


async def refusal(server, **options) -> NearfarError:
    with pytest.raises(NearfarError) as caught:
        async with WireClient.connect(server, **options):
            pass
    return caught.value


async def raw_websocket(server):
    return await connect(server.url, ssl=client_tls(server.state), compression=None, proxy=None)


def http_status(server, path: str) -> str:
    """Status line and body of a plain GET, as a load balancer would send it."""
    host, port = server.url.removeprefix("wss://").partition("/")[0].rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), 5) as plain,
        client_tls(server.state).wrap_socket(plain, server_hostname=host) as secure,
    ):
        secure.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        answer = b""
        while data := secure.recv(4096):
            answer += data
    return answer.decode().replace("\r\n", "\n")
