"""Small questions to an ONNX graph that scanning and repairing share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from converters.libraries import load

#: Their output says how large a tensor is, not what is in it: known once shapes are.
_ONLY_SHAPES = ("Shape", "Size")


class Graph:
    """An `onnx.ModelProto` with its constants at hand. Make a new one after changing the model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def nodes(self) -> list[Any]:
        return list(self.model.graph.node)

    @property
    def opset(self) -> int:
        """Version of the standard operators; 0 when the model does not say."""
        return max(
            (one.version for one in self.model.opset_import if one.domain in ("", "ai.onnx")),
            default=0,
        )

    @cached_property
    def initializers(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    @cached_property
    def readers(self) -> dict[str, list[Any]]:
        """Name of a value to the nodes that read it, at the top level."""
        found: dict[str, list[Any]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def makers(self) -> dict[str, Any]:
        """Name of a value to the node that makes it."""
        return {name: node for node in self.model.graph.node for name in node.output}

    @cached_property
    def outputs(self) -> set[str]:
        return {value.name for value in self.model.graph.output}

    @cached_property
    def depends_on_inputs(self) -> dict[str, frozenset[str]]:
        """Name of a value to the inputs whose contents it depends on; absent when on none."""
        found: dict[str, frozenset[str]] = {
            value.name: frozenset({value.name})
            for value in self.model.graph.input
            if value.name not in self.initializers
        }
        for node in self.model.graph.node:
            if node.op_type in _ONLY_SHAPES:
                continue
            needed = list(node.input)
            for inner in nodes_below(node):
                needed += inner.input
            inputs = frozenset().union(*(found.get(name, frozenset()) for name in needed))
            if inputs:
                for name in node.output:
                    found[name] = inputs
        return found

    def constant(self, name: str) -> np.ndarray | None:
        """The numbers of an initializer or a Constant node, or `None`."""
        onnx = load("onnx")
        tensor = self.initializers.get(name)
        if tensor is None:
            node = self.makers.get(name)
            if node is None or node.op_type != "Constant":
                return None
            tensor = next((one.t for one in node.attribute if one.name == "value"), None)
            if tensor is None:
                return None
        array: np.ndarray = onnx.numpy_helper.to_array(tensor)
        return array

    @staticmethod
    def attribute(node: Any, name: str, default: Any = None) -> Any:
        onnx = load("onnx")
        for one in node.attribute:
            if one.name == name:
                return onnx.helper.get_attribute_value(one)
        return default


def nodes_below(parent: Any) -> Iterator[Any]:
    """Nodes of a graph with those of its inner graphs; of a node, those of its inner graphs."""
    graphs = [parent] if hasattr(parent, "node") else _inner(parent)
    for graph in graphs:
        for node in graph.node:
            yield node
            yield from nodes_below(node)


def _inner(node: Any) -> list[Any]:
    found = []
    for attribute in node.attribute:
        if attribute.HasField("g"):
            found.append(attribute.g)
        found.extend(attribute.graphs)
    return found
