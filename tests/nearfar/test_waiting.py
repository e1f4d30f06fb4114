"""Work that cannot be stopped, and callers that cannot wait for it."""

from __future__ import annotations

import threading

import pytest

from nearfar.errors import DeadlineExceeded, EngineError
from nearfar.units import Deadline
from nearfar.waiting import within

WORDS = {"name": "work", "tried": "edge", "while_": "while it was loaded"}


def test_without_a_deadline_it_is_done_here():
    assert within(Deadline(), threading.current_thread, **WORDS) is threading.current_thread()


def test_who_has_no_time_left_is_told_and_the_work_goes_on():
    may_end, ended = threading.Event(), threading.Event()

    def work() -> None:
        may_end.wait(10.0)
        ended.set()

    with pytest.raises(DeadlineExceeded, match="while it was loaded") as caught:
        within(Deadline.after_ms(30), work, **WORDS)
    assert caught.value.tried == ("edge",)
    assert not ended.is_set()
    may_end.set()
    assert ended.wait(5.0)


def test_what_the_work_gives_or_raises_comes_to_the_caller():
    def fail() -> None:
        raise EngineError("it is broken")

    assert within(Deadline.after_ms(60_000), lambda: 7, **WORDS) == 7
    with pytest.raises(EngineError, match="it is broken"):
        within(Deadline.after_ms(60_000), fail, **WORDS)
