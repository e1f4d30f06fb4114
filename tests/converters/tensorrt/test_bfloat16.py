"""BF16 typed ONNX: what is in BF16, what stays in FP32, and the twin that it is judged by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.report.contents import report_in
from converters.settings import Gates, Settings
from converters.steps.bfloat16 import to_bfloat16
from converters.steps.onnx_session import open_session, run
from converters.steps.rounding_twin import write_twin
from nearfar.errors import ConversionError
from tests.converters.tensorrt import graphs

node, value, constant = graphs.node, graphs.value, graphs.constant
RANDOM = np.random.default_rng(5)
WIDE = RANDOM.normal(size=(8, 8)).astype(np.float32)


def written(model: onnx.ModelProto, folder: Path) -> tuple[Path, Path, Path]:
    """(source, in BF16, its twin)."""
    paths = folder / "m.onnx", folder / "b.onnx", folder / "t.onnx"
    graphs.save(model, paths[0])
    to_bfloat16(*paths[:2])
    assert write_twin(*paths[1:])
    return paths


def types_in(path: Path) -> dict[str, int]:
    """Name of a node to the type of what it makes."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
    onnx.checker.check_model(model)
    graph = model.graph
    kinds = {one.name: one.type.tensor_type.elem_type for one in (*graph.value_info, *graph.output)}
    return {one.name: kinds[one.output[0]] for one in graph.node}


def attention() -> onnx.ModelProto:
    """Scores of a product with a mask that is made of whole numbers, and a norm behind them."""
    lowest = np.finfo(np.float32).min
    return graphs.model(
        [
            node("MatMul", ["x", "w"], ["h"], "product"),
            node("Cast", ["mask"], ["seen"], "cast", to=TensorProto.FLOAT),
            node("Sub", ["one", "seen"], ["hidden"], "hidden"),
            node("Mul", ["hidden", "lowest"], ["added"], "lowest"),
            node("Add", ["h", "added"], ["scores"], "scores"),
            node("Softmax", ["scores"], ["shares"], "softmax", axis=-1),
            node("MatMul", ["shares", "w"], ["mixed"], "mixed"),
            node("Shape", ["mixed"], ["size"], "size"),
            node("Reshape", ["mixed", "size"], ["same"], "reshape"),
            node("LayerNormalization", ["same", "scale"], ["y"], "norm", axis=-1),
        ],
        [value("x", TensorProto.FLOAT, ["b", 8]), value("mask", TensorProto.INT64, ["b", 8])],
        [value("y", TensorProto.FLOAT, ["b", 8])],
        [
            constant("w", WIDE), constant("one", np.float32(1)), constant("lowest", lowest),
            constant("scale", np.ones(8, np.float32)),
        ],
    )  # fmt: skip


def test_products_are_in_bf16_and_sums_and_whole_numbers_in_fp32(tmp_path: Path):
    source, short, twin = written(attention(), tmp_path)
    types = types_in(short)
    for name in ("product", "scores", "mixed", "reshape"):
        assert types[name] == TensorProto.BFLOAT16, name
    for name in ("cast", "hidden", "lowest", "softmax", "norm"):
        assert types[name] == TensorProto.FLOAT, name
    # The size of a value in BF16 is asked without widening it.
    assert sum(one.op_type == "Cast" for one in onnx.load(short).graph.node) == 6
    mask = np.ones((3, 8), np.int64)
    mask[:, 5:] = 0
    feeds = {"x": RANDOM.normal(size=(3, 8)).astype(np.float32), "mask": mask}
    wanted, found = (run(open_session(path), feeds, name="it")["y"] for path in (source, twin))
    # Rounded, and masked still: what overflowed would be NaN.
    assert 1e-5 < np.abs(found - wanted).max() < 0.1


