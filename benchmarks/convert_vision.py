"""A CNN for handwritten digits, pruned and rounded to 8 bits.

The network, its images and their split are those of `benchmarks.cascade.digits` (scikit-learn's
1,797 real images): 600 train and recover, 1,197 were never seen by anything but the last count.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cascade.digits import LARGE, digit_images, trained
from benchmarks.harness import Bar, Figure
from benchmarks.subjects import Begin, Part
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.settings import Int8Settings, PruneSettings, Settings
from nearfar.engines.model import LoadedModel

MIN_TIMES_SMALLER = 12.0
#: In points: hundredths of all images.
MAX_POINTS_LOST = 1.0
#: Chosen on the seeds below, of which the bench reports all.
RATIO, EPOCHS = 0.6, 60
SEEDS = (0, 1, 2)

_seed = 0


@lru_cache(maxsize=4)
def _made(seed: int) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    images, labels, training, pool = digit_images(seed)
    model = trained(images[training], labels[training], LARGE, seed)
    return model, images, labels, training, pool


def make_cnn() -> Any:
    """The trained network; see `nearfar convert benchmarks.convert_vision:make_cnn`."""
    return _made(_seed)[0]


def example_inputs() -> np.ndarray:
    """Images to calibrate and to compare with; all are training images."""
    _, images, _, training, _ = _made(_seed)
    chosen: np.ndarray = images[training[:256]]
    return chosen


def training_data() -> tuple[np.ndarray, np.ndarray]:
    """What the narrow network is trained on."""
    _, images, labels, training, _ = _made(_seed)
    return images[training], labels[training]


def measure_vision(work: Path, begin: Begin) -> Part:
    """Convert the network of each seed, and count right answers of both variants.

    Args:
        work: Where the bundles go.
        begin: Shows progress.
    """
    global _seed
    step = begin("digits CNN: training, pruning, counting", len(SEEDS))
    smaller, lost, full = [], [], []
    for seed in SEEDS:
        _seed = seed
        settings = Settings(
            seed=seed,
            prune=PruneSettings(ratio=RATIO, recovery_epochs=EPOCHS),
            # Weights alone: rounding activations as well would cost points, and its scales room.
            int8=Int8Settings(method="weights"),
        )
        options = ConversionOptions(
            name="digits", labels=tuple("0123456789"), variants=("int8", "fp32"), measure=False,
            train=f"{__name__}:training_data", settings=settings,
        )  # fmt: skip
        bundle = convert_model(Path(f"{__name__}:make_cnn"), work / f"digits-{seed}", options)
        _, images, labels, _, pool = _made(seed)
        right = {}
        for variant_id in ("fp32", "int8"):
            model = LoadedModel(bundle, variant_id)
            scores = model.infer({"image": images[pool]})[bundle.manifest.label_output or ""]
            right[variant_id] = float((scores.argmax(axis=1) == labels[pool]).mean())
            model.close()
        sizes = {variant.id: variant.size_bytes for variant in bundle.manifest.variants}
        smaller.append(sizes["fp32"] / sizes["int8"])
        lost.append(100 * (right["fp32"] - right["int8"]))
        full.append(100 * right["fp32"])
        step()
    _seed = 0
    name = f"digits CNN, pruned by {RATIO:.0%} and INT8"
    return Part(
        bars=(
            Bar(name=f"{name}: times smaller", value=min(smaller), limit=MIN_TIMES_SMALLER,
                direction="at_least", unit=""),
            Bar(name=f"{name}: points of accuracy lost, worst of {len(SEEDS)} seeds",
                value=max(lost), limit=MAX_POINTS_LOST, direction="at_most", unit=""),
        ),
        figures=(
            Figure.of_rounds("digits CNN: accuracy of FP32", "%", full),
            Figure.of_rounds(f"{name}: points lost", "", lost),
        ),
    )  # fmt: skip
