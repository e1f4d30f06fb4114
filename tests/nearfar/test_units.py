"""Deadlines and numbers for people."""

from __future__ import annotations

import math

import pytest

from nearfar.errors import DeadlineExceeded, InvalidInput
from nearfar.units import Deadline, format_bytes, format_ms


def test_no_deadline_never_passes():
    deadline = Deadline.after_ms(None)
    assert not deadline.is_set
    assert deadline.remaining_s() == math.inf
    assert deadline.timeout_s() is None
    deadline.check("edge")


def test_passed_deadline_says_what_was_tried():
    deadline = Deadline(at_s=0.0)
    assert deadline.remaining_ms() == 0.0
    with pytest.raises(DeadlineExceeded) as caught:
        deadline.check("cloud", "edge")
    assert caught.value.tried == ("cloud", "edge")


@pytest.mark.parametrize("bad", [0, -1, math.nan])
def test_deadline_must_be_positive(bad):
    with pytest.raises(InvalidInput, match="deadline_ms"):
        Deadline.after_ms(bad)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (90868376, "86.7 MiB"), (5e12, "4656.6 GiB")]
)
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("ms", "text"), [(None, "—"), (0.417, "0.42 ms"), (12.3, "12 ms"), (3100, "3.1 s")]
)
def test_milliseconds_for_people(ms, text):
    assert format_ms(ms) == text
