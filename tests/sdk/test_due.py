"""Calls of the device end with their deadline."""

from __future__ import annotations

import threading
import time

import pytest

from nearfar.engines.base import CancelToken
from nearfar.errors import DeadlineExceeded
from sdk.due import _FIRST_LEAD_S, _MAX_ENDED, _MAX_LEAD_S, DeadlineWatch
from tests.support.two_routes import X


def wait_until(holds, within_s: float = 5.0) -> None:
    ends_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < ends_s
        time.sleep(0.002)


def test_what_runs_at_its_deadline_is_cancelled_and_not_before():
    watch, late, early = DeadlineWatch(), CancelToken(), CancelToken()
    at_s = time.monotonic() + 0.15
    cancelled_s = []
    early.on_cancel(lambda: cancelled_s.append(time.monotonic()))
    with watch.watch(time.monotonic() + 60.0, late) as other, watch.watch(at_s, early) as call:
        wait_until(lambda: early.is_cancelled)
        assert not late.is_cancelled
    assert cancelled_s[0] >= at_s - _FIRST_LEAD_S
    assert (call.is_stopped, other.is_stopped) == (True, False)


def test_a_call_is_told_so_much_earlier_as_stopping_took_the_last_ones():
    watch = DeadlineWatch()
    for _ in range(2):
        at_s = time.monotonic() + 1.0
        with watch.watch(at_s, CancelToken()) as call:
            wait_until(lambda call=call: call.is_stopped)
            time.sleep(0.03)  # an operator that takes its time
    # When that thread then gets a processor is the machine's affair.
    assert call._stop_at_s == pytest.approx(at_s - _MAX_LEAD_S)


def test_a_call_with_little_time_loses_little_of_it():
    watch = DeadlineWatch()
    watch.took(60.0)
    now_s = time.monotonic()
    with watch.watch(now_s + 0.1, CancelToken()) as call:
        assert call._stop_at_s > now_s + 0.09
    with watch.watch(now_s - 1.0, CancelToken()) as call:
        assert call._stop_at_s == now_s - 1.0


def test_a_lead_that_is_not_needed_any_more_goes_away():
    watch = DeadlineWatch()
    watch.took(0.02)
    for _ in range(40):
        watch.took(0.001)
    with watch.watch(time.monotonic() + 60.0, CancelToken()) as call:
        assert watch._due[-1][2] is call
        assert 0.0 < watch._lead_s < 0.002


def test_what_ended_is_left_alone_and_forgotten():
    watch, token = DeadlineWatch(), CancelToken()
    with watch.watch(time.monotonic() + 0.02, token):
        pass
    for _ in range(_MAX_ENDED + 1):
        with watch.watch(time.monotonic() + 600.0, CancelToken()):
            pass
    assert len(watch._due) <= _MAX_ENDED
    time.sleep(0.05)
    assert not token.is_cancelled


def test_many_threads_are_each_stopped_at_their_own_time():
    watch = DeadlineWatch()
    order: list[int] = []

    def call(number: int) -> None:
        token = CancelToken()
        token.on_cancel(lambda: order.append(number))
        with watch.watch(begin_s + 0.05 * (5 - number), token):
            wait_until(lambda: token.is_cancelled)

    begin_s = time.monotonic() + 0.1
    threads = [threading.Thread(target=call, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(order)) == [0, 1, 2, 3, 4]
    assert order.index(4) < order.index(0)


def test_a_device_that_computes_past_the_deadline_is_stopped_there(both):
    both.device.pause_s = 5.0
    started_s = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        both.infer("tensor", X, mode="edge_only", deadline_ms=150)
    assert time.monotonic() - started_s < 2.0
    assert caught.value.tried == ("edge",)
    assert both.device.cancelled == 1
