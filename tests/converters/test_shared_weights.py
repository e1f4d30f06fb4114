"""Weights that several nodes read are rounded for each of them as it needs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.settings import CalibrationSettings, Int8Settings
from converters.steps.onnx_session import open_session, run
from converters.steps.quantize import Int8Quantizer
from converters.steps.shared_weights import part_shared, static_form

ROWS, COLUMNS = 24, 40
WAYS = {
    "static": Int8Settings(method="static"),
    "static for TensorRT": Int8Settings(
        method="static", calibration=CalibrationSettings(target="tensorrt")
    ),
    "static per tensor": Int8Settings(method="static", per_channel=False),
    "dynamic": Int8Settings(method="dynamic"),
    "dynamic per tensor": Int8Settings(method="dynamic", per_channel=False),
}
#: What reads the weight first and second: the first gives as many numbers as the second takes.
PAIRS = [("gemm", "turned"), ("product", "turned"), ("turned", "gemm"), ("turned", "product"),
         ("table", "turned")]  # fmt: skip
#: The same of a square one, where a wrong graph runs.
SQUARE = [("turned", "turned"), ("product", "product"), ("gemm", "turned"), ("table", "turned")]


def tied(first: str, second: str, *, rows: int, columns: int) -> onnx.ModelProto:
    """Two nodes that read one weight, and a `Relu` between them."""
    random = np.random.default_rng(3)
    widths = {"gemm": columns, "product": columns, "turned": rows, "table": columns}

    def reader(kind: str, given: str, made: str) -> onnx.NodeProto:
        if kind == "table":
            return helper.make_node("Gather", ["w", given], [made], name=made)
        if kind == "product":
            return helper.make_node("MatMul", [given, "w"], [made], name=made)
        bias = f"{made}_bias"
        return helper.make_node("Gemm", [given, "w", bias], [made], name=made,
                                transB=int(kind == "turned"))  # fmt: skip

    nodes = [reader(first, "x", "a"), helper.make_node("Relu", ["a"], ["b"], name="relu"),
             reader(second, "b", "y")]  # fmt: skip
    stored = {
        "w": random.normal(size=(rows, columns)),
        "a_bias": random.normal(size=widths[first]),
        "y_bias": random.normal(size=widths[second]),
    }
    used = {name for node in nodes for name in node.input}
    given = (
        helper.make_tensor_value_info("x", TensorProto.INT64, ["b"])
        if first == "table"
        else helper.make_tensor_value_info(
            "x", TensorProto.FLOAT, ["b", columns if first == "turned" else rows]
        )
    )
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", widths[second]])
    graph = helper.make_graph(
        nodes, "tied", [given], [made],
        [numpy_helper.from_array(array.astype(np.float32), name)
         for name, array in stored.items() if name in used],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    return model


def feeds_of(path: Path) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(4)
    (given,) = onnx.load(path).graph.input
    if given.type.tensor_type.elem_type == TensorProto.INT64:
        return [{"x": random.integers(0, ROWS, 4)} for _ in range(8)]
    width = given.type.tensor_type.shape.dim[1].dim_value
    return [{"x": random.normal(size=(4, width)).astype(np.float32)} for _ in range(8)]


def loss(source: Path, quantized: Path, *, is_unfused: bool) -> float:
    """Relative error of the rounded model."""
    feeds = feeds_of(source)
    wanted, found = (
        np.concatenate([run(session, one, name="it")["y"] for one in feeds])
        for session in (open_session(source), open_session(quantized, is_unfused=is_unfused))
    )
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("pair", "rows", "columns"),
    [*((pair, ROWS, COLUMNS) for pair in PAIRS), *((pair, ROWS, ROWS) for pair in SQUARE)],
)
def test_a_shared_weight_is_right_for_all_that_read_it(
    tmp_path: Path, way: str, pair: tuple[str, str], rows: int, columns: int
):
    source, target = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(tied(*pair, rows=rows, columns=columns), source)
    Int8Quantizer(source, tmp_path, WAYS[way], feeds_of(source)).write(target)
    assert loss(source, target, is_unfused=True) < 0.03
    # CPUs without VNNI saturate in some of these kernels; a graph that is wrong is off by all.
    assert loss(source, target, is_unfused=False) < 0.5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pair", [("gemm", "turned"), ("product", "product")])
def test_a_node_that_is_kept_gets_the_weight_in_full_precision(
    tmp_path: Path, way: str, pair: tuple[str, str]
):
    source, target = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(tied(*pair, rows=ROWS, columns=ROWS), source)
    Int8Quantizer(source, tmp_path, WAYS[way], feeds_of(source)).write(target, ["y"])
    graph = onnx.load(target).graph
    floats = [numpy_helper.to_array(tensor) for tensor in graph.initializer
              if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2]  # fmt: skip
    assert len(floats) == 1
    weights = numpy_helper.to_array(onnx.load(source).graph.initializer[0])
    assert np.array_equal(floats[0], weights) or np.array_equal(floats[0], weights.T)
    (name,) = [tensor.name for tensor in graph.initializer
               if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2]  # fmt: skip
    readers = [node for node in graph.node if name in node.input]
    assert [node.name for node in readers] in (["y"], ["y_MatMul"])


def test_weights_are_copied_only_where_they_must(tmp_path: Path):
    model = tied("product", "product", rows=ROWS, columns=ROWS)
    assert part_shared(model, static_form((), per_channel=True)) == ()
    model = tied("gemm", "turned", rows=ROWS, columns=COLUMNS)
    assert part_shared(model, static_form((), per_channel=False)) == ()
    assert part_shared(model, static_form((), per_channel=True)) == ("w",)
    assert [tensor.name for tensor in model.graph.initializer] == ["w", "a_bias", "y_bias", "w_2"]
    onnx.checker.check_model(model)
