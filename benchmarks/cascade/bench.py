"""`nearfar bench cascade`: does the stated agreement hold on data that was not calibrated with?"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.cascade.digits import digits
from benchmarks.cascade.pairs import Pair
from benchmarks.cascade.texts import MODULES, TEXTS_PER_CLASS, heads
from benchmarks.harness import Bar, Figure, Report, Run
from benchmarks.subjects import Begin
from sdk.cascade.calibration import VariantKey
from sdk.cascade.measure import Settings as Calibrating
from sdk.cascade.measure import calibration_of
from sdk.cascade.scores import confidence

TARGET = 0.98
#: Reported without a bar.
OTHER_TARGETS = (0.95, 0.99)
MIN_HELD = 95.0  # of 100 splits
MIN_AVOIDED = 50.0  # percent of the cloud's calls, on digits
DIGITS = "digits CNN"
#: Both models say the same about nearly every digit, so that a bar would say nothing.
_WITHOUT_BAR = ("digits, one CNN",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        models: Folder of bundles with minilm.
        splits: Random splits of each pool into calibration and held-out half.
        seed: Of models, texts and splits.
    """

    models: Path
    splits: int = 100
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Split:
    """What came of one split.

    Attributes:
        agreement: Of the cascade with the cloud, on the held-out half.
        kept: Part of the held-out half that the device answered.
    """

    agreement: float
    kept: float

    def held(self, target: float) -> bool:
        return self.agreement >= target - 1e-12


def split_once(
    pair: Pair, target: float, random: np.random.Generator, *, horizon: bool = True
) -> Split:
    """Calibrate on one half of the pool, and use the threshold on the other.

    Args:
        pair: Two models' answers.
        target: The stated agreement.
        random: Draws the halves.
        horizon: Whether the statement is about the held-out half itself, as it is by default
            about the next 1,000 requests; else about the long run only.
    """
    order = random.permutation(len(pair.edge))
    half = len(order) // 2
    here, there = order[:half], order[half:]
    calibration = calibration_of(
        pair.edge[here],
        pair.cloud[here],
        Calibrating(horizon_requests=len(there) if horizon else None),
        model="pair",
        task="classification",
        edge_key=VariantKey(variant="edge", digest=""),
        cloud_key=VariantKey(variant="cloud", digest=""),
    )
    threshold = calibration.threshold(target)
    scores = confidence(threshold.score, pair.edge[there])
    return _used(pair, there, scores > threshold.bound)


def plain_split(pair: Pair, target: float, random: np.random.Generator) -> Split:
    """The obvious rule without a bound: the lowest margin at which the sample itself agrees."""
    order = random.permutation(len(pair.edge))
    half = len(order) // 2
    here, there = order[:half], order[half:]
    scores = confidence("margin", pair.edge[here])
    differs = pair.edge[here].argmax(-1) != pair.cloud[here].argmax(-1)
    wrong = np.sort(scores[differs])[::-1]
    tolerated = math.floor((1.0 - target) * half + 1e-9)
    bound = wrong[tolerated] if tolerated < len(wrong) else -math.inf
    return _used(pair, there, confidence("margin", pair.edge[there]) > bound)


def _used(pair: Pair, rows: np.ndarray, kept: np.ndarray) -> Split:
    differs = pair.edge[rows].argmax(axis=-1) != pair.cloud[rows].argmax(axis=-1)
    return Split(agreement=1.0 - float((kept & differs).mean()), kept=float(kept.mean()))


def measure(settings: Settings, begin: Begin) -> Report:
    """Run everything.

    Raises:
        InvalidInput: A model is missing.
        EngineError: A package is missing.
    """
    run = Run("cascade", seed=settings.seed)
    step = begin("digits: train, convert and run", 1)
    with tempfile.TemporaryDirectory(prefix="nearfar-cascade-") as folder:
        pairs = digits(Path(folder), settings.seed)
    step()
    step = begin("MiniLM: embed texts", 2 * len(MODULES) * TEXTS_PER_CLASS)

    def on_texts(count: int) -> None:
        for _ in range(count):
            step()

    pairs += heads(settings.models, settings.seed, on_texts)
    bars: list[Bar] = []
    figures: list[Figure] = []
    for pair in pairs:
        found_bars, found_figures = judge(pair, settings, begin)
        bars += found_bars
        figures += found_figures
    return run.report(
        bars=bars,
        figures=figures,
        settings={
            "splits": settings.splits,
            **{pair.name: f"{len(pair.edge)} samples; {pair.detail}" for pair in pairs},
        },
    )


def judge(pair: Pair, settings: Settings, begin: Begin) -> tuple[list[Bar], list[Figure]]:
    """Bars and figures of one pair of models."""
    name = pair.name
    step = begin(f"{name}: splits", settings.splits)
    # Both rules and all agreements meet the same splits.
    seeds = np.random.SeedSequence(settings.seed).spawn(settings.splits)
    ours: list[Split] = []
    others: dict[str, list[Split]] = {}
    for seed in seeds:
        ours.append(split_once(pair, TARGET, np.random.default_rng(seed)))
        for target in OTHER_TARGETS:
            others.setdefault(f"{target:g}", []).append(
                split_once(pair, target, np.random.default_rng(seed))
            )
        others.setdefault("long run only", []).append(
            split_once(pair, TARGET, np.random.default_rng(seed), horizon=False)
        )
        others.setdefault("no bound", []).append(
            plain_split(pair, TARGET, np.random.default_rng(seed))
        )
        step()
    held = percent_held(ours, TARGET)
    avoided = Figure.of_rounds(
        f"{name}: cloud calls avoided at {TARGET:g}", "%", [100.0 * split.kept for split in ours]
    )
    bars = []
    if name not in _WITHOUT_BAR:
        bars.append(
            Bar(
                name=f"{name}: splits that held {TARGET:g}",
                value=held,
                limit=MIN_HELD,
                direction="at_least",
                unit="%",
            )
        )
    if name == DIGITS:
        bars.append(avoided.bar(MIN_AVOIDED, "at_least"))
    edge, cloud = pair.accuracies
    figures = [
        Figure.of_rounds(f"{name}: splits that held {TARGET:g}", "%", [held]),
        avoided,
        Figure.of_rounds(
            f"{name}: held-out agreement at {TARGET:g}",
            "%",
            [100.0 * split.agreement for split in ours],
        ),
        _one(f"{name}: agreement if the edge always answered", pair.agreement),
        _one(f"{name}: accuracy of the edge model", edge),
        _one(f"{name}: accuracy of the cloud model", cloud),
    ]
    for label, splits in others.items():
        target = float(label) if label[0].isdigit() else TARGET
        at = label if label[0].isdigit() else f"{TARGET:g}, {label}"
        figures.append(
            Figure.of_rounds(f"{name}: splits that held {at}", "%", [percent_held(splits, target)])
        )
        figures.append(
            Figure.of_rounds(
                f"{name}: cloud calls avoided at {at}", "%", [100.0 * s.kept for s in splits]
            )
        )
    return bars, figures


def percent_held(splits: Sequence[Split], target: float) -> float:
    """Part of the splits in which the agreement was held on the held-out half."""
    return 100.0 * sum(split.held(target) for split in splits) / len(splits)


def _one(name: str, share: float) -> Figure:
    return Figure.of_rounds(name, "%", [100.0 * share])
