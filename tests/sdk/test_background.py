"""What a caller's thread hears of a loop that is busy."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from nearfar.errors import Cancelled, DeadlineExceeded
from nearfar.units import Deadline
from sdk.background import BackgroundLoop, result_of


@pytest.fixture
def loop():
    made = BackgroundLoop()
    yield made
    made.close()


def test_a_caller_is_told_although_the_loop_is_stuck(loop):
    free = threading.Event()
    loop.post(lambda: free.wait(10.0))  # whatever it is: the loop cannot look at its timers

    async def answer() -> str:
        return "too late"

    try:
        with pytest.raises(DeadlineExceeded) as caught:
            loop.call(answer(), Deadline.after_ms(50))
        assert not free.is_set()
    finally:
        free.set()
    assert caught.value.tried == ("cloud",)


def test_what_nobody_waits_for_any_more_is_cancelled(loop):
    ended = threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60.0)
        finally:
            ended.set()

    with pytest.raises(DeadlineExceeded):
        loop.call(work(), Deadline.after_ms(50))
    assert ended.wait(5.0)


def test_an_answer_in_time_is_the_answer_and_an_error_the_error(loop):
    async def answer() -> int:
        return 7

    async def fail() -> int:
        raise TimeoutError("its own")

    assert loop.call(answer(), Deadline.after_ms(60_000)) == 7
    assert loop.call(answer()) == 7
    with pytest.raises(TimeoutError, match="its own"):
        loop.call(fail(), Deadline.after_ms(60_000))


def test_a_loop_that_is_closed_meanwhile_says_so(loop):
    future = loop.submit(asyncio.sleep(60.0))
    threading.Timer(0.05, loop.close).start()
    with pytest.raises(Cancelled):
        result_of(future, Deadline(time.monotonic() + 60.0))
