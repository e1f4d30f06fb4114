"""One websocket message out of its fragments, within a time limit; for both asyncio shells.

A peer that trickles the fragments of a message answers pings all the while, so keepalive does not
notice it. (One that trickles a single frame cannot answer pings in between, and keepalive does.)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol, Union


class FragmentSource(Protocol):
    """What is needed of a websocket; those of `websockets.asyncio` have it."""

    def recv_streaming(self) -> AsyncIterator[Union[str, bytes]]:
        """The fragments of the next message, as they come."""
        ...


async def receive_message(
    websocket: FragmentSource, *, timeout_s: float, on_late: Callable[[], None]
) -> bytes | None:
    """Wait for the next message, however long, and then for its end, within the limit.

    Args:
        websocket: Open.
        timeout_s: Seconds from the first fragment to the last.
        on_late: Called when they are over; it must cut the connection, which ends the wait.

    Returns:
        A binary message, or `None` for a text message.

    Raises:
        websockets.exceptions.ConnectionClosed: The connection has ended.
    """
    data: bytes | bytearray = b""
    is_text = False
    timer: asyncio.TimerHandle | None = None
    try:
        async for fragment in websocket.recv_streaming():
            if isinstance(fragment, str):
                is_text = True
            elif timer is None:
                data = fragment
            else:
                # One buffer: a list would spend 40 bytes on each fragment of a single byte.
                if isinstance(data, bytes):
                    data = bytearray(data)
                data += fragment
            if timer is None:
                timer = asyncio.get_running_loop().call_later(timeout_s, on_late)
    finally:
        if timer is not None:
            timer.cancel()
    if is_text:
        return None
    return data if isinstance(data, bytes) else bytes(data)
