"""Admission to a model: order, deadlines, limits and estimates."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from nearfar.engines import slots
from nearfar.engines.base import CancelToken
from nearfar.engines.slots import SlotGate
from nearfar.errors import Cancelled, DeadlineExceeded, EngineError, Overloaded
from nearfar.units import Deadline

PATIENCE_S = 10.0


def wait_until(condition):
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s, "it never came to that"
        time.sleep(0.001)


class Caller(threading.Thread):
    """Acquires in a thread of its own and holds until told."""

    def __init__(self, gate, deadline=None, expected_s=None, cancel=None, priority=5):
        super().__init__(daemon=True)
        self.error = self.slot = None
        self.let_go = threading.Event()
        self._arguments = (gate, deadline or Deadline(), expected_s, cancel, priority)
        waiting = gate.state().waiting
        self.start()
        wait_until(lambda: self.slot or self.error or gate.state().waiting > waiting)

    def run(self):
        gate, deadline, expected_s, cancel, priority = self._arguments
        try:
            with gate.acquire(deadline, expected_s, cancel=cancel, priority=priority) as self.slot:
                self.let_go.wait(PATIENCE_S)
        except Exception as error:
            self.error = error

    def finish(self):
        self.let_go.set()
        self.join(PATIENCE_S)


def test_slots_are_given_in_the_order_of_asking():
    gate = SlotGate(1, 8)
    first, *others = [Caller(gate) for _ in range(4)]
    holders = [first, *others]
    for position, holder in enumerate(holders):
        wait_until(lambda holder=holder: holder.slot)
        assert [one.slot is not None for one in holders] == [n <= position for n in range(4)]
        holder.finish()
    assert gate.state().running == 0


def order_of(gate, priorities, pause_s=0.0):
    """Priorities in the order in which those who asked in the given order got the one slot."""
    slot = gate.acquire()
    callers = []
    for priority in priorities:
        callers.append(Caller(gate, priority=priority))
        time.sleep(pause_s)
    slot.release()
    served = []
    while callers:
        wait_until(lambda: any(caller.slot for caller in callers))
        (caller,) = [caller for caller in callers if caller.slot]
        callers.remove(caller)
        served.append(caller._arguments[4])
        caller.finish()
    return served


def test_a_higher_priority_goes_first_and_equal_ones_in_the_order_of_asking():
    assert order_of(SlotGate(1, 16), [5, 0, 9, 5, 9, 3]) == [9, 9, 5, 5, 3, 0]


def test_waiting_lifts_a_low_priority_above_later_high_ones(monkeypatch):
    monkeypatch.setattr(slots, "_AGEING_S", 0.001)
    assert order_of(SlotGate(1, 16), [0, 9, 5], pause_s=0.02) == [0, 9, 5]


def test_a_stream_of_urgent_requests_starves_nobody(monkeypatch):
    monkeypatch.setattr(slots, "_AGEING_S", 0.01)
    gate = SlotGate(1, 16)
    holder = Caller(gate)
    background = Caller(gate, priority=0)
    for _ in range(200):
        urgent = Caller(gate, priority=9)
        holder.finish()
        wait_until(lambda urgent=urgent: urgent.slot or background.slot)
        if background.slot:
            break
        holder = urgent
        time.sleep(0.005)
    assert background.slot
    background.finish()
    urgent.finish()


def test_as_many_run_as_there_are_slots():
    gate = SlotGate(2, 8)
    callers = [Caller(gate) for _ in range(3)]
    assert [caller.slot is not None for caller in callers] == [True, True, False]
    assert (gate.state().running, gate.state().waiting) == (2, 1)
    for caller in callers:
        caller.finish()


@pytest.mark.parametrize("places", [1, 3])
def test_under_contention_no_place_is_lost_or_given_twice(places, monkeypatch):
    gate = SlotGate(places, 64)
    held, most, done = [], [], []
    switch_s = sys.getswitchinterval()
    monkeypatch.setattr(slots, "monotonic", lambda: time.sleep(0) or time.monotonic())

    def work():
        for _ in range(300):
            slot = gate.acquire(Deadline.after_ms(PATIENCE_S * 1000))
            held.append(slot)
            most.append(len(held))
            held.remove(slot)
            slot.release()
        done.append(True)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    try:
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    finally:
        sys.setswitchinterval(switch_s)
    assert len(done) == len(threads)
    assert max(most) <= places
    assert (gate.state().running, gate.state().waiting) == (0, 0)
    assert [gate.try_acquire() is not None for _ in range(places + 1)] == [True] * places + [False]


def test_more_than_may_wait_are_refused_at_once():
    gate = SlotGate(1, 1, name="assistant")
    running, waiting = Caller(gate), Caller(gate)
    with pytest.raises(Overloaded, match="'assistant' has 1 calls running and 1 waiting"):
        gate.acquire()
    running.finish()
    waiting.finish()


def test_a_deadline_ends_waiting_and_leaves_the_queue():
    gate = SlotGate(1, 8)
    with gate.acquire():
        started_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            gate.acquire(Deadline.after_ms(50))
        assert 0.04 < time.monotonic() - started_s < PATIENCE_S
        assert gate.state().waiting == 0
    with gate.acquire():
        pass


def test_a_passed_deadline_gets_no_slot_even_when_one_is_free():
    gate = SlotGate(1, 8)
    with pytest.raises(DeadlineExceeded):
        gate.acquire(Deadline(time.monotonic() - 1))
    assert gate.state().running == 0


def test_a_freed_slot_skips_those_whose_deadline_has_passed(monkeypatch):
    gate = SlotGate(1, 8)
    slot = gate.acquire()
    late = Caller(gate, Deadline.after_ms(30_000))
    patient = Caller(gate)
    now_s = time.monotonic
    with monkeypatch.context() as patch:
        patch.setattr(slots, "monotonic", lambda: now_s() + 60)
        slot.release()
        wait_until(lambda: patient.slot)
    assert late.slot is None
    assert gate.state().running == 1
    patient.finish()


def test_cancelling_ends_waiting():
    gate = SlotGate(1, 8)
    cancel = CancelToken()
    with gate.acquire():
        caller = Caller(gate, cancel=cancel)
        cancel.cancel()
        caller.join(PATIENCE_S)
    assert isinstance(caller.error, Cancelled)
    assert gate.state().waiting == 0


def test_releasing_twice_frees_one_slot_only():
    gate = SlotGate(1, 8)
    slot = gate.acquire()
    slot.release()
    with gate.acquire():
        slot.release()
        assert gate.state().running == 1


def test_an_error_in_the_work_gives_the_slot_back():
    gate = SlotGate(1, 8)
    with pytest.raises(ZeroDivisionError), gate.acquire():
        raise ZeroDivisionError
    assert gate.state().running == 0


def test_a_slot_may_be_given_back_by_another_thread():
    gate = SlotGate(1, 8)
    slot = gate.acquire()
    thread = threading.Thread(target=slot.release)
    thread.start()
    thread.join(PATIENCE_S)
    assert gate.state().running == 0


def test_closing_sends_the_waiting_away_and_refuses_the_next():
    gate = SlotGate(1, 8)
    slot = gate.acquire()
    caller = Caller(gate)
    gate.close()
    caller.join(PATIENCE_S)
    assert isinstance(caller.error, Cancelled)
    with pytest.raises(EngineError, match="closed"):
        gate.acquire()
    assert not gate.join(0.01)
    slot.release()
    assert gate.join(PATIENCE_S)


def test_a_caller_learns_how_long_it_waited():
    gate = SlotGate(1, 8)
    slot = gate.acquire()
    assert slot.queue_s == 0
    caller = Caller(gate)
    time.sleep(0.05)
    slot.release()
    wait_until(lambda: caller.slot)
    assert 0.05 <= caller.slot.queue_s < PATIENCE_S
    caller.finish()


def test_no_wait_is_expected_while_a_slot_is_free():
    gate = SlotGate(2, 8)
    with gate.acquire(expected_s=100.0):
        assert gate.state().expected_wait_s == 0


def test_expected_wait_is_what_remains_of_running_and_queued_work():
    gate = SlotGate(1, 8)
    with gate.acquire(expected_s=100.0):
        assert gate.state().expected_wait_s == pytest.approx(100, abs=5)
        caller = Caller(gate, expected_s=30.0)
        assert gate.state().expected_wait_s == pytest.approx(130, abs=5)
    caller.finish()


def test_queued_work_goes_to_the_slot_that_is_free_first():
    gate = SlotGate(2, 8)
    with gate.acquire(expected_s=100.0), gate.acquire(expected_s=10.0):
        caller = Caller(gate, expected_s=20.0)
        assert gate.state().expected_wait_s == pytest.approx(30, abs=5)
    caller.finish()


def test_work_without_estimate_is_expected_to_take_as_long_as_earlier_work(monkeypatch):
    gate = SlotGate(1, 8)
    now_s = time.monotonic
    shift_s = 0.0
    monkeypatch.setattr(slots, "monotonic", lambda: now_s() + shift_s)
    with gate.acquire():
        shift_s = 8.0
    with gate.acquire():
        assert gate.state().expected_wait_s == pytest.approx(8, abs=1)


def test_overdue_work_is_expected_to_take_longer_the_longer_it_overran(monkeypatch):
    gate = SlotGate(1, 8)
    now_s = time.monotonic
    shift_s = 0.0
    monkeypatch.setattr(slots, "monotonic", lambda: now_s() + shift_s)
    with gate.acquire(expected_s=1.0):
        shift_s = 40.0
        assert gate.state().expected_wait_s == pytest.approx(10, abs=1)


def test_many_threads_never_hold_more_slots_than_there_are():
    gate = SlotGate(3, 100)
    lock, running, most, errors = threading.Lock(), 0, 0, []

    def work():
        nonlocal running, most
        try:
            for _ in range(50):
                with gate.acquire(Deadline.after_ms(60_000)):
                    with lock:
                        running += 1
                        most = max(most, running)
                    time.sleep(0)
                    with lock:
                        running -= 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert 1 <= most <= 3
    assert (gate.state().running, gate.state().waiting) == (0, 0)


def test_trying_gives_a_slot_only_when_nobody_has_to_wait():
    gate = SlotGate(1, 8)
    with gate.try_acquire():
        assert gate.try_acquire() is None
        caller = Caller(gate)
    wait_until(lambda: caller.slot)
    assert gate.try_acquire() is None
    caller.finish()
    gate.close()
    assert gate.try_acquire() is None


def test_a_slot_says_how_long_it_was_held():
    gate = SlotGate(1, 8)
    with gate.acquire() as slot:
        assert slot.held_s == 0
        time.sleep(0.02)
    assert 0.02 <= slot.held_s < PATIENCE_S


def test_a_slot_is_had_at_once_or_not_at_all():
    gate = SlotGate(1, 4)
    slot = gate.try_acquire()
    assert slot is not None
    assert gate.try_acquire() is None
    assert gate.state().waiting == 0
    slot.release()
    with gate.try_acquire() as again:
        assert again.queue_s == 0.0
    gate.close()
    assert gate.try_acquire() is None
