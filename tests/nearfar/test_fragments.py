"""A message that begins must end, in time; in whatever pieces it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from nearfar.fragments import receive_message
from nearfar.watchdog import Watchdog


class Cut(Exception):
    """Stands for ConnectionClosed."""


class Websocket:
    """Gives prepared fragments, one every so many seconds, until it is cut."""

    def __init__(self, *fragments: bytes | str, pause_s: float = 0.0, first_s: float = 0.0) -> None:
        self._fragments = fragments
        self._pause_s = pause_s
        self._first_s = first_s
        self.is_cut = False

    async def recv_streaming(self) -> AsyncIterator[bytes | str]:
        await asyncio.sleep(self._first_s)
        for fragment in self._fragments:
            if self.is_cut:
                raise Cut
            yield fragment
            await asyncio.sleep(self._pause_s)

    def cut(self) -> None:
        self.is_cut = True


def receive(websocket: Websocket, timeout_s: float = 0.2) -> bytes | None:
    async def body() -> bytes | None:
        watchdog = Watchdog(timeout_s, websocket.cut)
        try:
            return await receive_message(websocket, watchdog)
        finally:
            watchdog.close()

    return asyncio.run(body())


@pytest.mark.parametrize("parts", [[b""], [b"whole"], [b"", b"ab", b"", b"c"], [b"x"] * 1000])
def test_fragments_are_joined(parts: list[bytes]) -> None:
    message = receive(Websocket(*parts), timeout_s=10)
    assert message == b"".join(parts)
    assert type(message) is bytes


def test_text_is_told_apart() -> None:
    assert receive(Websocket("text")) is None


def test_a_message_that_trickles_is_cut_in_time() -> None:
    started_s = time.monotonic()
    with pytest.raises(Cut):
        receive(Websocket(*[b"x"] * 10_000, pause_s=0.005))
    assert time.monotonic() - started_s < 5


def test_waiting_for_the_first_fragment_takes_as_long_as_it_takes() -> None:
    websocket = Websocket(b"late", first_s=0.3)
    assert receive(websocket, timeout_s=0.1) == b"late"
    assert not websocket.is_cut
