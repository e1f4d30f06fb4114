"""ONNX Runtime's own operators in variants of 32 and 16 bits, where a recipe wants them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.plan import plan
from converters.recipe_file import read_recipe
from converters.settings import OptimiseSettings, Settings
from converters.sources.onnx_file import open_onnx
from converters.steps.fuse import is_same
from nearfar.bundle import Bundle

WIDTH = 64
RANDOM = np.random.default_rng(0)
FUSED = Settings(optimise=OptimiseSettings(fuse=True))


def write(path: Path, activation: str, factor: float = 1.0) -> Path:
    first, second = RANDOM.standard_normal((2, WIDTH, WIDTH)).astype(np.float32) / 8
    names = {"first": first * factor, "second": second, "bias": first[0]}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["a"], name="up"),
            helper.make_node("Add", ["a", "bias"], ["b"], name="bias_of_up"),
            helper.make_node(activation, ["b"], ["c"], name="activation"),
            helper.make_node("MatMul", ["c", "second"], ["y"], name="down"),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in names.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path.parent.mkdir(exist_ok=True)
    onnx.save(made, path)
    return path


def convert(model: Path, settings: Settings, *variants: str, **more: object) -> Bundle:
    options = ConversionOptions(variants=variants, measure=False, settings=settings)
    return convert_model(model, model.parent.parent / "bundle", options, **more)


def operators(bundle: Bundle, variant_id: str) -> set[str]:
    graph = onnx.load(bundle.variant_entry(bundle.variant(variant_id))).graph
    return {node.op_type for node in graph.node}


def test_a_recipe_may_want_fused_operators(tmp_path: Path):
    model = write(tmp_path / "source" / "mlp.onnx", "Gelu")
    recipe = tmp_path / "r.toml"
    bundle = convert(model, FUSED, "fp32", "bf16", "int8", save_recipe=recipe)
    bundle.verify()
    assert {"BiasGelu"} <= operators(bundle, "fp32") & operators(bundle, "bf16")
    # Eight bits are made of the plain graph.
    assert operators(bundle, "int8") == {"MatMulNBits", "Add", "Gelu"}
    figures = {one.metric: one.value for one in bundle.variant("fp32").quality}
    assert figures["relative_error"] < 1e-5
    assert read_recipe(recipe).settings.optimise == OptimiseSettings(fuse=True)
    options = ConversionOptions(settings=FUSED)
    titles = [step.title for step in plan(open_onnx(model), options).steps]
    assert "fuse operators for ONNX Runtime" in titles


def test_nothing_is_fused_unless_it_is_wished_and_fits(tmp_path: Path, capsys):
    plain = convert(write(tmp_path / "a" / "mlp.onnx", "Gelu"), Settings(), "fp32")
    assert "BiasGelu" not in operators(plain, "fp32")
    capsys.readouterr()
    other = tmp_path / "b" / "source" / "mlp.onnx"
    other.parent.parent.mkdir()
    bundle = convert(write(other, "Tanh"), FUSED, "fp32")
    assert operators(bundle, "fp32") == {"MatMul", "Add", "Tanh"}


@pytest.mark.parametrize(("factor", "expected"), [(1.0, False), (None, True)])
def test_a_graph_that_computes_something_else_is_noticed(tmp_path: Path, factor, expected):
    one = write(tmp_path / "one.onnx", "Gelu")
    other = one if factor is None else write(tmp_path / "other.onnx", "Gelu", factor)
    feeds = [{"x": np.ones((1, 2, WIDTH), np.float32)}]
    assert is_same(one, other, feeds, 1e-4) is expected
    assert is_same(one, tmp_path / "missing.onnx", feeds, 1e-4) is False
