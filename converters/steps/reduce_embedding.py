"""Shorter vectors: the first numbers of each (Matryoshka), or its main directions (PCA).

A model trained for it keeps most of what it says in the first numbers (Matryoshka representation
learning: Kusupati et al. 2022, arXiv:2205.13147). Other models are turned first, so that the
first numbers are the directions in which real texts differ most. The turn is a part of the model:
every variant of a bundle gives vectors of the same space.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from converters.libraries import load
from converters.settings import EmbeddingSettings
from converters.steps.export_encoder import Pooling
from nearfar.errors import ConversionError


@dataclass(frozen=True, slots=True)
class Projection:
    """From long vectors to short ones.

    Attributes:
        matrix: float32 of shape (long, short).
        kept: Share of the squared length of the texts' vectors that is left, before they are
            scaled to length 1 again.
    """

    matrix: np.ndarray
    kept: float


def fit(settings: EmbeddingSettings, vectors: np.ndarray) -> Projection:
    """Find the projection.

    Args:
        settings: How short, and how.
        vectors: Of texts that nothing is judged on, float32 of shape (texts, long).

    Raises:
        ConversionError: The vectors are no longer than that, or the texts too few to tell.
    """
    texts, width = vectors.shape
    short = settings.dimensions
    assert short is not None
    if short >= width:
        raise ConversionError(
            f"The model's vectors have {width} numbers, {short} are no fewer",
            fix="Lower embedding.dimensions, or leave it out",
        )
    if settings.method == "truncate":
        matrix = np.eye(width, short, dtype=np.float32)
    else:
        if texts < 2 * short:
            raise ConversionError(
                f"{texts} texts are too few to find {short} directions",
                fix="Raise embedding.passages, or take method = 'truncate' for a model trained "
                "for it",
            )
        # Not centred: similarities are products of the vectors as they are (Eckart-Young).
        _, _, rows = np.linalg.svd(vectors.astype(np.float64), full_matrices=False)
        matrix = rows[:short].T
        # The sign of a direction is arbitrary; the same model shall give the same matrix.
        largest = np.abs(matrix).argmax(axis=0)
        matrix = (matrix * np.sign(matrix[largest, np.arange(short)])).astype(np.float32)
    left = np.square(vectors @ matrix).sum() / np.square(vectors).sum()
    return Projection(matrix, float(left))


def reduced_encoder(encoder: Any, projection: Projection, pooling: Pooling) -> Any:
    """The encoder with the projection behind it; takes the same inputs."""
    torch = load("torch")
    matrix = torch.from_numpy(projection.matrix)

    class ReducedEncoder(torch.nn.Module):  # type: ignore[misc, name-defined]
        input_names = encoder.input_names

        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder
            self.register_buffer("projection", matrix)

        def forward(self, *arrays: Any) -> Any:
            vectors = self.encoder(*arrays) @ self.projection
            if pooling.normalise:
                vectors = torch.nn.functional.normalize(vectors, p=2.0, dim=1)
            return vectors

    return ReducedEncoder().eval()


def space_of(fingerprint: str, pooling: Pooling, projection: Projection | None) -> str:
    """Name of a space of vectors: equal for bundles whose vectors may be compared.

    Args:
        fingerprint: Of the source: other weights, other space.
        pooling: How token vectors become one.
        projection: How vectors were shortened, if they were.

    Returns:
        The number of dimensions (``whole`` where none was cut), a colon, and half a SHA-256.
    """
    digest = hashlib.sha256(f"{fingerprint}\0{pooling.mode}\0{pooling.normalise}\0".encode())
    if projection is None:
        return f"whole:{digest.hexdigest()[:32]}"
    digest.update(projection.matrix.tobytes())
    return f"{projection.matrix.shape[1]}:{digest.hexdigest()[:32]}"
