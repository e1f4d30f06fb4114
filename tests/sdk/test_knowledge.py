from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from sdk import Client
from sdk.config import Config, RoutingConfig
from tests.support.tiny import write_tiny_tensor_bundle


def client(folder: Path, **routing: object) -> Client:
    store = folder / "models"
    if not store.exists():
        write_tiny_tensor_bundle(store / "tiny")
    return Client(Config(models_store=store, routing=RoutingConfig(**routing)))  # type: ignore[arg-type]


def ask(made: Client) -> None:
    (model,) = made.models()
    spec = model.manifest.inputs[0]
    shape = [max(size, 1) for size in spec.shape]
    made.infer(model.name, {spec.name: np.zeros(shape, dtype=np.float32)}, deadline_ms=60_000)


def test_a_client_knows_what_the_one_before_it_measured(tmp_path: Path) -> None:
    state = tmp_path / "routes.json"
    with client(tmp_path, state=state) as first:
        ask(first)
    assert state.stat().st_mode & 0o777 == 0o600
    with client(tmp_path, state=state) as second:
        assert any(latency.compute.shape.points for latency in
                   second._known.predictor.models.values())  # fmt: skip
    assert [path.name for path in tmp_path.glob("routes*")] == ["routes.json"]


def test_a_broken_state_file_is_left_aside_with_a_warning(tmp_path: Path, caplog) -> None:
    state = tmp_path / "routes.json"
    state.write_text("{broken")
    with caplog.at_level(logging.WARNING), client(tmp_path, state=state) as made:
        ask(made)
    assert "routes.json" in caplog.text
    assert state.read_text() != "{broken"


def test_a_state_file_that_cannot_be_written_does_not_break_closing(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING), client(tmp_path, state=tmp_path / "no" / "f") as made:
        ask(made)
    assert "cannot be kept" in caplog.text


def test_nothing_stays_under_way_after_an_answer(tmp_path: Path) -> None:
    with client(tmp_path) as made:
        ask(made)
        assert made._known.predictor._in_flight["edge"] == {}


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_wished_probability_reaches_the_decision(tmp_path: Path, confidence: float) -> None:
    with client(tmp_path, confidence=confidence) as made:
        assert made._core.confidence == confidence
