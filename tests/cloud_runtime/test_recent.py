"""A repeated request joins the computation of the first one, within a minute and a bound."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cloud_runtime.executor import InferOutcome, Ticket
from cloud_runtime.recent import RecentRuns
from nearfar.errors import Cancelled, EngineError, InvalidInput
from tests.cloud_runtime.support import run

KEY = ("someone", b"0" * 16)


class Computations:
    """Counts what was started, and lets the test finish it."""

    def __init__(self) -> None:
        self.futures: list[asyncio.Future[InferOutcome]] = []
        self.tickets: list[Ticket] = []

    def start(self, ticket: Ticket) -> asyncio.Future[InferOutcome]:
        future = asyncio.get_running_loop().create_future()
        self.futures.append(future)
        self.tickets.append(ticket)
        return future

    async def finish(self, index: int = -1, size: int = 1) -> InferOutcome:
        outcome = InferOutcome(
            outputs={"y": np.zeros(size, np.uint8)}, queue_ms=0.0, compute_ms=1.0
        )
        self.futures[index].set_result(outcome)
        await asyncio.sleep(0)
        return outcome


def test_a_repetition_shares_the_running_computation():
    async def main() -> None:
        runs, work = RecentRuns(), Computations()
        first = runs.join(KEY, "same", work.start)
        second = runs.join(KEY, "same", work.start)
        outcome = await work.finish()
        assert (await first.future) is (await second.future) is outcome
        assert len(work.futures) == 1

    run(main())


def test_a_repetition_after_a_broken_connection_gets_what_was_computed():
    async def main() -> None:
        runs, work = RecentRuns(), Computations()
        first = runs.join(KEY, "same", work.start)
        work.tickets[0].begin()
        runs.leave(KEY, first)
        outcome = await work.finish()
        assert (await runs.join(KEY, "same", work.start).future) is outcome
        assert len(work.futures) == 1

    run(main())


def test_what_nobody_waits_for_any_more_never_begins():
    async def main() -> None:
        runs, work = RecentRuns(), Computations()
        runs.leave(KEY, runs.join(KEY, "same", work.start))
        with pytest.raises(Cancelled):
            work.tickets[0].begin()
        runs.join(KEY, "same", work.start)
        assert len(work.futures) == 2

    run(main())


def test_one_of_two_leaving_does_not_disturb_the_other():
    async def main() -> None:
        runs, work = RecentRuns(), Computations()
        first = runs.join(KEY, "same", work.start)
        runs.join(KEY, "same", work.start)
        runs.leave(KEY, first)
        work.tickets[0].begin()

    run(main())


def test_failures_are_not_remembered():
    async def main() -> None:
        runs, work = RecentRuns(), Computations()
        first = runs.join(KEY, "same", work.start)
        work.futures[0].set_exception(EngineError("broke"))
        with pytest.raises(EngineError):
            await first.future
        runs.join(KEY, "same", work.start)
        assert len(work.futures) == 2

    run(main())


def test_an_id_used_for_another_request_is_an_error():
    async def main() -> None:
        runs, work = RecentRuns(), Computations()
        runs.join(KEY, "one", work.start)
        with pytest.raises(InvalidInput, match="another request"):
            runs.join(KEY, "two", work.start)

    run(main())


def test_the_same_id_of_another_client_is_another_request():
    async def main() -> None:
        runs, work = RecentRuns(), Computations()
        runs.join(KEY, "same", work.start)
        runs.join(("someone else", KEY[1]), "same", work.start)
        assert len(work.futures) == 2

    run(main())


def test_after_a_minute_it_is_forgotten():
    async def main() -> None:
        now_s = [0.0]
        runs, work = RecentRuns(clock=lambda: now_s[0]), Computations()
        runs.join(KEY, "same", work.start)
        await work.finish()
        now_s[0] = 59.9
        runs.join(KEY, "same", work.start)
        assert len(work.futures) == 1
        now_s[0] = 60.1
        runs.join(KEY, "same", work.start)
        assert len(work.futures) == 2

    run(main())


@pytest.mark.parametrize("bound", [{"max_finished": 2}, {"max_bytes": 200}])
def test_the_oldest_are_forgotten_beyond_the_bound(bound):
    async def main() -> None:
        runs, work = RecentRuns(**bound), Computations()
        for number in range(3):
            runs.join(("someone", bytes([number])), "same", work.start)
            await work.finish(size=100)
        assert runs.held_bytes == 200
        for number in (2, 1, 0):
            runs.join(("someone", bytes([number])), "same", work.start)
        assert len(work.futures) == 4  # only number 0 was computed again

    run(main())
