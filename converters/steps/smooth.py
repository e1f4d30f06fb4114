"""SmoothQuant: what is hard to round moves from activations into weights, before both get 8 bits.

Activations of transformers have a few channels with numbers much larger than the others, which then
decide the step of all. A product ``X W`` is the same as ``(X / s) (s W)`` with a factor for each
channel of X; the factors are those of Xiao et al. 2022 (arXiv 2211.10438), equation 4:

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

The division goes into the `LayerNormalization` in front where nothing else reads that, else into a
`Mul` of its own. (ONNX Runtime's option `SmoothQuant` needs `neural_compressor.adaptor`, which is
gone from that package: 3.0 had it, 3.10 has not.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.libraries import load
from converters.steps.onnx_session import open_session, run
from converters.steps.weight_blocks import LEAST_WEIGHTS
from nearfar.errors import ConversionError

Feeds = Mapping[str, np.ndarray]

#: Factors stay above that (the paper's own program does the same).
_LEAST_FACTOR = 1e-5
#: Inputs that the smoothed graph is compared with the one it was made of on.
_CHECKED = 4


@dataclass(frozen=True, slots=True)
class Smoothed:
    """What was done.

    Attributes:
        products: How many products have other weights now.
        folded: How many divisions are in a `LayerNormalization`.
        inserted: How many are a `Mul` of their own.
    """

    products: int
    folded: int
    inserted: int


def smooth(
    source: Path,
    target: Path,
    *,
    feeds: Sequence[Feeds],
    alpha: float,
    keep: Collection[str] = (),
    max_error: float,
    work: Path,
) -> Smoothed:
    """Write the model with its factors moved; in full precision it computes the same.

    Args:
        source: FP32 model.
        target: The file.
        feeds: Inputs of one call each that activations are looked at on.
        alpha: How much moves: 0 makes all rows of the weights alike, 1 all channels of activations.
        keep: Nodes that will not be rounded, and stay as they are.
        max_error: How much outputs may differ, as a share of the largest.
        work: Folder for intermediate files.

    Raises:
        ConversionError: There is no product with constant weights, the model does not run, or it
            does not compute the same afterwards.
    """
    onnx = load("onnx")
    model = onnx.load(str(source))
    graph = _Graph(onnx, model.graph)
    groups = graph.products(keep)
    if not groups:
        raise ConversionError(
            "int8.smooth is for matrix products (MatMul, Gemm) with constant weights, and the "
            "model has none",
            fix="Leave it out of the recipe",
        )
    largest = _largest(onnx, source, list(groups), feeds, work)
    inserted = 0
    for tensor, nodes in groups.items():
        weights = np.max([np.abs(graph.matrix(node)).max(axis=1) for node in nodes], axis=0)
        factors = _factors(largest[tensor], weights, alpha)
        for node in nodes:
            graph.scale(node, factors)
        inserted += graph.divide(tensor, nodes, factors)
    graph.drop_unread()
    onnx.save(model, str(target))
    _check_same(source, target, feeds[:_CHECKED], max_error)
    count = sum(len(nodes) for nodes in groups.values())
    return Smoothed(count, len(groups) - inserted, inserted)


def _factors(activations: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """One factor for each channel; 1 where a channel or a row is all zeros."""
    is_used = (activations > 0) & (weights > 0)
    activations, weights = (np.where(is_used, one, 1.0) for one in (activations, weights))
    found = activations**alpha / weights ** (1 - alpha)
    return np.where(is_used, np.maximum(found, _LEAST_FACTOR), 1.0).astype(np.float32)


def _largest(
    onnx: Any, source: Path, tensors: Sequence[str], feeds: Sequence[Feeds], work: Path
) -> dict[str, np.ndarray]:
    """Largest absolute number of each channel of activations (their last axis)."""
    model = onnx.load(str(source))
    given = {value.name for value in model.graph.input}
    shown = {value.name for value in model.graph.output} | given
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in tensors if name not in shown
    )
    probe = work / "smooth-probe.onnx"
    found: dict[str, np.ndarray] = {}
    try:
        onnx.save(model, str(probe))
        session = open_session(probe)
        for feed in feeds:
            values = run(session, feed, name=source.name)
            for name in tensors:
                array = np.asarray(feed[name] if name in given else values[name])
                most = np.abs(array).reshape(-1, array.shape[-1]).max(axis=0)
                found[name] = np.maximum(found.get(name, 0.0), most)
    finally:
        probe.unlink(missing_ok=True)
    return found


def _check_same(source: Path, target: Path, feeds: Sequence[Feeds], max_error: float) -> None:
    one, other = open_session(source), open_session(target)
    for feed in feeds:
        expected = run(one, feed, name=source.name)
        outputs = run(other, feed, name=target.name)
        for name, array in expected.items():
            if array.dtype.kind != "f" or not array.size:
                continue
            error = float(np.abs(outputs[name] - array).max() / (np.abs(array).max() or 1.0))
            if error > max_error:
                raise ConversionError(
                    f"The smoothed model is not the same model: {name!r} differs by {error:.1e}",
                    fix="Leave int8.smooth out of the recipe, or choose a smaller alpha",
                )


class _Graph:
    """A graph whose products get other weights."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self._onnx = onnx
        self._graph = graph
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._made_by = {name: node for node in graph.node for name in node.output}
        self._replaced: set[str] = set()

    def products(self, keep: Collection[str]) -> dict[str, list[Any]]:
        """Activations to the products that read them."""
        found: dict[str, list[Any]] = {}
        for node in self._graph.node:
            if node.op_type not in ("MatMul", "Gemm") or node.name in keep:
                continue
            tensor = self._stored.get(node.input[1])
            if tensor is None or tensor.data_type != self._onnx.TensorProto.FLOAT:
                continue
            is_large = len(tensor.dims) == 2 and int(np.prod(tensor.dims)) >= LEAST_WEIGHTS
            if is_large and not _attribute(node, "transA") and node.input[0] not in self._stored:
                found.setdefault(node.input[0], []).append(node)
        return found

    def matrix(self, node: Any) -> np.ndarray:
        """The weights of a product, a row for each channel of activations."""
        array = self._onnx.numpy_helper.to_array(self._stored[node.input[1]])
        return np.asarray(array.T if _attribute(node, "transB") else array)

    def scale(self, node: Any, factors: np.ndarray) -> None:
        """Multiply the rows of a product's weights; others that read these keep them."""
        array = self.matrix(node) * factors[:, None]
        turned = array.T if _attribute(node, "transB") else array
        self._replaced.add(node.input[1])
        node.input[1] = self._store(f"{node.output[0]}_weights", turned)

    def divide(self, tensor: str, nodes: Sequence[Any], factors: np.ndarray) -> bool:
        """Divide what products read; returns whether that takes a node of its own."""
        name = f"{tensor}_smoothed"
        before = self._made_by.get(tensor)
        is_folded = before is not None and self._can_fold(before, tensor, nodes)
        for node in nodes:
            node.input[0] = name
        if before is not None and is_folded:
            for position in range(1, len(before.input)):
                old = self._onnx.numpy_helper.to_array(self._stored[before.input[position]])
                self._replaced.add(before.input[position])
                before.input[position] = self._store(f"{name}_{position}", old / factors)
            # Values of the same name are taken to be the same where layers are compared.
            before.output[0] = name
            return False
        inverse = self._store(f"{name}_factors", np.float32(1) / factors)
        node = self._onnx.helper.make_node("Mul", [tensor, inverse], [name], name=name)
        first = min(i for i, one in enumerate(self._graph.node) if any(one is n for n in nodes))
        self._graph.node.insert(first, node)
        return True

    def drop_unread(self) -> None:
        """Remove weights that nothing reads any more."""
        read = set(_read_names(self._graph))
        for name in sorted(self._replaced - read):
            self._graph.initializer.remove(self._stored[name])

    def _can_fold(self, before: Any, tensor: str, nodes: Sequence[Any]) -> bool:
        if before.op_type != "LayerNormalization" or len(before.output) > 1:
            return False
        if not all(name in self._stored for name in before.input[1:]):
            return False
        if _attribute(before, "axis", -1) != -1:
            return False
        return list(_read_names(self._graph)).count(tensor) == len(nodes)

    def _store(self, name: str, array: np.ndarray) -> str:
        tensor = self._onnx.numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name)
        self._graph.initializer.append(tensor)
        self._stored[name] = self._graph.initializer[-1]
        return name


def _read_names(graph: Any) -> list[str]:
    """All names that are read, as often as they are; those in branches and outputs too."""
    found = [output.name for output in graph.output]
    for node in graph.node:
        found.extend(node.input)
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                found.extend(_read_names(inner))
    return found


def _attribute(node: Any, name: str, default: int = 0) -> int:
    return next((int(one.i) for one in node.attribute if one.name == name), default)
