from __future__ import annotations

import json

import pytest

from benchmarks import overhead
from benchmarks.harness import Bar, Figure, Run
from benchmarks.subjects import Settings
from nearfar.cli import main
from tests.support.tiny import write_tiny_tensor_bundle


def fake_measure(monkeypatch, value: float) -> list[Settings]:
    """Put a quick measurement in the place of the real one; returns what it was asked for."""
    asked: list[Settings] = []

    def measure(settings, begin):
        asked.append(settings)
        begin("fake part", 1)()
        bar = Bar(name="fake added", value=value, limit=100, direction="at_most", unit="µs")
        figures = [Figure.of_rounds("fake added", "µs", [value])]
        return Run("overhead", seed=settings.seed).report(bars=[bar], figures=figures, settings={})

    monkeypatch.setattr(overhead, "measure", measure)
    return asked


def test_check_exits_1_and_says_in_one_line_which_bar_falls_short(monkeypatch, capfd):
    fake_measure(monkeypatch, 250.0)
    assert main(["bench", "overhead", "--check"]) == 1
    said = capfd.readouterr()
    assert (said.out + said.err).splitlines() == [
        "overhead: falls short: fake added: 250 µs, the bar is at most 100 µs"
    ]


def test_check_exits_0_when_the_bars_are_met(monkeypatch, capfd):
    fake_measure(monkeypatch, 50.0)
    assert main(["bench", "overhead", "--check"]) == 0
    assert capfd.readouterr().out == "overhead: all 1 bars are met\n"


def test_without_check_a_table_is_shown_and_progress_goes_to_standard_error(monkeypatch, capfd):
    fake_measure(monkeypatch, 250.0)
    assert main(["bench", "overhead"]) == 0
    said = capfd.readouterr()
    assert "fake added" in said.out
    assert "fake part" not in said.out
    assert "measuring: fake part" in said.err


def test_options_reach_the_measurement_and_the_json_file(monkeypatch, tmp_path):
    asked = fake_measure(monkeypatch, 50.0)
    path = tmp_path / "overhead.json"
    options = "--tokens 32 --rounds 5 --threads 1 --seed 9"
    command = ["bench", "overhead", "--models", str(tmp_path), *options.split()]
    assert main([*command, "--json", str(path)]) == 0
    assert asked == [Settings(models=tmp_path, tokens=32, rounds=5, threads=1, seed=9)]
    assert json.loads(path.read_text(encoding="utf-8"))["seed"] == 9


def test_json_into_a_missing_folder_is_refused_before_anything_is_measured(
    monkeypatch, tmp_path, capfd
):
    asked = fake_measure(monkeypatch, 50.0)
    assert main(["bench", "overhead", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "--json" not in capfd.readouterr().out
    assert asked == []


def test_a_missing_store_is_named_with_the_fix(tmp_path, capfd):
    assert main(["bench", "overhead", "--models", str(tmp_path / "nowhere")]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "There is no model store" in said
    assert "nowhere" in said
    assert "nearfar quickstart" in said


def test_a_store_without_an_llm_is_named_with_the_fix(tmp_path, capfd):
    write_tiny_tensor_bundle(tmp_path / "tiny")
    assert main(["bench", "overhead", "--models", str(tmp_path)]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "no text-generation model, such as assistant" in said
    assert "nearfar quickstart" in said


@pytest.mark.parametrize("options", [["--tokens", "0"], ["--rounds", "1"], ["--threads", "-1"]])
def test_settings_that_measure_nothing_are_refused(options, capfd):
    assert main(["bench", "overhead", *options]) == 2
    assert options[0] in capfd.readouterr().err
