"""Products of a full-precision graph become `MatMulNBits`: the graph's side of `carry_gguf`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from converters.steps.gguf_blocks import BLOCK, Matrix, mean_columns
from nearfar.errors import ConversionError

#: The domain of operators that are ONNX Runtime's own.
CONTRIB = "com.microsoft"
#: The kernel rounds activations to 8 bits, which is what makes it fast.
_ACCURACY_LEVEL = 4


class GraphEditor:
    """Changes to a graph, kept until all are known.

    Args:
        onnx: The module.
        model: The model, changed by `finish`.
    """

    def __init__(self, onnx: Any, model: Any) -> None:
        self._onnx = onnx
        self._model = model
        self._tensors: dict[str, np.ndarray] = {}
        self._first: list[Any] = []
        self._before: dict[str, list[Any]] = {}
        self._after: dict[str, list[Any]] = {}
        self._extended: dict[tuple[str, int], str] = {}
        self._zeros_known: set[str] = set()
        self._merged: set[str] = set()

    def quantize(self, nodes: Sequence[Any], rows: Sequence[int], matrix: Matrix) -> None:
        """Make `MatMulNBits` nodes of `MatMul` nodes.

        Several nodes with the same input become one, whose output is split again: each node costs
        time of its own, and rounds the input to 8 bits anew.

        Args:
            nodes: All with the same input, of shape (batch, tokens, columns).
            rows: How many outputs each has.
            matrix: Their weights, one below the other.
        """
        node = nodes[0]
        inputs = [node.input[0], *self._stored(node.input[1], matrix)]
        if matrix.digits:
            inputs[0] = self._with_means(node, matrix)
        del node.input[:]
        node.input.extend(inputs)
        node.op_type, node.domain = "MatMulNBits", CONTRIB
        del node.attribute[:]
        numbers = {"K": matrix.columns, "N": sum(rows), "bits": matrix.bits,
                   "block_size": matrix.block, "accuracy_level": _ACCURACY_LEVEL}  # fmt: skip
        node.attribute.extend(
            self._onnx.helper.make_attribute(name, value) for name, value in numbers.items()
        )
        if len(nodes) > 1:
            self._split(nodes, list(rows))

    def quantize_table(self, gather: Any, weight: str, matrix: Matrix) -> None:
        """Make a lookup among quantized rows of a `Gather` node.

        Args:
            gather: With ids as its second input.
            weight: Name of the table, or of the head's matrix that it shares.
            matrix: Its rows; without minima.
        """
        make, name = self._onnx.helper.make_node, gather.name
        codes, *others = self._stored(weight, matrix)
        rows, columns = len(matrix.codes), matrix.columns * matrix.bits // 8
        self._tensors[f"{weight}_shape"] = np.array([rows, columns], np.int64)
        self._first.append(
            make("Reshape", [codes, f"{weight}_shape"], [f"{codes}_rows"], name=f"{name}_rows")
        )
        gather.op_type, gather.domain = "GatherBlockQuantized", CONTRIB
        ids = gather.input[1]
        del gather.input[:], gather.attribute[:]
        gather.input.extend([f"{codes}_rows", ids, *others])
        numbers = {"bits": matrix.bits, "block_size": matrix.block,
                   "gather_axis": 0, "quantize_axis": 1}  # fmt: skip
        gather.attribute.extend(
            self._onnx.helper.make_attribute(key, value) for key, value in numbers.items()
        )

    def _stored(self, weight: str, matrix: Matrix) -> list[str]:
        """Names of codes, scales and zero points."""
        names = [f"{weight}_Q{matrix.bits}G{matrix.block}", f"{weight}_scale"]
        self._tensors[names[0]] = matrix.packed_codes()
        self._widened(names[1], matrix.scales)
        zero_points = matrix.packed_zero_points()
        if zero_points is not None:
            names.append(f"{weight}_zp")
            self._tensors[names[-1]] = zero_points
        return names

    def _with_means(self, node: Any, matrix: Matrix) -> str:
        """The node's input, followed by the means of its blocks, padded to whole blocks."""
        source, make = node.input[0], self._onnx.helper.make_node
        known = self._extended.get((source, matrix.digits))
        if known is not None:
            return known
        blocks = matrix.blocks
        added = self._before.setdefault(node.name, [])
        padding = mean_columns(blocks) - blocks
        means = f"{source}_means"
        appended = [means, self._zeros(source, padding, added)] if padding else [means]
        extended = f"{means}_{matrix.digits}"
        added += [
            # One node that reads nothing but its input: reshaping and summing are two, and a
            # product with a matrix of ones has that matrix to read.
            make("AveragePool", [source], [means], name=means,
                 kernel_shape=[BLOCK], strides=[BLOCK]),
            make("Concat", [source, *appended * matrix.digits], [extended], name=extended, axis=-1),
        ]  # fmt: skip
        self._extended[source, matrix.digits] = extended
        return extended

    def _zeros(self, source: str, columns: int, added: list[Any]) -> str:
        """As many rows of zeros as `source` has; computed once for all matrices of a model."""
        name = f"nearfar/zeros_{columns}"
        if name not in self._zeros_known:
            self._zeros_known.add(name)
            self._tensors[f"{name}_columns"] = np.array([columns], np.int64)
            make = self._onnx.helper.make_node
            added += [
                make("Shape", [source], [f"{name}_rows"], name=f"{name}_rows", start=0, end=-1),
                make("Concat", [f"{name}_rows", f"{name}_columns"], [f"{name}_shape"],
                     name=f"{name}_shape", axis=0),
                make("ConstantOfShape", [f"{name}_shape"], [name], name=name),
            ]  # fmt: skip
        return name

    def _split(self, nodes: Sequence[Any], rows: list[int]) -> None:
        first, whole = nodes[0], f"{nodes[0].output[0]}_merged"
        sizes = f"nearfar/rows_{'_'.join(map(str, rows))}"
        self._tensors[sizes] = np.array(rows, np.int64)
        self._after[first.name] = [
            self._onnx.helper.make_node(
                "Split", [whole, sizes], [node.output[0] for node in nodes],
                name=f"{first.name}_split", axis=-1,
            )
        ]  # fmt: skip
        first.output[0] = whole
        self._merged.update(node.name for node in nodes[1:])

    def _widened(self, name: str, numbers: np.ndarray) -> None:
        """A constant that the graph sees as FP32 under `name`, stored as it is.

        ONNX Runtime widens FP16 once, when it loads the model (constant folding).
        """
        if numbers.dtype != np.float16:
            self._tensors[name] = numbers
            return
        if f"{name}_fp16" in self._tensors:
            return
        self._tensors[f"{name}_fp16"] = numbers
        self._tensors.pop(name, None)
        self._first.append(
            self._onnx.helper.make_node(
                "Cast", [f"{name}_fp16"], [name], name=f"{name}_widened",
                to=self._onnx.TensorProto.FLOAT,
            )
        )  # fmt: skip

    def finish(self) -> None:
        """Apply everything.

        Raises:
            ConversionError: The graph has two nodes of one name.
        """
        graph = self._model.graph
        nodes = list(self._first)
        for node in graph.node:
            if node.name not in self._merged:
                nodes += [*self._before.get(node.name, ()), node, *self._after.get(node.name, ())]
        nodes = self._without_unread(nodes)
        if len({node.name for node in nodes}) != len(nodes):
            raise ConversionError(
                "The model builder gave two nodes one name",
                fix="Use another algorithm for int4 in the recipe, such as k_quant_mixed",
            )
        made = {output for node in self._first for output in node.output}
        read = {name for node in nodes for name in node.input}
        kept = [
            tensor for tensor in graph.initializer
            if tensor.name not in self._tensors and tensor.name not in made and tensor.name in read
        ]  # fmt: skip
        new = [
            self._onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
            for name, array in self._tensors.items()
        ]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *new])
        # What the builder noted about shapes may no longer hold; ONNX Runtime infers it anew.
        changed = made | self._tensors.keys()
        shapes = [value for value in graph.value_info if value.name not in changed]
        del graph.value_info[:]
        graph.value_info.extend(shapes)
        del graph.node[:]
        graph.node.extend(nodes)

    def _without_unread(self, nodes: list[Any]) -> list[Any]:
        """Without what only a changed node read, such as the transposition of a shared table."""
        read = {name for node in nodes for name in node.input}
        read |= {output.name for output in self._model.graph.output}
        kept = [node for node in nodes if read.intersection(node.output)]
        return kept if len(kept) == len(nodes) else self._without_unread(kept)
