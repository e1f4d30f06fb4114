from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import harness
from benchmarks.harness import (
    Bar,
    Figure,
    Report,
    Run,
    Summary,
    interleave,
    is_decided,
    median_interval,
    per_round,
    quantile,
)
from nearfar.errors import InvalidInput

FAST = Bar(name="infer, added", value=41.25, limit=100, direction="at_most", unit="µs")
SLOW = Bar(name="speed ratio", value=0.91, limit=0.95, direction="at_least", unit="")


def report(*bars: Bar, bench: str = "fake") -> Report:
    figures = [Figure.of_rounds("call", "µs", [3.0, 1.0, 2.0])]
    return Run(bench, seed=7).report(bars=bars, figures=figures, settings={"rounds": 3})


@pytest.mark.parametrize(
    ("direction", "value", "is_met"),
    [
        ("at_most", 99.9, True),
        ("at_most", 100.0, True),
        ("at_most", 100.1, False),
        ("at_least", 100.1, True),
        ("at_least", 100.0, True),
        ("at_least", 99.9, False),
        ("at_most", math.nan, False),
        ("at_least", math.nan, False),
    ],
)
def test_a_bar_is_met_on_its_side_of_the_limit_only(direction, value, is_met):
    bar = Bar(name="x", value=value, limit=100, direction=direction, unit="µs")
    assert bar.is_met is is_met


def test_check_passes_with_one_line_when_all_bars_are_met(capsys):
    harness.conclude(report(FAST), json_path=None, check=True)
    said = capsys.readouterr()
    assert said.out == "fake: all 1 bars are met\n"
    assert said.err == ""


def test_check_exits_1_with_one_line_that_names_the_bar_the_value_and_the_limit(capsys):
    with pytest.raises(typer.Exit) as stop:
        harness.conclude(report(FAST, SLOW), json_path=None, check=True)
    assert stop.value.exit_code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "fake: falls short: speed ratio: 0.91, the bar is at least 0.95\n"


def test_check_stays_one_line_however_many_bars_fall_short(capsys):
    many = [
        Bar(name=f"bar {i} with a long name", value=9, limit=1, direction="at_most", unit="ms")
        for i in range(9)
    ]
    with pytest.raises(typer.Exit):
        harness.conclude(report(*many), json_path=None, check=True)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(bar.name in said for bar in many)


def test_without_check_a_bar_that_falls_short_is_shown_and_is_no_failure(capsys):
    harness.conclude(report(FAST, SLOW), json_path=None, check=False)
    said = capsys.readouterr().out
    assert "✗" in said
    assert "speed ratio" in said
    assert "✓" in said


def test_json_is_written_before_check_fails_and_holds_what_others_need(tmp_path):
    path = tmp_path / "out.json"
    with pytest.raises(typer.Exit):
        harness.conclude(report(FAST, SLOW), json_path=path, check=True)
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert tree["bench"] == "fake"
    assert tree["seed"] == 7
    assert tree["settings"] == {"rounds": 3}
    assert [(bar["name"], bar["is_met"]) for bar in tree["bars"]] == [
        ("infer, added", True),
        ("speed ratio", False),
    ]
    assert tree["bars"][1]["limit"] == 0.95
    assert tree["bars"][1]["direction"] == "at_least"
    assert tree["figures"][0]["summary"]["p50"] == 2.0
    assert tree["figures"][0]["rounds"] == [3.0, 1.0, 2.0]
    assert {"python", "nearfar", "numpy"} <= set(tree["versions"])
    assert tree["machine"]["logical_cores"] >= 1
    assert isinstance(tree["machine"]["cpu_flags"], list)
    assert len(tree["load_average"]) == 2


def test_json_stays_valid_when_a_value_could_not_be_measured(tmp_path):
    path = tmp_path / "out.json"
    nothing = Bar(name="x", value=math.nan, limit=1, direction="at_most", unit="ms")
    harness.conclude(report(nothing), json_path=path, check=False)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    bar = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)["bars"][0]
    assert bar["value"] is None
    assert bar["is_met"] is False


@pytest.mark.parametrize("name", ["missing/out.json", "."])
def test_a_json_file_that_cannot_be_written_is_refused_beforehand(tmp_path, name):
    with pytest.raises(InvalidInput, match="cannot be written"):
        harness.check_json_path(tmp_path / name)


def test_a_json_file_in_a_folder_that_exists_is_accepted(tmp_path):
    harness.check_json_path(tmp_path / "out.json")
    harness.check_json_path(None)


