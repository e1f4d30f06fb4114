"""`nearfar bench handover` on the real model, with a short answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.handover import Settings, measure
from nearfar.errors import InvalidInput


def test_a_short_answer_survives_the_death_of_its_route_after_each_token(bundles_dir: Path):
    steps = []

    def begin(title: str, count: int):
        return lambda: steps.append(title)

    report = measure(Settings(models=bundles_dir, tokens=4), begin)
    assert [bar.value for bar in report.bars] == [0.0, 0.0, 0.0, 0.0]
    assert steps == ["cloud → edge"] * 4 + ["edge → cloud"] * 4


def test_with_two_variants_an_answer_goes_on_well_formed_and_marked(bundles_dir: Path):
    settings = Settings(models=bundles_dir, tokens=3, other="int4")
    report = measure(settings, lambda title, count: lambda: None)
    assert [bar.value for bar in report.bars] == [0.0, 0.0, 0.0, 0.0]
    assert "well-formed" in report.bars[0].name


def test_a_missing_store_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(InvalidInput, match="quickstart"):
        measure(Settings(models=tmp_path / "none"), lambda *_: lambda: None)
