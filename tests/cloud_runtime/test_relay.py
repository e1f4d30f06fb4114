"""From the generating thread to the event loop: in order, bounded, and always with an end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cloud_runtime.relay import Completion, TokenRelay
from nearfar.errors import Cancelled, EngineError, Overloaded
from nearfar.generation import GenerationChunk, Usage
from nearfar.units import Deadline
from tests.cloud_runtime.support import run, until

DONE = Completion(
    finish_reason="stop",
    usage=Usage(prompt_tokens=1, completion_tokens=1),
    queue_ms=0.0,
    prefill_ms=0.0,
    decode_ms=0.0,
)


def chunk(index: int) -> GenerationChunk:
    return GenerationChunk(index=index, text=f"t{index}")


def write(
    relay: TokenRelay, count: int, outcome: Completion | Exception = DONE
) -> threading.Thread:
    def work() -> None:
        try:
            for index in range(count):
                if not relay.put(chunk(index)):
                    return
            relay.end(outcome)
        except Overloaded as error:
            relay.end(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


async def read_all(relay: TokenRelay, available: int) -> list[int]:
    indices = []
    while relay.outcome is None:
        indices += [found.index for found in await relay.read(available)]
    return indices


@pytest.mark.parametrize("available", [1, 3, 1000])
def test_every_chunk_arrives_once_and_in_order(available):
    async def main() -> None:
        relay = TokenRelay(asyncio.get_running_loop(), ahead_tokens=8)
        thread = write(relay, 500)
        assert await read_all(relay, available) == list(range(500))
        assert relay.outcome is DONE
        thread.join()

    run(main())


def test_chunks_before_an_error_are_delivered_before_it():
    async def main() -> None:
        relay = TokenRelay(asyncio.get_running_loop())
        failure = EngineError("broke")
        write(relay, 3, failure).join()
        assert relay.outcome is None
        assert await read_all(relay, 2) == [0, 1, 2]
        assert relay.outcome is failure

    run(main())


def test_without_credit_the_thread_runs_ahead_so_far_and_waits():
    async def main() -> None:
        relay = TokenRelay(asyncio.get_running_loop(), ahead_tokens=4)
        thread = write(relay, 100)
        await until(lambda: len(relay._chunks) == 4)
        await asyncio.sleep(0.05)
        assert thread.is_alive()
        assert [found.index for found in await relay.read(100)] == [0, 1, 2, 3]
        assert await read_all(relay, 100) == list(range(4, 100))
        thread.join()

    run(main())


def test_a_nudge_lets_a_reader_without_credit_look_again():
    async def main() -> None:
        relay = TokenRelay(asyncio.get_running_loop())
        reading = asyncio.create_task(relay.read(0))
        await asyncio.sleep(0)
        relay.nudge()
        assert await reading == []
        assert relay.outcome is None

    run(main())


def test_a_reader_that_takes_nothing_loses_its_stream():
    async def main() -> None:
        relay = TokenRelay(asyncio.get_running_loop(), ahead_tokens=2, stall_s=0.05)
        thread = write(relay, 10)
        await until(lambda: not thread.is_alive())
        assert await read_all(relay, 10) == [0, 1]
        assert isinstance(relay.outcome, Overloaded)

    run(main())


def test_a_waiting_thread_gives_up_at_the_deadline():
    async def main() -> None:
        deadline = Deadline.after_ms(50)
        relay = TokenRelay(asyncio.get_running_loop(), deadline=deadline, ahead_tokens=1)
        thread = write(relay, 10)
        await until(lambda: not thread.is_alive())

    run(main())


def test_an_abort_wakes_the_reader_stops_the_thread_and_drops_what_is_unread():
    async def main() -> None:
        relay = TokenRelay(asyncio.get_running_loop(), ahead_tokens=2)
        thread = write(relay, 10)
        await until(lambda: relay._chunks)
        cancelled = Cancelled("enough")
        relay.abort(cancelled)
        assert relay.cancel.is_cancelled
        assert await relay.read(10) == []
        assert relay.outcome is cancelled
        await until(lambda: not thread.is_alive())

    run(main())


def test_an_abort_after_the_end_changes_nothing():
    async def main() -> None:
        relay = TokenRelay(asyncio.get_running_loop())
        write(relay, 0).join()
        relay.abort(Cancelled("late"))
        assert relay.outcome is DONE

    run(main())


def test_a_thread_that_outlives_the_loop_is_told_to_stop():
    loop = asyncio.new_event_loop()
    relay = TokenRelay(loop)
    loop.close()
    relay.put(chunk(0))
    assert relay.cancel.is_cancelled


def test_the_thread_gives_way_until_the_loop_has_sent_each_token(monkeypatch):
    monkeypatch.setattr("cloud_runtime.relay.GIVE_WAY_S", 30.0)
    sent: list[int] = []
    seen_after_put: list[int] = []

    async def main() -> None:
        relay = TokenRelay(asyncio.get_running_loop())

        def work() -> None:
            for index in range(20):
                relay.put(chunk(index))
                seen_after_put.append(len(sent))
            relay.end(DONE)

        thread = threading.Thread(target=work)
        thread.start()
        while relay.outcome is None:
            for _ in await relay.read(100):
                await asyncio.sleep(0.001)  # sending takes a moment
                sent.append(1)
        thread.join()

    run(main())
    assert seen_after_put == list(range(1, 21))
