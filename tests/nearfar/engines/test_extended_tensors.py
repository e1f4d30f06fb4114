"""BF16, 8-bit and 4-bit inputs and outputs, which ONNX Runtime's Python API has no arrays for."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from nearfar.bundle.manifest import TensorSpec
from nearfar.engines import load_engine
from nearfar.engines.base import SessionOptions
from nearfar.errors import EngineError, InvalidInput
from nearfar.tensors import EXTENDED, numpy_of
from tests.nearfar.engines.test_onnxruntime_engine import write_bundle

ml_dtypes = pytest.importorskip("ml_dtypes")
pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")

ONNX_TYPE = {
    "BF16": TensorProto.BFLOAT16,
    "FP8E4M3FN": TensorProto.FLOAT8E4M3FN,
    "FP8E4M3FNUZ": TensorProto.FLOAT8E4M3FNUZ,
    "FP8E5M2": TensorProto.FLOAT8E5M2,
    "FP8E5M2FNUZ": TensorProto.FLOAT8E5M2FNUZ,
    "INT4": TensorProto.INT4,
    "UINT4": TensorProto.UINT4,
    "FP32": TensorProto.FLOAT,
    "BYTES": TensorProto.STRING,
}


def casting_engine(path, *pairs, shape=("n",)):
    """A model that turns each input, of the first type of its pair, into the second."""
    nodes, inputs, outputs = [], [], []
    for number, (source, target) in enumerate(pairs):
        settings = {"to": ONNX_TYPE[target]} if source != target else {}
        nodes.append(
            helper.make_node(
                "Cast" if settings else "Identity", [f"x{number}"], [f"y{number}"], **settings
            )
        )
        inputs.append(helper.make_tensor_value_info(f"x{number}", ONNX_TYPE[source], shape))
        outputs.append(helper.make_tensor_value_info(f"y{number}", ONNX_TYPE[target], shape))
    graph = helper.make_graph(nodes, "made", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    sizes = tuple(-1 if isinstance(size, str) else size for size in shape)
    bundle = write_bundle(
        path,
        model,
        inputs=tuple(
            TensorSpec(name=f"x{number}", datatype=pair[0], shape=sizes)
            for number, pair in enumerate(pairs)
        ),
        outputs=tuple(
            TensorSpec(name=f"y{number}", datatype=pair[1], shape=sizes)
            for number, pair in enumerate(pairs)
        ),
    )
    return load_engine(bundle, "fp32", SessionOptions(threads=1))


@pytest.mark.parametrize("datatype", sorted(EXTENDED))
@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_values_go_in_and_come_out(tmp_path, datatype, count):
    engine = casting_engine(tmp_path / "b", (datatype, "FP32"), ("FP32", datatype))
    dtype = numpy_of(datatype)
    lowest = 0 if datatype == "UINT4" else -2
    values = np.arange(lowest, lowest + count, dtype=np.float32)
    found = engine.infer({"x0": values.astype(dtype), "x1": values})
    assert found["y0"].dtype == np.float32
    assert found["y0"].tolist() == values.tolist()
    assert found["y1"].dtype == dtype
    assert found["y1"].astype(np.float32).tolist() == values.tolist()


def test_arrays_in_any_memory_order_and_outputs_that_outlive_the_next_call(tmp_path):
    engine = casting_engine(tmp_path / "b", ("BF16", "BF16"), ("UINT4", "FP32"), shape=("n", 3))
    wide = np.arange(12, dtype=np.float32).reshape(2, 6)
    feeds = {
        "x0": wide.astype(ml_dtypes.bfloat16)[:, ::2],
        "x1": wide.astype(ml_dtypes.uint4)[:, ::2],
    }
    first = engine.infer(feeds)
    engine.infer({name: np.zeros_like(array) for name, array in feeds.items()})
    assert first["y0"].astype(np.float32).tolist() == wide[:, ::2].tolist()
    assert first["y1"].tolist() == wide[:, ::2].tolist()


def test_strings_beside_them_are_refused_when_the_model_is_loaded(tmp_path):
    with pytest.raises(EngineError, match="has strings beside BF16"):
        casting_engine(tmp_path / "b", ("BF16", "FP32"), ("BYTES", "BYTES"))


def test_the_plain_array_of_the_same_bits_is_refused(tmp_path):
    engine = casting_engine(tmp_path / "b", ("BF16", "FP32"))
    with pytest.raises(InvalidInput, match="has dtype uint16, expected bfloat16") as caught:
        engine.infer({"x0": np.ones(2, np.uint16)})
    assert caught.value.fix == "Convert it: array.astype(ml_dtypes.bfloat16)"
