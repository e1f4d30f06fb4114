"""Weights in 8 and 16 bits for operators without such kernels, inside branches too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.commands import convert
from converters.steps.round_weights import halve_weights, round_weights
from nearfar.bundle import open_bundle
from nearfar.cli import run

GENERATOR = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    # Channels of very different size, which one scale for all would ruin.
    sizes = np.geomspace(0.01, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (GENERATOR.standard_normal(shape) * sizes).astype(np.float32)


def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))


def branching_model(opset: int = 17) -> onnx.ModelProto:
    """``x`` [1, 8, 16]: a convolution, then one of two branches with products of their own; one
    reads a constant of the outer graph."""
    branches = {}
    for which in ("then", "else"):
        nodes = [
            constant(f"{which}_w", weights(32, 64)),
            helper.make_node("Gemm", ["flat", f"{which}_w" if which == "then" else "shared"],
                             [f"{which}_y"], name=f"{which}_gemm",
                             transB=int(which == "else")),
        ]  # fmt: skip
        if which == "then":
            nodes[0] = constant("then_w", weights(32, 64).T.copy())
        branches[f"{which}_branch"] = helper.make_graph(
            nodes, which, [],
            [helper.make_tensor_value_info(f"{which}_y", TensorProto.FLOAT, [4, 32])],
        )  # fmt: skip
    graph = helper.make_graph(
        [
            constant("shared", weights(32, 64)),
            helper.make_node("Conv", ["x", "kernel"], ["c"], name="conv", pads=[1, 1]),
            helper.make_node("Reshape", ["c", "shape"], ["flat"]),
            helper.make_node("If", ["is_then"], ["y"], **branches),
        ],
        "branching",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 16]),
            helper.make_tensor_value_info("is_then", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 32])],
        [
            numpy_helper.from_array(weights(16, 8, 3), "kernel"),
            numpy_helper.from_array(np.array([4, 64], np.int64), "shape"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def answers(model: onnx.ModelProto) -> list[np.ndarray]:
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = np.random.default_rng(1).standard_normal((1, 8, 16)).astype(np.float32)
    return [session.run(None, {"x": x, "is_then": np.array(which)})[0] for which in (True, False)]


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.05), ("fp16", 0.002), ("bf16", 0.01)])
def test_rounded_weights_answer_nearly_the_same_in_every_branch(kind: str, most: float):
    model = branching_model()
    expected, before = answers(model), model.ByteSize()
    if kind == "int8":
        assert round_weights(model, (), least_weights=256) == 3
    else:
        # One is read by nobody.
        assert halve_weights(model, least_weights=256, kind=kind) == 4
    for found, wanted in zip(answers(model), expected, strict=True):
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        assert 0 < error < most
    assert model.ByteSize() < before * 0.65


def test_nodes_to_keep_and_small_weights_stay(tmp_path):
    model = branching_model()
    assert round_weights(model, ("conv", "then_gemm", "else_gemm"), least_weights=256) == 0
    assert round_weights(model, ("conv",), least_weights=256) == 2
    assert round_weights(branching_model(), (), least_weights=10_000) == 0
    assert round_weights(branching_model(opset=11), (), least_weights=256) == 0


def test_numbers_that_16_bits_cannot_hold_stay():
    model = branching_model()
    kernel = numpy_helper.to_array(model.graph.initializer[0]).copy()
    kernel[0, 0, 0] = 1e6
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(kernel, "kernel"))
    assert halve_weights(model, least_weights=256) == 3
    assert model.graph.initializer[0].data_type == TensorProto.FLOAT


def test_bf16_has_the_range_of_32_bits_but_for_its_very_end():
    model = branching_model()
    kernel = numpy_helper.to_array(model.graph.initializer[0]).copy()
    kernel[0, 0] = [1e30, -1e-30, 0.1]
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(kernel, "kernel"))
    assert halve_weights(model, least_weights=256, kind="bf16") == 4
    (stored,) = [node.attribute[0].t for node in model.graph.node if node.name == "kernel_bf16"]
    assert stored.data_type == TensorProto.BFLOAT16
    found = onnx.numpy_helper.to_array(stored).astype(np.float32)
    # Eight bits of precision, rounded to the nearest.
    np.testing.assert_allclose(found, kernel, rtol=2**-8)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert (found == kernel.astype(ml_dtypes.bfloat16).astype(np.float32)).all()
    kernel[0, 0, 0] = np.finfo(np.float32).min  # a mask: it would become infinite
    model = branching_model()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(kernel, "kernel"))
    assert halve_weights(model, least_weights=256, kind="bf16") == 3
    assert halve_weights(branching_model(opset=11), least_weights=256, kind="bf16") == 0


def test_one_command_makes_all_three_precisions_of_a_model_with_convolutions(tmp_path: Path):
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "kernel"], ["c"], pads=[1, 1]),
            helper.make_node("Relu", ["c"], ["y"]),
        ],
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 32, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64, 16])],
        [numpy_helper.from_array(weights(64, 32, 3), "kernel")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "conv.onnx")
    arguments = [str(tmp_path / "conv.onnx"), "-o", str(tmp_path / "b"), "--no-measure",
                 "--variants", "int8,bf16,fp16,fp32"]  # fmt: skip
    assert run(convert, arguments, program="nearfar convert") == 0
    variants = {variant.id: variant for variant in open_bundle(tmp_path / "b").manifest.variants}
    assert list(variants) == ["fp32", "fp16", "bf16", "int8"]
    sizes = [variant.size_bytes for variant in variants.values()]
    assert sizes[3] < 0.6 * sizes[2] < 0.4 * sizes[0]
    assert sizes[1] == pytest.approx(sizes[2], abs=64)
    errors = [
        next(f.value for f in variant.quality if f.metric == "relative_error")
        for variant in variants.values()
    ]
    assert errors[0] == 0 < errors[1] < 1e-3 < errors[2] < errors[3] < 0.02
