"""What is seen in a graph without TensorRT, and what repairing changes in its numbers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from converters.tensorrt.branches import decide_branches, fix_inputs
from converters.tensorrt.findings import FIXES, Finding
from converters.tensorrt.repair import repair
from converters.tensorrt.scan import scan
from nearfar.bundle.manifest import ShapeRange
from nearfar.errors import ConversionError
from tests.converters.tensorrt import graphs


def run(model: onnx.ModelProto, **feeds: Any) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    # As written: the CPU's fused kernels round differently.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = {item.name for item in session.get_inputs()}
    return session.run(None, {name: feeds[name] for name in feeds if name in names})[0]


def repaired(model: onnx.ModelProto, **options: Any) -> tuple[onnx.ModelProto, list[Finding]]:
    changed = copy.deepcopy(model)
    findings = repair(changed, scan(changed), **options)
    onnx.checker.check_model(changed, full_check=True)
    return changed, findings


def kinds(findings: list[Finding]) -> list[str]:
    return [finding.kind for finding in findings]


X = np.random.default_rng(5).normal(size=(5, 16)).astype(np.float32)


def test_a_plain_graph_has_nothing_to_say():
    assert scan(graphs.linear()) == []


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (graphs.with_operator("DynamicQuantizeLinear"), "dynamic-quantization"),
        (graphs.with_operator("QLinearMatMul"), "operator-quantization"),
        (graphs.with_operator("Unique"), "data-dependent-shape"),
        (graphs.with_operator("GroupQueryAttention", domain="com.microsoft"),
         "group-query-attention"),
        (graphs.with_operator("FastGelu", domain="com.microsoft"), "contrib-operator"),
        (graphs.with_operator("Attention", opset=23), "attention-operator"),
        (graphs.with_operator("StringNormalizer", dtype=onnx.TensorProto.STRING),
         "unsupported-dtype"),
        (graphs.with_operator("Relu", dtype=onnx.TensorProto.DOUBLE), "double-precision"),
        (graphs.with_operator("Relu", opset=26), "opset-too-new"),
        (graphs.with_operator("Relu", opset=22), "opset-above-20"),
        (graphs.branching(), "control-flow"),
    ],
)  # fmt: skip
def test_what_tensorrt_refuses_is_seen_in_the_graph(model: onnx.ModelProto, kind: str):
    found = scan(model)
    assert kind in kinds(found)
    finding = next(one for one in found if one.kind == kind)
    assert finding.fix == FIXES[finding.kind]
    assert str(finding).startswith(f"{kind}: ")


def test_some_things_are_for_a_trial_to_tell():
    (finding,) = scan(graphs.with_operator("FastGelu", domain="com.microsoft"))
    assert not finding.is_fatal
    (finding,) = scan(graphs.with_operator("Unique"))
    assert finding.is_fatal


def test_an_int32_bias_becomes_the_same_floats():
    model = graphs.quantized(0, np.int8, is_bias_int32=True)
    assert kinds(scan(model)) == ["int32-bias"]
    changed, findings = repaired(model)
    assert all(one.is_fixed for one in findings)
    assert scan(changed) == []
    np.testing.assert_array_equal(run(changed, x=X), run(model, x=X))


def test_a_zero_point_in_the_middle_becomes_signed_without_loss():
    model = graphs.quantized(128, np.uint8)
    assert kinds(scan(model)) == ["asymmetric-zero-point"]
    changed, findings = repaired(model)
    assert [str(one) for one in findings] == [
        "asymmetric-zero-point: zero points other than 0 (qx, dqx); fixed"
    ]
    assert scan(changed) == []
    np.testing.assert_allclose(run(changed, x=X), run(model, x=X), atol=1e-5)


@pytest.mark.parametrize(("point", "dtype"), [(0, np.uint8), (40, np.uint8), (-60, np.int8)])
def test_ranges_are_widened_to_symmetric_ones_that_hold_them(point: int, dtype: type):
    model = graphs.quantized(point, dtype)
    changed, _ = repaired(model)
    assert scan(changed) == []
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in changed.graph.initializer}
    quantize = next(n for n in changed.graph.node if n.op_type == "QuantizeLinear")
    scale, zero = stored[quantize.input[1]], stored[quantize.input[2]]
    assert zero.dtype == np.int8
    assert not zero.any()
    info = np.iinfo(dtype)
    assert scale * 127 >= 0.03 * max(point - info.min, info.max - point) * (1 - 1e-6)
    # The old grid had up to twice as many steps: half a step of the new one, through 16 products.
    inside = np.clip(X, 0.03 * (info.min - point), 0.03 * (info.max - point))
    error = np.abs(run(changed, x=inside) - run(model, x=inside)).max()
    assert 0 < error < scale * 0.75 * np.abs(graphs.WEIGHTS).sum(0).max()


def test_weights_with_a_zero_point_keep_their_values():
    model = graphs.quantized(0, np.int8, weight_point=3)
    assert kinds(scan(model)) == ["asymmetric-zero-point"]
    changed, _ = repaired(model)
    assert scan(changed) == []
    np.testing.assert_allclose(run(changed, x=X), run(model, x=X), rtol=1e-6)


def test_unsigned_numbers_are_seen_though_tensorrt_takes_them():
    # It reads them as signed, and everything above 127 is lost.
    (finding,) = scan(graphs.quantized(0, np.uint8))
    assert finding.kind == "unsigned-quantization"
    assert finding.is_fatal


def test_a_table_is_dequantized_before_it_is_looked_up():
    model = graphs.table()
    assert kinds(scan(model)) == ["bare-int8-table"]
    changed, _ = repaired(model)
    assert [node.op_type for node in changed.graph.node] == ["DequantizeLinear", "Gather"]
    assert scan(changed) == []
    ids = np.array([[0, 5, 99], [1, 1, 2]])
    np.testing.assert_array_equal(run(changed, ids=ids), run(model, ids=ids))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_bias", [False, True])
def test_weights_in_blocks_become_standard_operators(bits: int, has_bias: bool):
    model = graphs.nbits(bits, has_bias=has_bias)
    assert kinds(scan(model)) == ["matmul-nbits"]
    changed, findings = repaired(model)
    assert all(one.is_fixed for one in findings)
    assert {n.domain for n in changed.graph.node} == {""}
    assert [one.domain for one in changed.opset_import] == [""]
    stored = next(t for t in changed.graph.initializer if t.name == "nb_codes")
    assert stored.data_type == (onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.INT8)
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    # The original's kernel adds in another order.
    np.testing.assert_allclose(run(changed, x=x), run(model, x=x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("depth", [64, 80])
def test_scales_that_tensorrt_refuses_become_positive(depth: int):
    # ONNX Runtime gives scales a sign so that -128 is used; a last block may be shorter.
    blocks = -(-depth // 32)
    scales = np.linspace(-1, 1, 8 * blocks).astype(np.float32)
    scales[0] = 0
    model = graphs.nbits(8, depth=depth, scales=scales)
    changed, _ = repaired(model)
    for tensor in changed.graph.initializer:
        if tensor.name.endswith("_scales"):
            assert (onnx.numpy_helper.to_array(tensor) > 0).all()
    x = np.random.default_rng(1).normal(size=(3, depth)).astype(np.float32)
    np.testing.assert_allclose(run(changed, x=x), run(model, x=x), rtol=1e-4, atol=1e-2)


def test_what_cannot_be_repaired_is_not_said_to_be():
    model = graphs.with_operator("DynamicQuantizeLinear")
    findings = repair(model, scan(model))
    assert not any(one.is_fixed for one in findings)


RANGES = (ShapeRange(name="x", smallest=(1, 4), usual=(4, 4), largest=(8, 4)),)


@pytest.mark.parametrize("rate", [16000, 8000])
def test_a_fixed_input_leaves_one_branch(rate: int):
    model = graphs.branching()
    changed, findings = repaired(model, fixed={"rate": rate}, ranges=RANGES)
    assert all(one.is_fixed for one in findings)
    assert [item.name for item in changed.graph.input] == ["x"]
    assert not any(node.op_type == "If" for node in changed.graph.node)
    for batch in (1, 4, 8):
        x = np.random.default_rng(batch).normal(size=(batch, 4)).astype(np.float32)
        expected = run(model, x=x, rate=np.array(rate))
        np.testing.assert_array_equal(run(changed, x=x), expected)


def test_a_branch_that_an_input_decides_stays():
    model = graphs.branching()
    assert decide_branches(model, RANGES) == 0
    assert any(node.op_type == "If" for node in model.graph.node)


def test_a_branch_that_goes_both_ways_within_the_ranges_stays():
    model = graphs.branching()
    fix_inputs(model, {"rate": 16000})
    for value in model.graph.input:
        del value.type.tensor_type.shape.dim[:]  # any number of axes
        value.type.tensor_type.ClearField("shape")
    ranges = (ShapeRange(name="x", smallest=(4,), usual=(2, 4), largest=(8, 4)),)
    decide_branches(model, ranges)
    assert any(node.op_type == "If" for node in model.graph.node)


@pytest.mark.parametrize("name", ["x", "nothing"])
def test_only_inputs_of_one_number_can_be_fixed(name: str):
    with pytest.raises(ConversionError, match="cannot be fixed"):
        fix_inputs(graphs.branching(), {name: 1.0})
