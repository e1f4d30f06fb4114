"""How sure the edge model is, and whether two answers are the same. Pure functions of outputs.

Any function of the edge's outputs is a valid score: a bad one makes the cascade escalate more, not
agree less. Higher means surer; what is not finite scores minus infinity and is never kept.

An answer in text is scored while it comes, from the logits of its tokens (`AnswerScores`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from nearfar.bundle.manifest import Manifest
from nearfar.errors import BundleError, InvalidInput

ScoreName = Literal[
    "margin",
    "max_probability",
    "entropy",
    "typicality",
    "answer_probability",
    "least_probability",
    "least_margin",
]
#: Scores of classifiers.
CLASS_SCORES: tuple[ScoreName, ...] = ("margin", "max_probability", "entropy")
#: Scores of answers in text. None of them rises while the answer grows.
TEXT_SCORES: tuple[ScoreName, ...] = ("answer_probability", "least_probability", "least_margin")

CascadeTask = Literal["classification", "embedding", "text-generation"]
#: Which scores an answer to each task can have.
SCORES_OF: dict[CascadeTask, tuple[ScoreName, ...]] = {
    "classification": CLASS_SCORES,
    "embedding": ("typicality",),
    "text-generation": TEXT_SCORES,
}

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
        return "text-generation"
    if manifest.label_output is None and manifest.task != "classification":
        raise InvalidInput(
            f"The manifest of {manifest.name!r} does not say which output holds class scores",
            field="min_agreement",
            fix="Convert it as a classification model, or set `label_output`",
        )
    if manifest.multi_label:
        raise InvalidInput(
            f"Several classes of {manifest.name!r} may be true of one input, so there is no one "
            "answer that two models could agree on",
            field="min_agreement",
            fix="Leave min_agreement out",
        )
    return "classification"


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


class AnswerScores:
    """How sure the model is of the answer it is giving; a `TokenWatch`.

    Temperature, penalties and cuts of the sampling do not enter: the scores are the model's own.

    Attributes:
        tokens: How many were seen, the one that ends the answer among them.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._values: dict[ScoreName, float] = {
            "answer_probability": 0.0,
            "least_probability": 0.0,
            "least_margin": math.inf,
        }

    def __call__(self, logits: np.ndarray, token: int) -> None:
        """Take the next token.

        Args:
            logits: float32, shape (vocabulary,).
            token: Which was chosen.
        """
        self.tokens += 1
        chosen = float(logits[token])
        others = np.array(logits)
        others[token] = -np.inf
        margin = chosen - float(others.max())
        top = float(logits.max())
        with np.errstate(invalid="ignore", over="ignore"):
            log_sum = top + math.log(float(np.exp(logits - top, dtype=np.float64).sum()))
        log_probability = chosen - log_sum
        if not (math.isfinite(log_probability) and math.isfinite(margin)):
            log_probability = margin = -math.inf
        values = self._values
        values["answer_probability"] += log_probability
        values["least_probability"] = min(values["least_probability"], log_probability)
        values["least_margin"] = min(values["least_margin"], margin)

    def value(self, name: ScoreName) -> float:
        """One score so far, in nats; it can only fall while the answer grows.

        Args:
            name: ``answer_probability``: logarithm of the probability of the whole answer;
                ``least_probability``: that of its unlikeliest token; ``least_margin``: logarithm of
                how many times likelier than the next best the least clear token was.

        Returns:
            Minus infinity for an answer without a token, and where logits were not finite.
        """
        return self._values[name] if self.tokens else -math.inf


def same_text(one: str, other: str) -> bool:
    """Whether two answers say the same: the same text, white space aside."""
    return one.split() == other.split()


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
