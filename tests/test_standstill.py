"""The watch that lets a test run again where the machine stood still."""

from __future__ import annotations

import time

import pytest

from tests.support.standstill import STOOD_STILL_S, StandstillWatch


@pytest.fixture
def watch():
    watch = StandstillWatch()
    watch.start()
    yield watch
    watch.close()


def test_an_interpreter_that_is_held_stands_still(watch):
    watch.begin()
    held_s, size = 0.0, 10_000_000
    while held_s < 2 * STOOD_STILL_S:
        began_s = time.monotonic()
        sum(range(size))  # one call in C, which keeps the interpreter's lock
        held_s = time.monotonic() - began_s
        size *= 2
    time.sleep(0.1)
    assert watch.stood_still()


def test_what_was_before_a_test_is_forgotten(watch):
    watch._latest_s = dict.fromkeys(watch._latest_s, 1.0)
    assert watch.stood_still()
    watch.begin()
    assert max(watch._latest_s.values()) < 1.0
