"""Weights of matrix products in blocks of 4 and 8 bits, of models that are no language models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.commands import convert as command
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.plan import plan
from converters.recipe_file import read_recipe
from converters.report.contents import report_in
from converters.settings import Gates, Int4Settings, Int8Settings, Settings
from converters.sources.onnx_file import open_onnx
from converters.steps.weight_blocks import Blocks
from nearfar.bundle import Bundle, open_bundle
from nearfar.cli import run
from nearfar.errors import ConversionError

WIDTH, OUT = 72, 48
RANDOM = np.random.default_rng(0)
SIZES = {"bits": 4, "symmetric": False, "accuracy_level": 4}


def weights(*shape: int) -> np.ndarray:
    return (RANDOM.standard_normal(shape) / 8).astype(np.float32)


def info(name: str, *shape: object) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A product, a `Gemm` as PyTorch writes it, another with its weights, and a small one."""
    names = {"first": weights(WIDTH, WIDTH), "second": weights(OUT, WIDTH), "bias": weights(OUT),
             "small": weights(OUT, 4), "little": weights(4)}  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["a"], name="product"),
            helper.make_node("Gemm", ["a", "second", "bias"], ["b"], name="linear", transB=1),
            helper.make_node("Gemm", ["x", "second"], ["c"], name="tied", transB=1),
            helper.make_node("Add", ["b", "c"], ["d"], name="sum"),
            helper.make_node("Gemm", ["d", "small", "little"], ["y"], name="head"),
        ],
        "layers",
        [info("x", "batch", WIDTH)],
        [info("y", "batch", 4)],
        [numpy_helper.from_array(array, name) for name, array in names.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "source").mkdir()
    onnx.save(made, tmp_path / "source" / "layers.onnx")
    return tmp_path / "source" / "layers.onnx"


def convert(model: Path, settings: Settings, *variants: str, **more: object) -> Bundle:
    options = ConversionOptions(
        variants=(*variants, "fp32"), measure=False, settings=settings, name="layers", replace=True
    )
    return convert_model(model, model.parent.parent / "bundle", options, **more)


def graph_of(bundle: Bundle, variant_id: str) -> onnx.GraphProto:
    return onnx.load(bundle.variant_entry(bundle.variant(variant_id))).graph


def blocks_of(graph: onnx.GraphProto) -> dict[str, dict[str, int]]:
    return {
        node.name: {one.name: one.i for one in node.attribute} | {"inputs": len(node.input)}
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }


def error(bundle: Bundle, variant_id: str) -> float:
    figures = {figure.metric: figure.value for figure in bundle.variant(variant_id).quality}
    return figures["relative_error"]


def test_products_and_linear_layers_get_blocks_of_four_bits(model: Path):
    bundle = convert(model, Settings(), "int4", "int8")
    bundle.verify()
    assert [variant.id for variant in bundle.manifest.variants] == ["fp32", "int8", "int4"]
    for variant_id, bits in (("int4", 4), ("int8", 8)):
        found = blocks_of(graph_of(bundle, variant_id))
        assert len(found) == 3
        # The small one stays as it is.
        assert [one.name for one in graph_of(bundle, variant_id).node if one.op_type == "Gemm"] == [
            "head"
        ]
        assert {one["bits"] for one in found.values()} == {bits}
        # Two read the same weights: they are stored once.
        names = [one.name for one in graph_of(bundle, variant_id).initializer]
        assert sum("_scales" in name for name in names) == 2
        assert len(names) == len(set(names))
    # With zero points by default, and 8 bits without.
    assert {one["inputs"] for one in blocks_of(graph_of(bundle, "int4")).values()} == {4}
    assert {one["inputs"] for one in blocks_of(graph_of(bundle, "int8")).values()} == {3}
    assert 0 < error(bundle, "int8") < 0.02 < error(bundle, "int4") < 0.3
    sizes = [bundle.variant(one).size_bytes for one in ("fp32", "int8", "int4")]
    assert sizes[2] < 0.75 * sizes[1] < 0.5 * sizes[0]
    assert "INT4, rounded to the nearest in blocks of 32" in {
        one.method for one in report_in(bundle).variants
    }


