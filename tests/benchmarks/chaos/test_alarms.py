"""Deadlines that a thread of the measured process only waits for."""

from __future__ import annotations

import time

from benchmarks.chaos.alarms import Alarms


def test_each_deadline_is_woken_for_and_not_before():
    now_s = time.monotonic()
    due_s = [now_s + 60.0, now_s + 0.08, now_s + 0.02, now_s - 1.0]
    with Alarms() as alarms:
        for one in due_s:
            alarms.at(one)
        ends_s = now_s + 10.0
        while alarms.late_ms(due_s[1]) is None and time.monotonic() < ends_s:
            time.sleep(0.005)
    late_ms = [alarms.late_ms(one) for one in due_s]
    assert late_ms[0] is None
    assert all(late is not None and late >= 0.0 for late in late_ms[1:])
    assert late_ms[3] is not None
    assert late_ms[3] >= 1000.0
