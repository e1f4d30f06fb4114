"""Compare sentence-embedding variants with their source and with each other, on real passages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.libraries import load
from converters.settings import Gates
from converters.steps.export_encoder import OUTPUT
from converters.steps.onnx_session import check_finite, open_session, run
from nearfar.bundle.manifest import QualityFigure, TextPreprocessing
from nearfar.errors import ConversionError

NEIGHBOURS = 10
_BATCH = 8

#: Vectors of two variants may stand in one index when a query of one finds at least this share of
#: its ten true neighbours among vectors of the other, and no vector is far off. Measured on
#: all-MiniLM-L6-v2: INT8 queries in an FP32 index 0.973, all INT8 0.970, worst cosine 0.998: mixing
#: costs no more than INT8 itself does.
_MIXED_RECALL, _MIXED_COSINE = 0.95, 0.995


class EmbeddingCheck:
    """The same passages through any model, and the figures.

    Args:
        tokenizer: ``tokenizer.json`` as it goes into the bundle.
        preprocessing: As it goes into the manifest.
        gates: What variants must reach.
        passages: The texts.

    Attributes:
        samples: How many texts there are.
        batches: Their inputs, a few texts to a call.
        example: The input of one text of middling length.
    """

    def __init__(
        self,
        tokenizer: Path,
        preprocessing: TextPreprocessing,
        gates: Gates,
        passages: Sequence[str],
    ) -> None:
        from nearfar.processing.text import TextEncoder

        self._gates = gates
        encode = TextEncoder(tokenizer, preprocessing)
        # Texts of like length share a batch, so that little is padding; order does not matter.
        passages = sorted(passages, key=len)
        self.samples = len(passages)
        self.batches: list[dict[str, np.ndarray]] = [
            encode(passages[start : start + _BATCH]) for start in range(0, len(passages), _BATCH)
        ]
        self.example = encode([passages[len(passages) // 2]])

    def source_vectors(self, encoder: Any) -> np.ndarray:
        """Vectors of the torch encoder, float32 of shape (passages, width)."""
        torch = load("torch")
        with torch.no_grad():
            rows = [
                encoder(*(torch.from_numpy(batch[name]) for name in encoder.input_names)).numpy()
                for batch in self.batches
            ]
        vectors = np.concatenate(rows)
        check_finite(vectors, "the source's vectors")
        return vectors

    def vectors(self, path: Path, *, is_unfused: bool = False) -> np.ndarray:
        """Vectors of an ONNX model, float32 of shape (passages, width); see `open_session`."""
        session = open_session(path, is_unfused=is_unfused)
        return np.concatenate(
            [run(session, batch, name=path.parent.name)[OUTPUT] for batch in self.batches]
        )

    def against_source(
        self, vectors: np.ndarray, source: np.ndarray, reference: str
    ) -> tuple[QualityFigure, ...]:
        """Figures of the full-precision variant.

        Raises:
            ConversionError: The export computes something else than its source.
        """
        cosines = _cosines(vectors, source)
        if cosines.min() < self._gates.min_cosine_to_source:
            raise ConversionError(
                f"The exported model is not the same model: worst cosine {cosines.min():.5f}",
                fix="Use the torch and transformers versions that nearfar names",
            )
        error = float(np.abs(vectors - source).max())
        return tuple(
            self._figures(
                reference,
                cosine_mean=(float(cosines.mean()), True),
                cosine_min=(float(cosines.min()), True),
                max_abs_error=(error, False),
            )
        )

    def against_reference(
        self,
        vectors: np.ndarray,
        best: np.ndarray,
        reference: str,
        *,
        suffix: str = "",
        is_gated: bool = True,
    ) -> tuple[QualityFigure, ...]:
        """Figures of a compressed variant, their names with `suffix`.

        Raises:
            ConversionError: It is far off, and `is_gated`.
        """
        cosines = _cosines(vectors, best)
        if is_gated and cosines.mean() < self._gates.min_mean_cosine:
            raise ConversionError(
                f"The compressed model is far from {reference}: mean cosine {cosines.mean():.4f}",
                fix="Leave this variant out with --variants; of a sliced model take less away, or "
                "train longer; the limit is gates.min_mean_cosine",
            )
        truth = _neighbours(best, best)
        values = {
            "cosine_mean": (float(cosines.mean()), True),
            "cosine_min": (float(cosines.min()), True),
            "recall_at_10": (_recall(_neighbours(vectors, vectors), truth), True),
            "recall_at_10_mixed": (_recall(_neighbours(vectors, best), truth), True),
        }
        named = {name + suffix: value for name, value in values.items()}
        return tuple(self._figures(reference, **named))

    def against_long(
        self, vectors: np.ndarray, long: np.ndarray, reference: str
    ) -> tuple[QualityFigure, ...]:
        """How many neighbours shortened vectors have in common with the whole ones."""
        recall = _recall(_neighbours(vectors, vectors), _neighbours(long, long))
        return tuple(self._figures(reference, recall_at_10_whole=(recall, True)))

    def _figures(self, reference: str, **values: tuple[float, bool]) -> Iterator[QualityFigure]:
        for metric, (value, higher_is_better) in values.items():
            yield QualityFigure(
                metric=metric,
                value=value,
                higher_is_better=higher_is_better,
                samples=self.samples,
                reference=reference,
            )


def check_short(figures: Sequence[QualityFigure], limit: float | None) -> None:
    """Refuse to shorten vectors so far that a limit of quality is broken by that alone.

    Raises:
        ConversionError: No variant could be good enough.
    """
    for figure in figures:
        if limit is not None and figure.metric == "recall_at_10_whole" and figure.value < 1 - limit:
            raise ConversionError(
                f"The shortened vectors keep {figure.value:.1%} of each text's neighbours, and "
                f"{1 - limit:.1%} are asked for",
                fix="Raise embedding.dimensions (--dimensions), or allow a greater "
                "--max-quality-drop",
            )


def may_mix(figures: Sequence[Sequence[QualityFigure]]) -> bool:
    """Whether measured agreement lets vectors of all variants be compared with each other."""
    for variant in figures:
        values = {figure.metric: figure.value for figure in variant}
        if values.get("recall_at_10_mixed", 1.0) < _MIXED_RECALL:
            return False
        if values.get("cosine_min", 0.0) < _MIXED_COSINE:
            return False
    return True


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray((one * other).sum(axis=1) / np.maximum(lengths, 1e-12))


def _neighbours(queries: np.ndarray, index: np.ndarray) -> np.ndarray:
    scores = queries @ index.T
    np.fill_diagonal(scores, -np.inf)  # a passage is not its own neighbour
    return np.argsort(-scores, axis=1, kind="stable")[:, :NEIGHBOURS]


def _recall(found: np.ndarray, truth: np.ndarray) -> float:
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist())]  # noqa: B905
    return sum(hits) / truth.size
