"""A GGUF file's own blocks, carried over bit for bit."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.steps.carry_gguf import _order
from converters.steps.carry_graph import GraphEditor
from converters.steps.gguf_blocks import BLOCK, Blocks, joined, matrix_of, read_blocks

gguf = pytest.importorskip("gguf")

ROWS, COLUMNS = 64, 96


def stored(kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bytes as in a GGUF file, and what gguf's own code reads from them."""
    random = np.random.default_rng(seed)
    weights = random.standard_normal((ROWS, COLUMNS)).astype(np.float32) + np.float32(0.3)
    data = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])
    return data, gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_the_same_numbers(kind: str):
    data, expected = stored(kind)
    blocks = read_blocks(kind, data)
    assert blocks is not None
    np.testing.assert_array_equal(blocks.dequantized(), expected)
    assert (blocks.minima is not None) == (kind == "Q4_1")
    matrix = matrix_of(blocks, digits=1)
    blocks_in_a_row = COLUMNS // BLOCK + (kind == "Q4_1")
    assert matrix.packed_codes().shape == (ROWS, blocks_in_a_row, 4 * blocks.bits)
    if kind != "Q4_1":
        np.testing.assert_array_equal(matrix.codes, blocks.codes)
        assert matrix.zero_points is None


@pytest.mark.parametrize("digits", [0, 1, 2, 3])
def test_minima_are_kept_as_exactly_as_digits_say(digits: int):
    data, expected = stored("Q4_1")
    blocks = read_blocks("Q4_1", data)
    assert blocks is not None
    matrix = matrix_of(blocks, digits=digits)
    steps = blocks.scales.astype(np.float32).max(axis=1, keepdims=True)
    error = np.abs(matrix.effective() - expected) / steps
    # Half a step, then a fifteenth of what was left; scales in half precision add a little.
    assert error.max() <= 0.5 / 15**digits * 1.02 + 1e-6
    # Codes and scales of the weights themselves are those of the file.
    own = COLUMNS // BLOCK
    np.testing.assert_array_equal(matrix.codes[:, :own], blocks.codes)
    np.testing.assert_array_equal(matrix.scales[:, :own], blocks.scales)


def test_a_block_of_equal_weights_is_exact():
    codes = np.zeros((2, 3, BLOCK), np.uint8)
    minima = np.array([[0.3, -0.01, 0], [7, 1e-4, -2]], np.float16)
    blocks = Blocks(4, codes, np.zeros((2, 3), np.float16), minima)
    matrix = matrix_of(blocks, digits=1)
    np.testing.assert_array_equal(matrix.effective(), blocks.dequantized())


def test_super_blocks_are_the_same_numbers():
    random = np.random.default_rng(0)
    # gguf's own package only reads this type, so the blocks are any bytes with sane factors.
    data = random.integers(0, 256, (5, 3, 144)).astype(np.uint8)
    factors = (random.random((5, 3, 2)) * [0.01, 0.1]).astype("<f2")
    data[..., :4] = factors.view(np.uint8)
    kind = gguf.GGMLQuantizationType.Q4_K
    expected = gguf.quants.dequantize(data.reshape(5, -1), kind)
    blocks = read_blocks("Q4_K", data.reshape(5, -1))
    assert blocks is not None
    np.testing.assert_array_equal(blocks.dequantized(), expected)
    matrix = matrix_of(blocks, digits=3)
    np.testing.assert_allclose(matrix.effective(), expected, atol=0.01)
    assert matrix.scales.dtype == np.float32


def test_types_without_an_equal_are_left_alone():
    assert read_blocks("Q6_K", np.zeros((1, 210), np.uint8)) is None


