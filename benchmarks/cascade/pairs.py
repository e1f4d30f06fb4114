"""Pairs of models, edge and cloud, and what both say about a pool of real inputs.

The pool was not used to train either model. Both models run as bundles in the engines that an app
uses; the splits of the pool are the benchmark's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.errors import EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What two models say about the same inputs.

    Attributes:
        name: For tables.
        edge: Class probabilities of the edge model, shape (samples, classes).
        cloud: The same of the cloud model.
        truth: True classes, for accuracies only; no part of a calibration.
        detail: What the models are.
    """

    name: str
    edge: np.ndarray
    cloud: np.ndarray
    truth: np.ndarray
    detail: str

    @property
    def agreement(self) -> float:
        """How often the two agree when the edge always answers."""
        return float((self.edge.argmax(axis=-1) == self.cloud.argmax(axis=-1)).mean())

    @property
    def accuracies(self) -> tuple[float, float]:
        """Accuracy of the edge and of the cloud model."""
        edge, cloud = (
            float((scores.argmax(axis=-1) == self.truth).mean())
            for scores in (self.edge, self.cloud)
        )
        return edge, cloud


def load(name: str) -> Any:
    """Import a package of the ``dev`` extra.

    Raises:
        EngineError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as exc:
        raise EngineError(
            f"This benchmark needs {name}, which is not installed",
            fix="pip install 'nearfar[dev]'",
        ) from exc


def outputs_of(
    bundle_path: Path, variant: str, name: str, ask: Callable[[Any], dict[str, np.ndarray]]
) -> np.ndarray:
    """One output of one variant of a bundle, run by the engine that an app's calls run on.

    Args:
        bundle_path: The bundle.
        variant: Which variant.
        name: Which output.
        ask: Called with the loaded model; returns its outputs.
    """
    from nearfar.bundle import open_bundle
    from nearfar.engines.model import LoadedModel

    loaded = LoadedModel(open_bundle(bundle_path), variant)
    try:
        return np.asarray(ask(loaded)[name], dtype=np.float64)
    finally:
        loaded.close()