def test_block_size_and_symmetry_are_settings(model: Path, tmp_path: Path):
    int4 = Int4Settings(block_size=16, symmetric=True)
    recipe = tmp_path / "r.toml"
    int8 = Int8Settings(symmetric=False, block_size=16)
    fine = convert(model, Settings(int4=int4, int8=int8), "int4", "int8", save_recipe=recipe)
    found = blocks_of(graph_of(fine, "int4"))
    assert {(one["block_size"], one["inputs"]) for one in found.values()} == {(16, 3)}
    found = blocks_of(graph_of(fine, "int8"))
    assert {(one["block_size"], one["inputs"]) for one in found.values()} == {(16, 4)}
    settings = read_recipe(recipe).settings
    assert (settings.int4.block_size, settings.int4.algorithm) == (16, "rtn")
    arguments = [str(model), "-o", str(tmp_path / "again"), "--recipe", str(recipe)]
    assert run(command, arguments, program="nearfar convert") == 0
    again = open_bundle(tmp_path / "again")
    assert again.variant("int4").files == fine.variant("int4").files


@pytest.mark.parametrize(
    ("rows", "stated", "size"),
    [(384, 128, 128), (384, 256, 128), (30, 128, 32), (16, 256, 16), (1000, 16, 16), (72, 64, 32)],
)
def test_the_last_block_is_not_filled_up_in_vain(rows: int, stated: int, size: int):
    assert Blocks(block_size=stated, **SIZES).size_for(rows) == size


def test_the_worst_layers_keep_full_precision_until_the_gate_holds(model: Path, tmp_path: Path):
    lost = error(convert(model, Settings(), "int4"), "int4")
    recipe = tmp_path / "kept.toml"
    gated = Settings(gates=Gates(max_quality_drop=0.8 * lost))
    bundle = convert(model, gated, "int4", save_recipe=recipe)
    assert error(bundle, "int4") <= 0.8 * lost
    kept = read_recipe(recipe).settings.int4.keep
    assert 1 <= len(kept) <= 2
    operators = {node.name: node.op_type for node in graph_of(bundle, "int4").node}
    assert {operators[name] for name in kept} <= {"MatMul", "Gemm"}
    with pytest.raises(ConversionError, match="no node 'elsewhere'"):
        convert(model, Settings(int4=Int4Settings(keep=("elsewhere",))), "int4")


def test_a_model_without_products_is_told_so_and_where_its_weights_are(tmp_path: Path):
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "kernel"], ["y"], name="conv")],
        "conv",
        [info("x", "batch", 32, 16)],
        [info("y", "batch", 64, 14)],
        [numpy_helper.from_array(weights(64, 32, 3), "kernel")],
    )
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "conv.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    with pytest.raises(ConversionError, match=r"MatMul, Gemm.*its weights are in Conv \(1\)"):
        convert(path, Settings(), "int4")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("algorithm", ["awq", "carry", "k_quant_mixed"])
def test_ways_of_language_models_are_refused(model: Path, algorithm: str):
    with pytest.raises(ConversionError, match="is for language models"):
        convert(model, Settings(int4=Int4Settings(algorithm=algorithm)), "int4")


def test_products_inside_branches_get_blocks_too(tmp_path: Path):
    inner = {
        f"{which}_branch": helper.make_graph(
            [helper.make_node("Gemm", ["x", f"{which}_w"], [f"{which}_y"], name=which)],
            which,
            [],
            [info(f"{which}_y", 2, OUT)],
            [numpy_helper.from_array(weights(WIDTH, OUT), f"{which}_w")],
        )
        for which in ("then", "else")
    }
    graph = helper.make_graph(
        [
            helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
            helper.make_node("Greater", ["sum", "zero"], ["is_then"]),
            helper.make_node("If", ["is_then"], ["y"], name="choice", **inner),
        ],
        "branching",
        [info("x", 2, WIDTH)],
        [info("y", 2, OUT)],
        [numpy_helper.from_array(np.array(0, np.float32), "zero")],
    )
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "branching.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    bundle = convert(path, Settings(), "int4")
    assert 0 < error(bundle, "int4") < 0.3
    assert bundle.variant("int4").size_bytes < 0.35 * bundle.variant("fp32").size_bytes


def test_four_bits_are_added_to_a_bundle_and_planned(model: Path, tmp_path: Path):
    full = convert(model, Settings())
    options = ConversionOptions(variants=("int4",), measure=False)
    assert "quantize to INT4" in {step.title for step in plan(open_onnx(model), options).steps}
    bundle = convert_model(full.path, tmp_path / "more", options)
    assert [variant.id for variant in bundle.manifest.variants] == ["fp32", "int4"]
