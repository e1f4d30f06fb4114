"""Graphs in 16 bits are judged as GPUs compute them, not as ONNX Runtime widens them on CPUs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.report.contents import report_in
from converters.steps.half_precision import to_half
from converters.steps.onnx_session import open_session, run
from converters.steps.rounding_twin import write_twin
from tests.converters.tensorrt import graphs


def squared(factor: float) -> onnx.ModelProto:
    """``y = x * x * factor``: what is between goes beyond FP16's range from 256 on."""
    return graphs.model(
        [
            graphs.node("Mul", ["x", "x"], ["h"], "square"),
            graphs.node("Mul", ["h", "k"], ["y"], "less"),
        ],
        [graphs.value("x", graphs.FLOAT, ["b", 4])],
        [graphs.value("y", graphs.FLOAT, ["b", 4])],
        [graphs.constant("k", np.float32(factor))],
    )


def test_every_value_is_rounded_to_fp16(tmp_path: Path):
    source, half, twin = (tmp_path / f"{name}.onnx" for name in ("full", "half", "twin"))
    graphs.save(squared(0.125), source)
    to_half(source, half)
    assert write_twin(half, twin)
    x = np.array([[3.14159, 0.1, 200, 7]], np.float32)
    (found,) = run(open_session(twin), {"x": x}, name="twin").values()
    short = x.astype(np.float16)
    assert np.array_equal(found, (short * short * np.float16(0.125)).astype(np.float32))
    kinds = {tensor.data_type for tensor in onnx.load(twin).graph.initializer}
    assert kinds == {TensorProto.FLOAT}


def test_a_variant_that_overflows_in_fp16_is_left_out(tmp_path: Path):
    (tmp_path / "source").mkdir()
    source = graphs.save(squared(0.001), tmp_path / "source" / "m.onnx")
    np.savez(tmp_path / "rows.npz", x=np.full((8, 4), 300, np.float32))
    options = ConversionOptions(
        variants=("fp32", "trt-fp16", "trt-bf16"), measure=False, samples=tmp_path / "rows.npz"
    )
    bundle = convert_model(source, tmp_path / "bundle", options)
    # BF16 has the range of FP32.
    assert [one.id for one in bundle.manifest.variants] == ["fp32", "trt-bf16"]
    (row,) = [one for one in report_in(bundle).variants if one.id == "trt-fp16"]
    assert "infinite" in row.reason


def test_a_graph_with_branches_has_no_twin(tmp_path: Path):
    source = graphs.save(graphs.branching(), tmp_path / "b.onnx")
    assert not write_twin(source, tmp_path / "twin.onnx")
    assert not (tmp_path / "twin.onnx").exists()