def node_model(
    *, table: bool = False, second: bool = False, columns: int = COLUMNS
) -> onnx.ModelProto:
    """Products as the model builder writes them; with `table` one that the embedding shares."""
    weight = numpy_helper.from_array(np.zeros((columns, ROWS), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="/lm_head/MatMul")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "tokens", ROWS])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "tokens", columns])]
    if second:
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["z"], name="second"))
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    if table:
        nodes[:0] = [
            helper.make_node("Transpose", ["w"], ["rows_of_w"], name="embed/Transpose"),
            helper.make_node("Gather", ["rows_of_w", "ids"], ["rows"], name="embed/Gather"),
        ]
        inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["tokens"]))
        outputs.append(helper.make_tensor_value_info("rows", TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    return model


def run_in_float(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs without the kernel's rounding of activations to 8 bits."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    session = onnxruntime.InferenceSession(model.SerializeToString())
    outputs: list[np.ndarray] = session.run(None, feeds)
    return outputs


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_the_graph_computes_with_the_weights_of_the_file(kind: str):
    data, weights = stored(kind)
    blocks = read_blocks(kind, data)
    assert blocks is not None
    model = node_model()
    editor = GraphEditor(onnx, model)
    matrix = matrix_of(blocks, digits=2)
    editor.quantize([model.graph.node[0]], [ROWS], matrix)
    editor.finish()
    onnx.checker.check_model(model)
    x = np.random.default_rng(1).standard_normal((1, 5, COLUMNS)).astype(np.float32)
    (found,) = run_in_float(model, {"x": x})
    np.testing.assert_allclose(found, x @ matrix.effective().T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, x @ weights.T, rtol=0.01, atol=0.01)
    assert "w" not in {tensor.name for tensor in model.graph.initializer}


@pytest.mark.parametrize("is_merged", [False, True])
def test_matrices_with_one_input_share_its_means_and_can_be_one(is_merged: bool):
    data, _ = stored("Q4_1")
    other_data, _ = stored("Q4_1", seed=1)
    blocks, other = read_blocks("Q4_1", data), read_blocks("Q4_1", other_data)
    assert blocks is not None
    assert other is not None
    model = node_model(second=True)
    editor = GraphEditor(onnx, model)
    nodes = list(model.graph.node)
    if is_merged:
        both = joined([blocks, other])
        assert both is not None
        editor.quantize(nodes, [ROWS, ROWS], matrix_of(both, digits=1))
    else:
        nodes[1].input[1] = "w2"
        for node, one in zip(nodes, [blocks, other], strict=True):
            editor.quantize([node], [ROWS], matrix_of(one, digits=1))
    editor.finish()
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("AveragePool") == operators.count("Concat") - 1 == 1  # one for zeros
    assert operators.count("MatMulNBits") == (1 if is_merged else 2)
    x = np.random.default_rng(1).standard_normal((1, 5, COLUMNS)).astype(np.float32)
    found = run_in_float(model, {"x": x})
    for y, one in zip(found, [blocks, other], strict=True):
        expected = x @ matrix_of(one, digits=1).effective().T
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_matrices_of_two_kinds_do_not_become_one():
    kinds = [read_blocks(kind, stored(kind)[0]) for kind in ("Q4_0", "Q4_1")]
    assert joined([blocks for blocks in kinds if blocks is not None]) is None
    assert joined([]) is None


def test_an_embedding_that_shares_the_matrix_reads_the_same_numbers():
    data, weights = stored("Q8_0")
    blocks = read_blocks("Q8_0", data)
    assert blocks is not None
    model = node_model(table=True)
    editor = GraphEditor(onnx, model)
    _, gather, product = model.graph.node
    matrix = matrix_of(blocks, digits=1)
    editor.quantize([product], [ROWS], matrix)
    editor.quantize_table(gather, "w", matrix)
    editor.finish()
    ids = np.array([3, 60, 3])
    feeds = {"x": np.zeros((1, 3, COLUMNS), np.float32), "ids": ids}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (rows,) = session.run(["rows"], feeds)
    np.testing.assert_array_equal(rows, weights[ids])


def test_an_embedding_shares_codes_with_zero_points_too():
    random = np.random.default_rng(0)
    head = Blocks(
        4,
        random.integers(0, 16, (ROWS, 3, 2 * BLOCK)).astype(np.uint8),
        (0.1 + 0.2 * random.random((ROWS, 3))).astype(np.float16),
        None,
        random.integers(5, 11, (ROWS, 3)).astype(np.uint8),
    )
    model = node_model(table=True, columns=6 * BLOCK)
    editor = GraphEditor(onnx, model)
    _, gather, product = model.graph.node
    matrix = matrix_of(head, digits=0)
    editor.quantize([product], [ROWS], matrix)
    editor.quantize_table(gather, "w", matrix)
    editor.finish()
    ids = np.array([3, 60, 3])
    x = random.standard_normal((1, 3, 6 * BLOCK)).astype(np.float32)
    y, rows = run_in_float(model, {"x": x, "ids": ids})
    np.testing.assert_allclose(y, x @ head.dequantized().T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rows, head.dequantized()[ids], rtol=1e-6)


def test_rows_are_found_by_their_numbers():
    data, weights = stored("Q4_0")
    blocks = read_blocks("Q4_0", data)
    assert blocks is not None
    np.testing.assert_array_equal(_order(blocks, weights), np.arange(ROWS))
    order = np.random.default_rng(0).permutation(ROWS)
    wanted = np.where(weights[order] == 0, np.float32(-0.0), weights[order])
    np.testing.assert_array_equal(_order(blocks, wanted), order)
    assert _order(blocks, weights + 1) is None
    assert _order(blocks, weights[:4]) is None
