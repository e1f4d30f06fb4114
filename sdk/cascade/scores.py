"""How sure the edge model is, and whether two answers are the same. Pure functions of outputs.

Any function of the edge's outputs is a valid score: a bad one makes the cascade escalate more, not
agree less. Higher means surer; what is not finite scores minus infinity and is never kept.

Text generation has no score here: the engines give out tokens and no log-probabilities, so there
is nothing to tell a sure answer from an unsure one. `task_of` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from nearfar.bundle.manifest import Manifest
from nearfar.errors import BundleError, InvalidInput

ScoreName = Literal["margin", "max_probability", "entropy", "typicality"]
#: Scores of classifiers.
CLASS_SCORES: tuple[ScoreName, ...] = ("margin", "max_probability", "entropy")

CascadeTask = Literal["classification", "embedding"]

#: Logarithm of what is too small for float32: how far a saturated softmax can be read.
_SMALLEST = 1e-38


def task_of(manifest: Manifest) -> CascadeTask:
    """Whether a model's answers can be compared and scored, and how.

    Raises:
        InvalidInput: They cannot; says why.
    """
    if manifest.task == "embedding":
        if not manifest.mixed_routes:
            raise InvalidInput(
                f"The variants of {manifest.name!r} are not certified to share one vector space, "
                "so its vectors may not change their route",
                field="min_agreement",
                fix="Leave min_agreement out, or convert the model again: `mixed_routes` in its "
                "manifest says what the converter measured",
            )
        return "embedding"
    if manifest.task == "text-generation":
        raise no_log_probabilities(manifest.name)
    if manifest.label_output is None and manifest.task != "classification":
        raise InvalidInput(
            f"The manifest of {manifest.name!r} does not say which output holds class scores",
            field="min_agreement",
            fix="Convert it as a classification model, or set `label_output`",
        )
    return "classification"


def no_log_probabilities(model: str) -> InvalidInput:
    """Why text generation has no cascade."""
    return InvalidInput(
        f"{model!r} generates text, and its engine gives no token log-probabilities, so there is "
        "no confidence to go by",
        field="min_agreement",
        fix="Leave min_agreement out; objective='quality' prefers the better variant",
    )


def class_scores(outputs: Mapping[str, np.ndarray], manifest: Manifest) -> np.ndarray:
    """The output that holds class scores, shape (rows, classes), float64.

    Raises:
        BundleError: There is no such output, or it has another shape.
    """
    return _output(outputs, manifest.label_output, manifest)


def vectors(outputs: Mapping[str, np.ndarray], manifest: Manifest) -> np.ndarray:
    """The output that holds vectors, shape (rows, dimensions), float64.

    Raises:
        BundleError: There is no such output, or it has another shape.
    """
    return _output(outputs, manifest.embedding_output, manifest)


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Class scores as probabilities: as they are when they add up to 1, else their softmax.

    Args:
        scores: Shape (rows, classes).
    """
    sums = scores.sum(axis=-1, keepdims=True)
    # 1e-3: what float16 and INT8 outputs lose when they add up.
    is_probability = (scores.min(axis=-1, keepdims=True) >= 0.0) & (np.abs(sums - 1.0) < 1e-3)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
        softmax = exponentials / exponentials.sum(axis=-1, keepdims=True)
        return np.asarray(np.where(is_probability, scores / sums, softmax))


def confidence(name: ScoreName, scores: np.ndarray) -> np.ndarray:
    """One score of a classifier's rows.

    Args:
        name: ``margin``: logarithm of how many times likelier the best class is than the second;
            ``max_probability``: probability of the best class; ``entropy``: 1 minus the entropy as
            a part of the largest possible one.
        scores: Class scores, shape (rows, classes).

    Returns:
        Shape (rows,), higher is surer, minus infinity where the outputs are not finite.

    Raises:
        ValueError: There is no such score of classifiers.
    """
    rows, classes = scores.shape
    if classes < 2:
        return np.full(rows, -np.inf)  # one class: its probability says nothing
    share = probabilities(scores)
    if name == "max_probability":
        values = share.max(axis=-1)
    elif name == "margin":
        best = np.sort(share, axis=-1)[:, -2:]
        values = np.log(np.maximum(best[:, 1], _SMALLEST)) - np.log(
            np.maximum(best[:, 0], _SMALLEST)
        )
    elif name == "entropy":
        logarithms = np.log(np.maximum(share, _SMALLEST))
        values = 1.0 + (share * logarithms).sum(axis=-1) / np.log(classes)
    else:
        raise ValueError(f"{name} is no score of classifiers")
    finite = np.isfinite(scores).all(axis=-1) & np.isfinite(values)
    return np.asarray(np.where(finite, values, -np.inf))


def typicality(rows: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Score of vectors: cosine with the middle of vectors seen before.

    An embedding model says nothing about how sure it is; what is far from everything else is where
    rounded weights are likelier to differ.

    Args:
        rows: Shape (rows, dimensions).
        centre: Shape (dimensions,).

    Returns:
        Shape (rows,), minus infinity where a vector is not finite or zero.
    """
    return cosine(rows, np.broadcast_to(centre, rows.shape))


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of each row with the same row of the other; minus infinity where there is none."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        values = (one * other).sum(axis=-1) / lengths
    return np.asarray(np.where(np.isfinite(values), values, -np.inf))


def same_class(edge: np.ndarray, cloud: np.ndarray) -> np.ndarray:
    """Whether both models name the same class, row by row; of rows not finite, never.

    Args:
        edge: Class scores, shape (rows, classes).
        cloud: The same of the cloud.
    """
    finite = np.isfinite(edge).all(axis=-1) & np.isfinite(cloud).all(axis=-1)
    return np.asarray((edge.argmax(axis=-1) == cloud.argmax(axis=-1)) & finite)


def _output(outputs: Mapping[str, np.ndarray], name: str | None, manifest: Manifest) -> np.ndarray:
    found = next(iter(outputs.values())) if name is None else outputs.get(name)
    if found is None or found.ndim != 2:
        shape = "is missing" if found is None else f"has shape {list(found.shape)}"
        raise BundleError(
            f"Output {name or 'number 1'!r} of {manifest.name!r} {shape}",
            fix="The cascade needs one row for each input: [-1, classes] or [-1, dimensions]",
        )
    return found.astype(np.float64)
