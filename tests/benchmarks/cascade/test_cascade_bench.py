"""The cascade's benchmark: splits, the head on neighbours, docstrings; nothing is trained here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cascade import texts as texts_module
from benchmarks.cascade.bench import (
    TARGET,
    Settings,
    Split,
    judge,
    percent_held,
    plain_split,
    split_once,
)
from benchmarks.cascade.pairs import Pair, load
from benchmarks.cascade.texts import docstrings, heads, neighbours
from nearfar.errors import EngineError, InvalidInput


def pair(rng, samples=1200, *, spread=0.6) -> Pair:
    """An edge model that is the cloud's with noise: where it is unsure they often differ."""
    logits = rng.normal(0, 3, (samples, 5))
    edge = logits + rng.normal(0, spread, logits.shape)
    return Pair(name="digits CNN", edge=edge, cloud=logits, truth=logits.argmax(-1), detail="noise")


def test_the_agreement_holds_where_the_plain_rule_breaks_it():
    one = pair(np.random.default_rng(0))
    rngs = [np.random.default_rng(seed) for seed in range(200)]
    ours = [split_once(one, TARGET, rng) for rng in rngs[:100]]
    plain = [plain_split(one, TARGET, rng) for rng in rngs[100:]]
    assert percent_held(ours, TARGET) >= 95
    assert percent_held(plain, TARGET) < 85
    assert np.mean([s.kept for s in ours]) > 0.5


def test_a_split_that_keeps_nothing_agrees_always():
    blind = Pair(
        name="blind", edge=np.eye(2)[np.zeros(100, int)], cloud=np.eye(2)[np.ones(100, int)],
        truth=np.ones(100, int), detail="",
    )  # fmt: skip
    found = split_once(blind, TARGET, np.random.default_rng(0))
    assert found == Split(agreement=1.0, kept=0.0)
    assert blind.agreement == 0.0
    assert blind.accuracies == (0.0, 1.0)


def test_the_report_has_a_bar_on_what_is_promised():
    settings = Settings(models=Path("."), splits=20)
    bars, figures = judge(
        pair(np.random.default_rng(1)), settings, lambda title, steps: lambda: None
    )
    assert [bar.limit for bar in bars] == [95.0, 50.0]
    names = [figure.name for figure in figures]
    assert "digits CNN: splits that held 0.98, no bound" in names
    assert len(names) == len(set(names))


def test_neighbours_vote_by_nearness():
    known = np.eye(3)[[0, 0, 0, 1, 1, 1, 2, 2, 2, 2]]
    classes = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    shares = neighbours(np.eye(3), known, classes, 3)
    assert shares.argmax(-1).tolist() == [0, 1, 2]
    assert np.allclose(shares.sum(-1), 1)


def test_docstrings_are_the_same_for_the_same_seed(monkeypatch):
    monkeypatch.setattr(texts_module, "MODULES", ("json", "no_such_module", "statistics"))
    texts, classes, names = docstrings(0)
    again, _, _ = docstrings(0)
    assert texts == again
    assert len(texts) == len(set(texts)) == len(classes)
    assert names == ["json", "statistics"]
    assert set(classes) == {0, 1}
    assert min(map(len, texts)) >= 40


def test_missing_models_and_packages_are_named(tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match="no minilm"):
        heads(tmp_path, 0)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(EngineError, match="sklearn"):
        load("sklearn.datasets")
