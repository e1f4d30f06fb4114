"""Take branches out of a graph that always go the same way.

TensorRT takes an `If` only where both branches give the same ranks. Exporters leave many whose
condition asks for a size or a number of axes; with known ranges of sizes, one branch is dead.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from converters.libraries import load, quiet
from converters.tensorrt.graph import Graph, nodes_below
from nearfar.bundle.manifest import ShapeRange
from nearfar.errors import ConversionError

#: Inlining a branch brings the ones inside it to the top.
_MAX_DEPTH = 32


def fix_inputs(model: Any, fixed: Mapping[str, float]) -> None:
    """Replace inputs of one number by that number.

    Raises:
        ConversionError: There is no such input, or it has more than one number.
    """
    onnx = load("onnx")
    inputs = {value.name: value for value in model.graph.input}
    for name, number in fixed.items():
        value = inputs.get(name)
        sizes = [] if value is None else [d.dim_value for d in value.type.tensor_type.shape.dim]
        if value is None or any(size != 1 for size in sizes):
            raise ConversionError(
                f"{name!r} cannot be fixed: "
                + ("the model has no such input" if value is None else "it has a free size"),
                fix="Fix inputs of one number; `nearfar bundle inspect` lists the inputs",
            )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        array = np.full(sizes, number).astype(dtype)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        model.graph.input.remove(value)


def decide_branches(model: Any, ranges: Sequence[ShapeRange]) -> int:
    """Keep of every `If` the branch that is taken, where that is the same for all sizes.

    The condition must not depend on what is in the inputs, only on their sizes. The graph is run
    with the smallest, the usual and the largest sizes to see which way each goes.

    Args:
        model: An `onnx.ModelProto`, changed in place.
        ranges: Sizes of the inputs.

    Returns:
        How many were decided.
    """
    decided = 0
    for _ in range(_MAX_DEPTH):
        taken = _taken(model, ranges)
        if not taken:
            break
        for output, is_then in taken.items():
            _inline(model, output, is_then)
        decided += len(taken)
    if decided:
        _fold(model)
    return decided


def has_open_branch(model: Any) -> bool:
    """Whether an `If` at the top depends on what is in the inputs."""
    graph = Graph(model)
    return any(
        node.op_type == "If" and node.input[0] in graph.depends_on_inputs for node in graph.nodes
    )


def _taken(model: Any, ranges: Sequence[ShapeRange]) -> dict[str, bool]:
    """First output of each `If` that can be decided, and whether its condition holds."""
    graph = Graph(model)
    asked = {
        node.output[0]: node.input[0]
        for node in graph.nodes
        if node.op_type == "If" and node.input[0] not in graph.depends_on_inputs
    }
    if not asked:
        return {}
    seen: dict[str, set[bool]] = {output: set() for output in asked}
    session = _session(model, sorted(set(asked.values())))
    for shapes in _shapes(model, ranges):
        values = session(shapes)
        if values is None:
            return {}
        for output, condition in asked.items():
            seen[output].add(bool(np.asarray(values[condition]).reshape(-1)[0]))
    return {output: next(iter(found)) for output, found in seen.items() if len(found) == 1}


def _shapes(model: Any, ranges: Sequence[ShapeRange]) -> list[dict[str, tuple[int, ...]]]:
    by_name = {one.name: one for one in ranges}
    stored = {tensor.name for tensor in model.graph.initializer}
    found = []
    for which in ("smallest", "usual", "largest"):
        shapes: dict[str, tuple[int, ...]] = {}
        for value in model.graph.input:
            if value.name in stored:
                continue
            sizes = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            one = by_name.get(value.name)
            shapes[value.name] = sizes if one is None else getattr(one, which)
        found.append(shapes)
    return found


def _session(model: Any, conditions: list[str]) -> Any:
    """A function from input shapes to the values of conditions; `None` where it does not run."""
    onnx, ort = load("onnx"), load("onnxruntime")
    asking = copy.deepcopy(model)
    del asking.graph.output[:]
    asking.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, None) for name in conditions
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    try:
        with quiet():
            session = ort.InferenceSession(
                asking.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
    except Exception:  # noqa: BLE001 (a graph that ONNX Runtime does not load keeps its branches)
        return lambda shapes: None

    def values(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
        feeds = {
            one.name: np.zeros(
                shapes[one.name], onnx.helper.tensor_dtype_to_np_dtype(types[one.name])
            )
            for one in session.get_inputs()
        }
        try:
            with quiet():
                return dict(zip(conditions, session.run(conditions, feeds), strict=True))
        except Exception:  # noqa: BLE001 (sizes that the model cannot have are told by whoever builds it)
            return None

    return values


def _inline(model: Any, output: str, is_then: bool) -> None:
    """Put the nodes of one branch where its `If` is."""
    onnx = load("onnx")
    nodes = list(model.graph.node)
    place = next(
        i for i, node in enumerate(nodes) if node.op_type == "If" and output in node.output
    )
    node = nodes[place]
    branch = copy.deepcopy(Graph.attribute(node, "then_branch" if is_then else "else_branch"))
    inner = {name for one in branch.node for name in one.output}
    inner |= {tensor.name for tensor in branch.initializer}
    outer = {name for one in nodes for name in (*one.input, *one.output)}
    outer |= {tensor.name for tensor in model.graph.initializer}
    rename = {name: f"{name}__{place}" for name in inner & outer if name}
    for tensor in branch.initializer:
        tensor.name = rename.get(tensor.name, tensor.name)
    for one in nodes_below(branch):
        for names in (one.input, one.output):
            for position, name in enumerate(names):
                names[position] = rename.get(name, name)
    new = [
        *branch.node,
        *(
            onnx.helper.make_node("Identity", [rename.get(value.name, value.name)], [name])
            for value, name in zip(branch.output, node.output, strict=True)
        ),
    ]
    model.graph.initializer.extend(branch.initializer)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *new, *nodes[place + 1 :]])


def _fold(model: Any) -> None:
    """Drop what only the dead branches needed."""
    slim = load("onnxslim")
    try:
        with quiet():
            smaller = slim.slim(copy.deepcopy(model))
    except Exception:  # noqa: BLE001 (an optimiser's failure is no reason to fail: the model is fine)
        return
    model.CopyFrom(smaller)
