"""Small ONNX graphs, each with one thing that TensorRT does not take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT8, INT64 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT64
WEIGHTS = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)

node = helper.make_node
value = helper.make_tensor_value_info


def constant(name: str, array: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def model(
    nodes: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    constants: Sequence[onnx.TensorProto] = (),
    *,
    opset: int = 20,
    has_contrib: bool = False,
    doc: str = "",
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(constants))
    opsets = [helper.make_opsetid("", opset)]
    if has_contrib:
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    made = helper.make_model(graph, opset_imports=opsets, doc_string=doc)
    made.ir_version = 10
    return made


def linear(doc: str = "") -> onnx.ModelProto:
    """``y = x @ w``, x of shape (b, 16)."""
    return model(
        [node("MatMul", ["x", "w"], ["y"], "mm")],
        [value("x", FLOAT, ["b", 16])],
        [value("y", FLOAT, ["b", 8])],
        [constant("w", WEIGHTS)],
        doc=doc,
    )


def quantized(
    zero_point: int, dtype: Any, *, weight_point: int = 0, is_bias_int32: bool = False
) -> onnx.ModelProto:
    """The same with QDQ pairs, and a bias where that shall be INT32."""
    codes = np.clip(np.round(WEIGHTS * 20), -100, 100).astype(np.int8)
    nodes = [
        node("QuantizeLinear", ["x", "sx", "zx"], ["xq"], "qx"),
        node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"], "dqx"),
        node("DequantizeLinear", ["wq", "sw", "zw"], ["wd"], "dqw", axis=1),
    ]
    constants = [
        constant("sx", np.float32(0.03)),
        constant("zx", np.array(zero_point, dtype)),
        constant("wq", codes + np.int8(weight_point)),
        constant("sw", np.full(8, 0.05, np.float32)),
        constant("zw", np.full(8, weight_point, np.int8)),
    ]
    if is_bias_int32:
        nodes += [
            node("DequantizeLinear", ["bq", "sb"], ["bd"], "dqb", axis=0),
            node("Gemm", ["xd", "wd", "bd"], ["y"], "gemm"),
        ]
        constants += [
            constant("bq", np.arange(8).astype(np.int32)),
            constant("sb", np.full(8, 0.005, np.float32)),
        ]
    else:
        nodes.append(node("MatMul", ["xd", "wd"], ["y"], "mm"))
    return model(nodes, [value("x", FLOAT, ["b", 16])], [value("y", FLOAT, ["b", 8])], constants)


def table() -> onnx.ModelProto:
    """A lookup table with a scale for each row, as nearfar writes it."""
    random = np.random.default_rng(1)
    return model(
        [
            node("Gather", ["codes", "ids"], ["c"], "lookup"),
            node("Cast", ["c"], ["f"], "cast", to=FLOAT),
            node("Gather", ["scales", "ids"], ["s"], "lookup_scales"),
            node("Mul", ["f", "s"], ["y"], "scale"),
        ],
        [value("ids", INT64, ["b", "t"])],
        [value("y", FLOAT, ["b", "t", 8])],
        [
            constant("codes", random.integers(-127, 128, (100, 8)).astype(np.int8)),
            constant("scales", random.random((100, 1)).astype(np.float32)),
        ],
    )


def nbits(bits: int, *, depth: int = 64, scales: Any = None, has_bias: bool = False) -> Any:
    """``MatMulNBits``, blocks of 32, x of shape (b, depth)."""
    random = np.random.default_rng(bits)
    blocks = -(-depth // 32)
    packed = random.integers(0, 256, (8, blocks, 32 * bits // 8)).astype(np.uint8)
    scale = random.random(8 * blocks).astype(np.float32) if scales is None else scales
    inputs = ["x", "w", "s", "", "", "bias"] if has_bias else ["x", "w", "s"]
    return model(
        [
            node(
                "MatMulNBits", inputs, ["y"], "nb", domain="com.microsoft",
                K=depth, N=8, bits=bits, block_size=32,
            )
        ],
        [value("x", FLOAT, ["b", depth])],
        [value("y", FLOAT, ["b", 8])],
        [constant("w", packed), constant("s", scale), constant("bias", np.ones(8, np.float32))][
            : 3 if has_bias else 2
        ],
        has_contrib=True,
    )  # fmt: skip


def branching() -> onnx.ModelProto:
    """``rate`` decides which of two products is taken; inside, the number of axes decides."""

    def inner(name: str, operator: str, factor: float) -> Any:
        return helper.make_graph(
            [
                node("Constant", [], [f"{name}_k"], value=constant("", np.float32(factor))),
                node(operator, ["x", f"{name}_k"], [f"{name}_y"]),
                node("Shape", [f"{name}_y"], [f"{name}_s"]),
                node("Size", [f"{name}_s"], [f"{name}_rank"]),
                node("Constant", [], [f"{name}_two"], value=constant("", np.int64(2))),
                node("Equal", [f"{name}_rank", f"{name}_two"], [f"{name}_is"]),
                node(
                    "If", [f"{name}_is"], [f"{name}_out"], f"{name}_rank_if",
                    then_branch=helper.make_graph(
                        [node("Identity", [f"{name}_y"], [f"{name}_a"])], "a", [],
                        [value(f"{name}_a", FLOAT, None)],
                    ),
                    else_branch=helper.make_graph(
                        [node("Squeeze", [f"{name}_y"], [f"{name}_b"])], "b", [],
                        [value(f"{name}_b", FLOAT, None)],
                    ),
                ),
            ],
            name, [], [value(f"{name}_out", FLOAT, None)],
        )  # fmt: skip

    return model(
        [
            node("Equal", ["rate", "high"], ["is_high"], "which"),
            node(
                "If", ["is_high"], ["y"], "rate_if",
                then_branch=inner("t", "Mul", 2.0), else_branch=inner("e", "Add", 3.0),
            ),
        ],
        [value("x", FLOAT, ["b", 4]), value("rate", INT64, [])],
        [value("y", FLOAT, ["b", 4])],
        [constant("high", np.int64(16000))],
    )  # fmt: skip


def with_operator(
    operator: str, *, domain: str = "", dtype: int = FLOAT, opset: int = 20
) -> onnx.ModelProto:
    """One operator between input and output; good to look at, not to run."""
    return model(
        [node(operator, ["x"], ["y"], "it", domain=domain)],
        [value("x", dtype, ["b", 4])],
        [value("y", dtype, ["b", 4])],
        opset=opset,
        has_contrib=bool(domain),
    )


def save(made: onnx.ModelProto, path: Path) -> Path:
    onnx.save(made, str(path))
    return path
