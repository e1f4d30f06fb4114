"""Weights of matrix products in 4 bits, those of tables and convolutions in 8."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from converters.libraries import load
from converters.settings import Int4Settings
from converters.steps.quantize import heavy_nodes
from converters.steps.weight_blocks import Blocks, quantize_blocks, weighty_operators
from converters.tensorrt.graph import nodes_below
from nearfar.errors import ConversionError

#: What is said of language models; the others are rounded to the nearest.
_ALGORITHMS = ("auto", "rtn")
_ROUNDED = ("MatMul", "Gather", "Gemm", "Conv", "ConvTranspose")


class Int4Quantizer:
    """Makes INT4 versions of one model, each with other nodes left in full precision.

    Args:
        source: FP32 model.
        work: Folder for intermediate files.
        settings: How.

    Raises:
        ConversionError: The settings are those of a language model, or the model has no product
            that 4 bits are for.
    """

    def __init__(self, source: Path, work: Path, settings: Int4Settings) -> None:
        if settings.algorithm not in _ALGORITHMS:
            raise ConversionError(
                f"int4.algorithm = {settings.algorithm!r} is for language models",
                fix="Use 'rtn': weights of other models are rounded to the nearest",
            )
        self._source = source
        self._work = work
        self._settings = settings

    @cached_property
    def candidates(self) -> tuple[str, ...]:
        """Names of the nodes that would be rounded and have weights worth it."""
        return heavy_nodes(self._source, _ROUNDED)

    def write(self, target: Path, keep: Sequence[str] = ()) -> None:
        """Write a version.

        Args:
            target: The file.
            keep: Nodes to leave as they are, beside those of the settings.

        Raises:
            ConversionError: ONNX Runtime cannot quantize the model, it has no product with constant
                weights, or a node to keep does not exist.
        """
        settings = self._settings
        kept = frozenset((*keep, *settings.keep))
        graph = load("onnx").load(str(self._source), load_external_data=False).graph
        unknown = sorted(set(settings.keep) - {node.name for node in nodes_below(graph)})
        if unknown:
            raise ConversionError(
                f"The model has no node {unknown[0]!r}, which the recipe keeps (int4.keep)",
                fix="Take it out of the recipe; names are those of the optimised graph",
            )
        blocks = Blocks(
            bits=4,
            block_size=settings.block_size,
            symmetric=settings.symmetric,
            accuracy_level=settings.accuracy_level,
        )
        try:
            count = quantize_blocks(self._source, target, blocks, kept, self._work)
        except Exception as exc:  # the quantizers raise plain exceptions of every kind
            raise ConversionError(
                f"ONNX Runtime cannot quantize the model to INT4 ({exc})",
                fix="Leave the int4 variant out: --variants int8,fp32",
            ) from exc
        if not count and not keep:
            raise ConversionError(
                "4 bits are for matrix products (MatMul, Gemm) with constant weights, and the "
                f"model has none; {_where(weighty_operators(self._source))}",
                fix="Take eight bits, which convolutions and recurrent layers have too: "
                "--variants int8,fp32",
            )


def _where(counts: dict[str, int]) -> str:
    if not counts:
        return "it has no large weights at all"
    return "its weights are in " + ", ".join(f"{name} ({count})" for name, count in counts.items())
