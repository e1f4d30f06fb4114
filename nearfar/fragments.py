"""One websocket message out of its fragments, within a time limit; for both asyncio shells.

A peer that trickles the fragments of a message answers pings all the while, so keepalive does not
notice it. (One that trickles a single frame cannot answer pings in between, and keepalive does.)
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol, Union

from nearfar.watchdog import Watchdog


class FragmentSource(Protocol):
    """What is needed of a websocket; those of `websockets.asyncio` have it."""

    def recv_streaming(self) -> AsyncIterator[Union[str, bytes]]:
        """The fragments of the next message, as they come."""
        ...


async def receive_message(websocket: FragmentSource, watchdog: Watchdog) -> bytes | None:
    """Wait for the next message, however long, and then for its end, within the limit.

    Args:
        websocket: Open.
        watchdog: Its limit runs from the first fragment to the last; when it is late it must cut
            the connection, which ends the wait.

    Returns:
        A binary message, or `None` for a text message.

    Raises:
        websockets.exceptions.ConnectionClosed: The connection has ended.
    """
    data: bytes | bytearray = b""
    is_text = False
    is_first = True
    try:
        async for fragment in websocket.recv_streaming():
            if isinstance(fragment, str):
                is_text = True
            elif is_first:
                data = fragment
            else:
                # One buffer: a list would spend 40 bytes on each fragment of a single byte.
                if isinstance(data, bytes):
                    data = bytearray(data)
                data += fragment
            if is_first:
                is_first = False
                watchdog.begin()
    finally:
        watchdog.end()
    if is_text:
        return None
    return data if isinstance(data, bytes) else bytes(data)
