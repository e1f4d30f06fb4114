"""Wait for work that cannot be stopped, but no longer than until a deadline."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

from nearfar.units import Deadline, exceeded

T = TypeVar("T")


def within(deadline: Deadline, work: Callable[[], T], *, name: str, tried: str, while_: str) -> T:
    """Do some work, in a thread of its own where there is a deadline.

    Loading a model takes seconds and cannot be ended half-way. Who has no time left is told so; the
    work goes on, and the next one finds it done.

    Args:
        deadline: Until when to wait.
        work: What to do; must bear being done although nobody waits any more.
        name: Of the thread.
        tried: Route, for the error.
        while_: When the deadline passed, in words, for the error.

    Raises:
        DeadlineExceeded: The work was not done in time.
        BaseException: What the work raises.
    """
    if not deadline.is_set:
        return work()
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            done = work()
        except BaseException as error:  # noqa: BLE001 (crosses to the thread that waits)
            future.set_exception(error)
        else:
            future.set_result(done)

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        return future.result(deadline.timeout_s())
    except concurrent.futures.TimeoutError:
        if future.done():  # it ended just now, or the error is its own
            return future.result()
        raise exceeded(tried, while_=while_) from None
