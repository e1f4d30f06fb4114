"""Quantize an ONNX model to 8 bits: weights alone, or activations too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from converters.libraries import load, quiet
from converters.settings import Int8Settings
from converters.sources.onnx_file import stored_tensors
from converters.steps.quantize_static import OPERATORS, Calibrated, calibrate, quantize_static
from converters.steps.round_weights import Half, halve_weights
from converters.steps.shared_weights import dynamic_form, part_shared
from converters.steps.weight_blocks import LEAST_WEIGHTS, Blocks, quantize_blocks
from converters.tensorrt.graph import nodes_below
from nearfar.errors import ConversionError

#: Operators with a constant weight that each method rounds.
_CANDIDATES = {
    "weights": ("MatMul", "Gather", "Gemm", "Conv", "ConvTranspose"),
    "dynamic": ("MatMul", "Gather", "Gemm", "Conv"),
    "static": OPERATORS,
}


class Int8Quantizer:
    """Makes INT8 versions of one model, each with other nodes left in full precision.

    Args:
        source: FP32 model.
        work: Folder for intermediate files.
        settings: How.
        calibration: Inputs of one call each; only the method ``static`` needs them.
    """

    def __init__(
        self,
        source: Path,
        work: Path,
        settings: Int8Settings,
        calibration: Sequence[Mapping[str, np.ndarray]] = (),
    ) -> None:
        self._source = source
        self._work = work
        self._settings = settings
        self._calibration = calibration

    @cached_property
    def candidates(self) -> tuple[str, ...]:
        """Names of the nodes that would be rounded and have weights worth it."""
        return heavy_nodes(self._source, _CANDIDATES[self._settings.method])

    def write(self, target: Path, keep: Sequence[str] = ()) -> None:
        """Write a version.

        Args:
            target: The file.
            keep: Nodes to leave as they are, beside those of the settings.

        Raises:
            ConversionError: ONNX Runtime cannot quantize the model, there is nothing to quantize,
                or a node to keep does not exist.
        """
        kept = frozenset((*keep, *self._settings.keep))
        unknown = sorted(set(self._settings.keep) - self._node_names)
        if unknown:
            raise ConversionError(
                f"The model has no node {unknown[0]!r}, which the recipe keeps (int8.keep)",
                fix="Take it out of the recipe; names are those of the optimised graph",
            )
        if self._settings.method == "static":
            quantize_static(self._calibrated, target, self._settings, kept)
        elif self._settings.method == "dynamic":
            self._dynamic(target, kept)
        else:
            self._weights(target, kept)
        onnx = load("onnx")
        stored = stored_tensors(onnx.load(str(target)).graph, onnx)
        bytes_ = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        if not any(tensor.data_type in bytes_ and tensor.dims for tensor in stored):
            raise ConversionError(
                "The model has no large weights that are constant to quantize",
                fix="Leave the int8 variant out: --variants fp32",
            )

    def ranges(self) -> dict[str, tuple[float, float]]:
        """The range of every activation, as calibration found it; for ``static``."""
        found = self._calibrated.ranges
        return {
            name: (float(np.min(found[name].lowest)), float(np.max(found[name].highest)))
            for name in found
        }

    @cached_property
    def _calibrated(self) -> Calibrated:
        return calibrate(self._source, self._calibration, self._work, self._settings.calibration)

    @cached_property
    def _node_names(self) -> set[str]:
        graph = load("onnx").load(str(self._source)).graph
        return {node.name for node in nodes_below(graph)}

    def _dynamic(self, target: Path, keep: frozenset[str]) -> None:
        onnx, quantization = load("onnx"), load("onnxruntime.quantization")
        model = onnx.load(str(self._source))
        is_parted = bool(part_shared(model, dynamic_form(keep)))
        try:
            with quiet():
                quantization.quantize_dynamic(
                    model if is_parted else str(self._source),
                    str(target),
                    per_channel=self._settings.per_channel,
                    weight_type=quantization.QuantType.QInt8,
                    # It writes Gemm as MatMul and Add first, and looks for these.
                    nodes_to_exclude=sorted({*keep, *(f"{name}_MatMul" for name in keep)}),
                )
        except Exception as exc:  # the quantizer raises plain exceptions of every kind
            raise _refused(exc) from exc

    def _weights(self, target: Path, keep: frozenset[str]) -> None:
        settings = self._settings
        blocks = Blocks(
            bits=8,
            block_size=settings.block_size,
            symmetric=settings.symmetric,
            accuracy_level=settings.accuracy_level,
            tables=settings.tables,
        )
        try:
            quantize_blocks(self._source, target, blocks, keep, self._work)
        except Exception as exc:  # the quantizers raise plain exceptions of every kind
            raise _refused(exc) from exc


def heavy_nodes(source: Path, operators: Collection[str]) -> tuple[str, ...]:
    """Names of the nodes of these operators that read a large constant."""
    onnx = load("onnx")
    graph = onnx.load(str(source)).graph
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer
             if tensor.data_type == onnx.TensorProto.FLOAT}  # fmt: skip
    return tuple(
        node.name
        for node in graph.node
        if node.op_type in operators
        and node.name
        and max((sizes.get(name, 0) for name in node.input), default=0) >= LEAST_WEIGHTS
    )


def _refused(exc: Exception) -> ConversionError:
    return ConversionError(
        f"ONNX Runtime cannot quantize the model to INT8 ({exc})",
        fix="Leave the int8 variant out: --variants fp32",
    )


def store_half(source: Path, target: Path, kind: Half) -> None:
    """Write the model with its weights in 16 bits; they are computed with in 32.

    So it runs wherever ONNX Runtime does: the CPU provider of 1.31 has no BF16 kernel for `MatMul`,
    `Gemm`, `Add`, `Mul` or activations, but `Cast`.

    Raises:
        ConversionError: It has no weights worth it, or cannot say it.
    """
    onnx = load("onnx")
    model = onnx.load(str(source))
    if not halve_weights(model, least_weights=LEAST_WEIGHTS, kind=kind):
        raise ConversionError(
            f"The model has no large weights to store as {kind.upper()}, or an opset below 13",
            fix=f"Leave the {kind} variant out: --variants fp32",
        )
    onnx.save(model, str(target))
