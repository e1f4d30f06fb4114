"""Scores to labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nearfar.errors import EngineError, InvalidInput


def top_labels(scores: np.ndarray, labels: Sequence[str], k: int = 1) -> list[tuple[str, float]]:
    """The best labels of one row, best first; equal scores keep the order of the labels.

    Args:
        scores: Shape (classes,), or (1, classes) as models give it for a batch of one.
        labels: Class names in the order of the scores.
        k: How many; more than there are gives all.

    Returns:
        Label and score, the score as the model gave it.

    Raises:
        InvalidInput: The shape does not match the labels, or `k` is not positive.
        EngineError: All scores are NaN.
    """
    row = scores[0] if scores.ndim == 2 and len(scores) == 1 else scores
    if row.ndim != 1 or len(row) != len(labels):
        raise InvalidInput(
            f"Scores have shape {list(scores.shape)}, and there are {len(labels)} labels",
            field="scores",
            fix=f"Give one row of {len(labels)} scores",
        )
    if k < 1:
        raise InvalidInput(f"top_k is {k}", field="top_k", fix="Ask for at least one label")
    best = np.argsort(-row.astype(np.float64), kind="stable")[:k]
    top = [(labels[index], float(row[index])) for index in best]
    if math.isnan(top[0][1]):  # NaN stands behind all numbers, so there are none
        raise EngineError(
            "The model gave no numbers as scores, but NaN",
            fix="Try it with another input; if it happens there too, use a variant of higher "
            "precision, or look for NaN in the tensors it was given",
        )
    return top
