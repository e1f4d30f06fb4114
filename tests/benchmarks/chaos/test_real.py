"""Chaos with real processes and a tiny model, and what its bars say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.chaos import bench, real
from benchmarks.chaos.server import computations
from benchmarks.commands import app


def test_a_few_real_requests_survive_real_faults(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    from tests.support import tiny

    tiny.write_tiny_tensor_bundle(tmp_path / "models" / "tiny", task="tensor")
    found = real.run(
        models=tmp_path / "models", requests=18, rate_s=6.0, seed=3, step=lambda: None,
        kinds=("tensors",), names=real.Models(tensors="tiny"),
    )  # fmt: skip
    assert len(found.told) == 18
    assert all(one.is_typed and one.ended_s is not None for one in found.told)
    assert found.computed_twice == 0
    assert found.computed > 0
    assert sum(found.faults.values()) > 0
    assert any(not one.error for one in found.told)


def told(late_ms: float, **changes: object) -> real.Told:
    ask = real.Ask(at_s=0.0, kind="tensors", mode="auto", rows=1, deadline_ms=100.0)
    one = real.Told(ask=ask, due_s=10.0, ended_s=10.0 + late_ms / 1000.0)
    for name, value in changes.items():
        setattr(one, name, value)
    return one


def outcome(*heard: real.Told, computed_twice: int = 0, alarm_ms: float = 0.0) -> real.Outcome:
    return real.Outcome(
        told=heard, faults=Counter({"kill": 1}), computed_twice=computed_twice, computed_again=0,
        computed=1, tick_ms=[2.0], allowed_ms=[real.GRACE_MS + 2.0] * len(heard),
        alarm_ms=[alarm_ms] * len(heard),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "short"),
    [
        (outcome(told(-50.0), told(6.0)), []),
        (outcome(told(-50.0), told(8.0)), ["by the deadline"]),
        (outcome(told(8.0), alarm_ms=3.5), []),
        (outcome(told(8.0), alarm_ms=7.5), ["stood still"]),
        (outcome(told(0.0, ended_s=None)), ["by the deadline", "hung"]),
        (outcome(told(-1.0, is_typed=False, error="KeyError")), ["by the deadline", "not ours"]),
        (outcome(told(-1.0, is_in_order=False)), ["twice or out of order"]),
        (outcome(told(-1.0), computed_twice=1), ["computed twice"]),
    ],
)
def test_each_bar_falls_short_of_its_own_fault(found: real.Outcome, short: list[str]):
    missed = [bar.name for bar in bench.real_part(found).bars if not bar.is_met]
    assert len(missed) == len(short)
    assert all(text in name for text, name in zip(short, missed, strict=True))


def test_computations_are_counted_for_each_life_of_the_server(tmp_path: Path):
    log = tmp_path / "log"
    assert computations(log) == Counter()
    log.write_text("7 infer aa\n7 infer aa\n8 generate aa\n")
    assert computations(log) == Counter({(7, "aa"): 2, (8, "aa"): 1})


def test_check_fails_when_a_bar_is_missed(monkeypatch):
    arguments = ["chaos", "--parts", "simulated", "--simulated", "300", "--check"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    monkeypatch.setattr(bench, "MIN_TOLD", 100.5)
    assert CliRunner().invoke(app, arguments).exit_code == 1


def test_a_part_that_does_not_exist_is_refused():
    from nearfar.errors import InvalidInput

    with pytest.raises(InvalidInput, match="simulated, real, slots"):
        CliRunner().invoke(app, ["chaos", "--parts", "moon"], catch_exceptions=False)
