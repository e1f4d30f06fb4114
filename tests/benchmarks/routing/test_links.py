from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.routing.links import (
    PACKET_BYTES,
    Link,
    Weather,
    markov_link,
    read_trace,
    steady_link,
)
from nearfar.errors import InvalidInput


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_one_packet_crosses_at_each_line_of_a_trace(tmp_path: Path) -> None:
    link = read_trace(write(tmp_path / "a.up", "0\n10\n10\n30\n100\n"))
    assert link.period_s == 0.1
    assert link.cross(1, at_s=0.0) == (0.0, 1)
    assert link.cross(3 * PACKET_BYTES, at_s=0.001) == (0.03, 4)
    assert link.cross(PACKET_BYTES + 1, at_s=0.02)[0] == 0.1


def test_a_trace_starts_again_after_its_end() -> None:
    link = Link([0.0, 0.5], 1.0)
    assert link.cross(5 * PACKET_BYTES, at_s=0.2)[0] == 2.5
    assert Link([0.0, 0.5], 1.0, offset_s=0.4).cross(1, at_s=0.0)[0] == pytest.approx(0.1)


def test_a_message_waits_for_the_one_before_it() -> None:
    link = steady_link(12)  # one packet per millisecond
    first_s, free = link.cross(10 * PACKET_BYTES, at_s=0.0)
    second_s, _ = link.cross(10 * PACKET_BYTES, at_s=0.0, free=free)
    assert second_s == pytest.approx(first_s + 0.010)


@pytest.mark.parametrize("text", ["", "1\nx\n", "5\n3\n", "-1\n4\n", "0\n0\n", "1.5\n", "é"])
def test_what_is_not_a_trace_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_trace(write(tmp_path / "a.up", text))
    assert caught.value.field == "--traces"


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        read_trace(tmp_path / "none.up")


def test_a_generated_link_has_the_bandwidth_of_its_states() -> None:
    states = (Weather(10, 1), Weather(0, 1))
    link = markov_link(states, random.Random(1), duration_s=600)
    assert link.mean_bytes_per_s * 8 / 1e6 == pytest.approx(5, rel=0.2)
    gaps = [b - a for a, b in zip(link.times_s, link.times_s[1:], strict=False)]
    assert max(gaps) > 1  # outages
    assert list(link.times_s) == sorted(link.times_s)
    assert link.times_s == markov_link(states, random.Random(1), duration_s=600).times_s


def test_a_link_of_nothing_but_outage_still_ends() -> None:
    link = markov_link((Weather(0, 1),), random.Random(1), duration_s=10)
    assert link.cross(1, at_s=0.0)[0] == 10