def test_sides_take_turns_and_none_always_goes_first():
    order: list[str] = []

    def side(name: str):
        return lambda: order.append(name) or float(len(order))

    rounds_seen = []
    samples = interleave(
        {"a": side("a"), "b": side("b")},
        rounds=4,
        random=random.Random(1),
        on_round=lambda: rounds_seen.append(len(order)),
    )
    first, second = order[0], order[1]
    assert {first, second} == {"a", "b"}
    assert order == [first, second, second, first, first, second, second, first]
    assert samples[first] == [1.0, 4.0, 5.0, 8.0]
    assert samples[second] == [2.0, 3.0, 6.0, 7.0]
    assert rounds_seen == [2, 4, 6, 8]


def test_rounds_go_on_until_there_is_enough_and_never_beyond_the_limit():
    def rounds(enough_at: int) -> int:
        samples = interleave(
            {"a": lambda: 1.0},
            rounds=3,
            random=random.Random(0),
            max_rounds=10,
            is_enough=lambda seen: len(seen["a"]) >= enough_at,
        )
        return len(samples["a"])

    assert [rounds(1), rounds(3), rounds(7), rounds(99)] == [3, 3, 7, 10]


def test_the_interval_of_a_median_holds_it_about_as_often_as_it_says():
    draw = random.Random(5)
    hits = 0
    for _ in range(400):
        low, high = median_interval([draw.gauss(0, 1) for _ in range(25)])
        hits += low <= 0 <= high
    assert 0.93 < hits / 400 <= 1.0


@pytest.mark.parametrize(
    ("samples", "decided"),
    [
        ([0.97, 0.98, 0.99] * 8, True),
        ([0.90, 0.91, 0.92] * 8, True),
        ([0.80, 1.10] * 12, False),
        ([0.90, 0.99], False),
    ],
)
def test_a_bar_is_decided_when_the_noise_is_smaller_than_the_distance(samples, decided):
    assert is_decided(samples, 0.95) is decided


def test_a_bar_that_falls_short_in_noise_says_so():
    bar = Figure.of_rounds("ratio", "", [0.6, 1.2, 0.7, 1.1, 0.8]).bar(0.95, "at_least")
    assert not bar.is_met
    assert "noise" in str(bar)


def test_the_same_seed_gives_the_same_order():
    def order(seed: int) -> list[str]:
        seen: list[str] = []
        sides = {name: (lambda name=name: seen.append(name) or 0.0) for name in "abcd"}
        interleave(sides, rounds=2, random=Run("x", seed=seed).random)
        return seen

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in range(20)}) > 1


def test_per_round_ratios_do_not_see_drift_that_hits_both_sides():
    speed = [50.0, 25.0, 10.0]
    ratios = per_round(lambda ours, bare: ours / bare, [0.9 * s for s in speed], speed)
    assert ratios == pytest.approx([0.9, 0.9, 0.9])


def test_per_round_refuses_sides_of_different_length():
    with pytest.raises(ValueError):
        per_round(lambda x, y: x, [1.0], [1.0, 2.0])


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
    st.floats(0, 1),
)
def test_quantiles_are_those_of_numpy(samples, q):
    ordered = sorted(samples)
    assert quantile(ordered, q) == pytest.approx(np.quantile(ordered, q), abs=1e-6)


def test_a_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        Summary.of([])


def test_a_figures_bar_holds_the_median_and_shows_the_spread():
    bar = Figure.of_rounds("x", "ms", [5.0, 1.0, 3.0]).bar(3.0, "at_most")
    assert (bar.value, bar.lowest, bar.highest) == (3.0, 1.0, 5.0)
    assert bar.is_met


def test_single_calls_are_summarised_and_not_kept():
    figure = Figure.of_calls("x", "µs", [float(i) for i in range(1000)])
    assert figure.rounds == ()
    assert figure.summary.count == 1000


def test_a_busy_machine_is_mentioned_and_a_quiet_one_is_not(monkeypatch):
    monkeypatch.setattr(harness, "usable_cores", lambda: 2)
    assert "other work" in harness.load_note((4.1, 5.0))
    assert harness.load_note((0.1, 2.0)) == ""
    assert harness.load_note((None, None)) == ""


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.9721, "", "0.972"),
        (41.26, "µs", "41.3 µs"),
        (12345.6, "ms", "12346 ms"),
        (-3.5, "µs", "-3.5 µs"),
    ],
)
def test_values_are_shown_with_three_digits_and_their_unit(value, unit, text):
    assert harness.format_value(value, unit) == text
