"""Conversions with variants for TensorRT, asked of the stand-in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from converters.commands import convert as command
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.plan import plan
from converters.recipe_file import options_of, read_recipe
from converters.report.contents import report_in
from converters.settings import Gates, Settings, TensorrtSettings
from converters.sources.detect import open_source
from nearfar.bundle import Bundle
from nearfar.cli import run
from nearfar.errors import ConfigError, ConversionError
from tests.converters.tensorrt import graphs
from tests.support.tensorrt_path import use_stand_in

ALL = ("fp32", "trt-fp32", "trt-fp16", "trt-bf16", "trt-int8")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    weights = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    model = graphs.model(
        [
            graphs.node("MatMul", ["x", "w"], ["h"], "first"),
            graphs.node("Relu", ["h"], ["r"], "relu"),
            graphs.node("MatMul", ["r", "v"], ["y"], "second"),
        ],
        [graphs.value("x", graphs.FLOAT, ["batch", 16])],
        [graphs.value("y", graphs.FLOAT, ["batch", 16])],
        [graphs.constant("w", weights), graphs.constant("v", weights.T.copy())],
    )
    return graphs.save(model, tmp_path / "source" / "layers.onnx")


def converted(
    source: Path, *, variants: tuple[str, ...] = ALL, gate: float | None = None, **tensorrt: object
) -> Bundle:
    settings = Settings(
        tensorrt=TensorrtSettings(**tensorrt),  # type: ignore[arg-type]
        gates=Gates(max_quality_drop=gate),
    )
    options = ConversionOptions(variants=variants, measure=False, settings=settings, replace=True)
    target = source.parent.parent / "bundle"
    return convert_model(source, target, options, save_recipe=source.parent.parent / "r.toml")


def test_each_variant_is_typed_onnx_with_its_ranges(source: Path):
    bundle = converted(source, axes={"batch": (1, 2, 32)})
    variants = {variant.id: variant for variant in bundle.manifest.variants}
    assert tuple(variants) == ALL
    assert [variant.quality_rank for variant in variants.values()] == [0, 1, 2, 3, 4]
    weights = {}
    for name in ALL[1:]:
        variant = variants[name]
        assert variant.engine == "tensorrt"
        assert variant.precision == name[4:]
        assert variant.tensorrt is not None
        assert variant.tensorrt.profile[0].largest == (32, 16)
        assert variant.tensorrt_check is None
        graph = onnx.load(bundle.variant_entry(variant)).graph
        weights[name] = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
        # Inputs and outputs stay as the manifest has them.
        assert graph.input[0].type.tensor_type.elem_type == graphs.FLOAT
        figures = {figure.metric: figure.value for figure in variant.quality}
        assert figures["relative_error"] < {"trt-int8": 0.08, "trt-bf16": 0.008}.get(name, 0.001)
        assert not [metric for metric in figures if metric.endswith("_unfused")]
    types = onnx.TensorProto
    assert weights == {
        "trt-fp32": {types.FLOAT}, "trt-fp16": {types.FLOAT16}, "trt-bf16": {types.BFLOAT16},
        "trt-int8": {types.INT8},
    }  # fmt: skip


def test_int8_is_signed_and_symmetric_and_the_rest_fp16_or_fp32(source: Path):
    for rest, scale_type in (("fp16", onnx.TensorProto.FLOAT16), ("fp32", graphs.FLOAT)):
        bundle = converted(source, variants=("trt-int8",), rest=rest)
        graph = onnx.load(bundle.variant_entry(bundle.variant("trt-int8"))).graph
        stored = {tensor.name: tensor for tensor in graph.initializer}
        pairs = [node for node in graph.node if node.op_type.endswith("quantizeLinear")]
        pairs += [node for node in graph.node if node.op_type == "QuantizeLinear"]
        assert pairs
        for node in pairs:
            point = onnx.numpy_helper.to_array(stored[node.input[2]])
            assert point.dtype == np.int8
            assert not point.any()
            assert stored[node.input[1]].data_type == scale_type
        # One scale for each channel of a weight.
        assert any(stored[node.input[1]].dims == [64] for node in graph.node
                   if node.op_type == "DequantizeLinear")  # fmt: skip


def test_the_rest_of_an_old_graph_stays_fp32(source: Path):
    model = onnx.load(source)
    model.opset_import[0].version = 17  # FP16 scales came with 19
    onnx.save(model, str(source))
    bundle = converted(source, variants=("trt-int8",))
    graph = onnx.load(bundle.variant_entry(bundle.variant("trt-int8"))).graph
    assert not any(t.data_type == onnx.TensorProto.FLOAT16 for t in graph.initializer)


def test_the_gate_speaks_and_the_recipe_repeats_ranges_and_files(source: Path):
    first = converted(source, variants=("fp32", "trt-fp16"), check=True)
    for variant in first.manifest.variants:
        assert variant.tensorrt_check is not None
        assert variant.tensorrt_check.accepted
        assert variant.tensorrt_check.library == "tensorrt_rtx 10.3.0"
    path = source.parent.parent / "r.toml"
    recipe = read_recipe(path)
    assert recipe.settings.tensorrt.axes == {"batch": (1, 4, 16)}
    assert recipe.settings.tensorrt.check
    again = convert_model(source, source.parent.parent / "again", options_of(recipe, path))
    assert (again.path / "manifest.json").read_bytes() == (
        first.path / "manifest.json"
    ).read_bytes()


def test_what_tensorrt_refuses_is_left_out(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("NEARFAR_TEST_TENSORRT", "crash")
    arguments = [str(source), "-o", str(source.parent.parent / "b"), "--no-measure",
                 "--variants", "trt-fp32,fp32", "--check-tensorrt"]  # fmt: skip
    assert run(command, arguments, program="nearfar convert") == 0
    said = capsys.readouterr().out
    assert "TensorRT refuses trt-fp32" in said
    from nearfar.bundle import open_bundle

    bundle = open_bundle(source.parent.parent / "b")
    (variant,) = bundle.manifest.variants
    # ONNX Runtime runs it all the same, and its TensorRT provider would not.
    assert variant.id == "fp32"
    assert variant.tensorrt_check is not None
    assert not variant.tensorrt_check.accepted
    with pytest.raises(ConversionError, match="No variant is good enough"):
        converted(source, variants=("trt-fp32",), check=True)


def test_a_variant_that_loses_too_much_is_left_out(source: Path):
    bundle = converted(source, variants=("fp32", "trt-int8"), gate=0.0)
    assert [variant.id for variant in bundle.manifest.variants] == ["fp32"]
    report = report_in(bundle)
    assert set(report.histograms) == {"trt-int8"}
    layers = [one for one in report.layers if one.kind == "inside"]
    assert [one.variant_id for one in layers] == ["trt-int8"]
    (row,) = [one for one in report.variants if one.id == "trt-int8"]
    assert "the damage comes from" in row.reason


def test_a_variant_that_is_another_model_is_left_out_and_the_others_are_made(
    source: Path, monkeypatch: pytest.MonkeyPatch
):
    from converters.recipes import tensorrt

    def broken(before: Path, target: Path) -> None:
        model = onnx.load(before)
        weights = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
        array = onnx.numpy_helper.to_array(weights) * np.float32(np.nan)
        weights.CopyFrom(onnx.numpy_helper.from_array(array, "w"))
        onnx.save(model, str(target))

    monkeypatch.setattr(tensorrt, "to_half", broken)
    bundle = converted(source, variants=("fp32", "trt-fp32", "trt-fp16"))
    assert [variant.id for variant in bundle.manifest.variants] == ["fp32", "trt-fp32"]
    assert not (bundle.path / "trt-fp16").exists()


def test_nodes_that_lose_most_stay_and_are_in_the_recipe(source: Path):
    bundle = converted(source, variants=("fp32", "trt-int8"), gate=0.008)
    recipe = read_recipe(source.parent.parent / "r.toml")
    loss = [f.value for v in bundle.manifest.variants if v.id == "trt-int8"
            for f in v.quality if f.metric == "relative_error"]  # fmt: skip
    if loss:
        assert loss[0] <= 0.008
        assert recipe.settings.tensorrt.keep
    assert not recipe.settings.int8.keep


def test_an_input_is_fixed_and_remembered(tmp_path: Path):
    (tmp_path / "source").mkdir()
    source = graphs.save(graphs.branching(), tmp_path / "source" / "b.onnx")
    bundle = converted(source, variants=("fp32", "trt-fp16"), fixed={"rate": 16000.0})
    variant = bundle.variant("trt-fp16")
    assert variant.tensorrt is not None
    assert variant.tensorrt.fixed == {"rate": 16000.0}
    graph = onnx.load(bundle.variant_entry(variant)).graph
    assert [value.name for value in graph.input] == ["x"]
    assert {spec.name for spec in bundle.manifest.inputs} == {"x", "rate"}
    figures = {figure.metric: figure.value for figure in variant.quality}
    assert figures["relative_error"] < 0.001


def test_an_axis_that_does_not_exist_is_told(source: Path):
    with pytest.raises(ConfigError, match="no free axis 'tokens'"):
        converted(source, axes={"tokens": (1, 2, 3)})


def test_the_dry_run_knows_the_variants(source: Path):
    planned = plan(open_source(source), ConversionOptions(variants=ALL))
    assert planned.variants == ALL


def test_only_full_precision_becomes_a_variant_for_tensorrt(tmp_path: Path):
    source = graphs.save(graphs.quantized(0, np.int8), tmp_path / "q.onnx")
    with pytest.raises(ConversionError, match="cannot be made"):
        convert_model(source, tmp_path / "b", ConversionOptions(variants=("trt-fp16",)))
