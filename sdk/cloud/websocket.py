"""The client's end of a websocket; imported with the first connection, as the library is heavy."""

from __future__ import annotations

from websockets.asyncio.client import ClientConnection

from nearfar.websocket import DirectConnection


class ClientWebsocket(DirectConnection, ClientConnection):
    """For `websockets.asyncio.client.connect(…, create_connection=ClientWebsocket)`."""
