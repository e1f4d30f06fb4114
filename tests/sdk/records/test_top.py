"""The live view: what it sums up, and how it looks."""

from __future__ import annotations

import io
import json
import time

import msgspec
import pytest

from nearfar import cli
from nearfar.engines.condition import DeviceCondition
from sdk.records import Decided, Finished, Moment, Recorder, RingReader
from sdk.records.board import Board
from sdk.records.top import render, top
from sdk.routing import Prediction, RouteState
from tests.sdk.records.test_replay import typical
from tests.sdk.records.test_ring import KNOWN


def decided(at_s: float, decision=None, **moment: object) -> Decided:
    fields = {"delay_ms": 40.0, "ms_per_byte": 0.001, **moment}
    return Decided(at_s=at_s, decision=decision or typical(), moment=Moment(**fields))


def answered(at_s: float, total_ms: float, **fields: object) -> Finished:
    facts = {"route": "cloud", "model": "m", "queue_ms": 2.0, **fields}
    return Finished(at_s=at_s, total_ms=total_ms, **facts)


def test_the_board_sums_up_what_was_decided_and_what_came_of_it():
    board = Board(60.0)
    board.add(decided(100.0 + n) for n in range(10))
    board.add(answered(100.0 + n, float(n + 1)) for n in range(10))
    board.add([decided(110.0, typical(failed=("cloud",)))])
    view = board.view(120.0)
    assert view.decisions == 11
    assert view.decisions_per_s == pytest.approx(11 / 20)
    assert (view.repairs, view.denied, view.late) == (1, 0, 1)
    assert view.rtt_ms == 40.0
    assert view.bandwidth_mbit_per_s == pytest.approx(8.0)
    edge, cloud = view.rows
    assert (edge.route, edge.chosen, edge.considered, edge.answered) == ("edge", 1, 11, 0)
    assert (edge.p50_ms, edge.expected_p50_ms) == (None, 300.0)
    assert (cloud.chosen, cloud.answered) == (10, 10)
    assert (cloud.p50_ms, cloud.p95_ms, cloud.p99_ms, cloud.queue_p50_ms) == (6.0, 10.0, 10.0, 2.0)
    assert view.last[0][2].startswith("edge: ")


def test_what_is_older_than_the_window_counts_no_more():
    board = Board(10.0)
    board.add([decided(100.0), answered(100.0, 5.0), decided(109.0)])
    assert board.view(109.5).decisions == 2
    view = board.view(110.5)
    assert view.decisions == 1
    assert view.rows[1].answered == 0
    assert board.view(500.0).rows == ()
    assert board.view(500.0).rtt_ms == 40.0  # the last that is known


def test_an_empty_board_says_so():
    view = Board().view(100.0)
    assert (view.decisions, view.rtt_ms, view.breaker, view.rows) == (0, None, "", ())


def test_a_route_that_is_kept_out_says_why():
    cut_off = typical(
        cloud=RouteState(obstacle="unreachable", detail="failed 3 times, next try in 2.0 s"),
        edge=RouteState(prediction=Prediction(basis="seeded", p50_ms=5.0, p95_ms=6.0), ahead=2),
    )
    board = Board()
    board.add([decided(100.0, cut_off, breaker="open", failures=3)])
    view = board.view(100.0)
    edge, cloud = view.rows
    assert cloud.note == "unreachable: failed 3 times, next try in 2.0 s"
    assert (edge.ahead, edge.basis) == (2, "seeded")
    assert (view.breaker, view.failures) == ("open", 3)


def test_a_route_that_is_not_configured_has_no_row():
    board = Board()
    board.add([decided(100.0, typical(cloud=RouteState(obstacle="not_configured")))])
    assert [row.route for row in board.view(100.0).rows] == ["edge"]


SILENT = DeviceCondition()


def drawn(view, device=SILENT, width=160) -> str:
    from rich.console import Console

    console = Console(width=width, file=io.StringIO())
    console.print(render(view, device))
    return console.file.getvalue()


def test_the_view_shows_routes_quantiles_breaker_repairs_link_and_temperature():
    board = Board()
    board.add([decided(100.0, breaker="half_open", failures=2), answered(100.0, 187.0)])
    text = drawn(board.view(100.0), DeviceCondition(0.45, 61.4, "15W"))
    for word in ("half_open", "2 failures", "40 ms", "8 Mbit/s", "61 °C", "speed 45 %",
                 "15W", " 190  200 ", "hedges left 0",
                 " 187  187  187 ", "1/1", "repairs 0 (0.0 %)", "cloud: "):  # fmt: skip
        assert word in text, word
    empty = drawn(Board().view(100.0))
    assert "no decisions" in empty
    assert "speed —" in empty


def test_in_80_columns_no_heading_and_no_number_is_cut():
    cut_off = typical(cloud=RouteState(obstacle="unreachable", detail="failed 3 times"))
    board = Board()
    for at_s in range(100, 160):
        board.add([decided(float(at_s)), answered(float(at_s), 1234.5)])
    board.add([decided(160.0, cut_off)])
    text = drawn(board.view(160.0), width=80)
    for word in ("model", "route", "taken", "p50  p95  p99", "answers", "queue", "ahead", "60/61",
                 "1234 1234 1234", "2.00", "cloud: unreachable: failed 3 times"):  # fmt: skip
        assert word in text, (word, text)
    assert "…" not in text


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "decisions.ring"
    recorder = Recorder(path, KNOWN)
    recorder.write(decided(time.time()))
    recorder.write(answered(time.time(), 12.0))
    recorder.close()
    return path


def run(capsys, *arguments: object) -> tuple[int, str]:
    status = cli.run(top, [str(a) for a in arguments], program="nearfar top")
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_one_view_is_printed_or_given_as_json(written, capsys):
    status, text = run(capsys, written, "--once", "--json")
    assert status == 0
    facts = json.loads(text)
    assert facts["decisions"] == 1
    assert facts["rows"][1]["p50_ms"] == 12.0
    assert {"temperature_c", "speed", "power_mode"} <= set(facts)
    status, text = run(capsys, written, "--once")
    assert status == 0
    assert "nearfar top" in text


def test_the_file_is_found_through_the_configuration(written, capsys):
    config = written.parent / "nearfar.toml"
    config.write_text('[routing]\nrecord = "decisions.ring"\n')
    assert run(capsys, "-c", config, "--once")[0] == 0
    config.write_text("[routing]\n")
    status, text = run(capsys, "-c", config, "--once")
    assert status == 2
    assert "record" in text


@pytest.mark.parametrize("arguments", [("--json",), ("--window-s", "0"), ("--interval-s", "nan")])
def test_what_cannot_be_meant_is_refused(written, capsys, arguments):
    assert run(capsys, written, *arguments)[0] == 2


def test_the_live_view_follows_the_file_until_it_is_left(written, capsys, monkeypatch):
    looks = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt
        recorder = Recorder(written, KNOWN)
        recorder.write(decided(time.time()))
        recorder.close()

    monkeypatch.setattr("sdk.records.top.time.sleep", pause)
    assert run(capsys, written, "--interval-s", "0.5")[0] == 0
    assert looks == [0.5, 0.5, 0.5]
    assert len(list(RingReader(written).entries())) == 4


def test_the_view_is_made_of_plain_values():
    board = Board()
    board.add([decided(100.0)])
    assert msgspec.json.decode(msgspec.json.encode(board.view(100.0)))