def test_the_twin_rounds_as_bf16_does(tmp_path: Path):
    _, short, twin = written(graphs.linear(), tmp_path)
    x = RANDOM.normal(size=(4, 16)).astype(np.float32)

    def rounded(array: np.ndarray) -> np.ndarray:
        bits = array.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view("f4")

    wanted = rounded(rounded(x) @ rounded(graphs.WEIGHTS))
    (found,) = run(open_session(twin), {"x": x}, name="twin").values()
    assert np.allclose(found, wanted, rtol=2**-7)
    assert (found == wanted).mean() > 0.9  # products are added up in another order
    assert {tensor.data_type for tensor in onnx.load(short).graph.initializer} == {
        TensorProto.BFLOAT16
    }


def test_convolutions_are_written_at_an_opset_that_has_them_in_bf16(tmp_path: Path):
    weights = RANDOM.normal(size=(4, 3, 3, 3)).astype(np.float32)
    model = graphs.model(
        [
            node("Conv", ["x", "w"], ["h"], "conv", pads=[1, 1, 1, 1]),
            node("Relu", ["h"], ["r"], "relu"),
            node("GlobalAveragePool", ["r"], ["y"], "pool"),
        ],
        [value("x", TensorProto.FLOAT, ["b", 3, 8, 8])],
        [value("y", TensorProto.FLOAT, ["b", 4, 1, 1])],
        [constant("w", weights)],
        opset=18,
    )
    _, short, _ = written(model, tmp_path)
    types = types_in(short)
    assert onnx.load(short).opset_import[0].version == 22
    assert {types[name] for name in ("conv", "relu", "pool")} == {TensorProto.BFLOAT16}


def test_angles_of_positions_stay_in_fp32(tmp_path: Path):
    """BF16 knows no 257: far positions would share their angles."""
    model = graphs.model(
        [
            node("Cast", ["at"], ["p"], "position", to=TensorProto.FLOAT),
            node("MatMul", ["p", "rates"], ["angle"], "angle"),
            node("Sin", ["angle"], ["s"], "sine"),
            node("Mul", ["x", "s"], ["y"], "turned"),
        ],
        [value("x", TensorProto.FLOAT, ["b", 8]), value("at", TensorProto.INT64, ["b", 1])],
        [value("y", TensorProto.FLOAT, ["b", 8])],
        [constant("rates", np.linspace(0.01, 1, 8, dtype=np.float32)[None])],
    )
    source, short, twin = written(model, tmp_path)
    types = types_in(short)
    assert (types["angle"], types["turned"]) == (TensorProto.FLOAT, TensorProto.BFLOAT16)
    feeds = {"x": np.ones((2, 8), np.float32), "at": np.array([[257], [1001]])}
    wanted, found = (run(open_session(path), feeds, name="it")["y"] for path in (source, twin))
    assert np.abs(found - wanted).max() < 0.01


def test_what_cannot_be_said_in_bf16_is_refused(tmp_path: Path):
    for model, message in (
        (graphs.nbits(4), "MatMulNBits is of com.microsoft"),
        (graphs.with_operator("Relu", opset=11), "opset 11 has no BF16"),
    ):
        graphs.save(model, tmp_path / "m.onnx")
        with pytest.raises(ConversionError, match=message) as caught:
            to_bfloat16(tmp_path / "m.onnx", tmp_path / "b.onnx")
        assert caught.value.fix


def test_layers_that_lose_much_are_named(tmp_path: Path):
    (tmp_path / "source").mkdir()
    source = graphs.save(attention(), tmp_path / "source" / "m.onnx")
    options = ConversionOptions(
        variants=("fp32", "trt-bf16"), measure=False,
        settings=Settings(gates=Gates(max_quality_drop=0.0)),
    )  # fmt: skip
    bundle = convert_model(source, tmp_path / "bundle", options)
    assert [one.id for one in bundle.manifest.variants] == ["fp32"]
    (row,) = [one for one in report_in(bundle).variants if one.id == "trt-bf16"]
    assert "the damage comes from" in row.reason
    (layers,) = [one for one in report_in(bundle).layers if one.kind == "inside"]
    assert {"product", "mixed"} <= {one.node for one in layers.errors}
