"""SmoothQuant: the same model in full precision, and a better one in eight bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.plan import plan
from converters.recipe_file import read_recipe
from converters.report.contents import report_in
from converters.settings import Int8Settings, Settings
from converters.sources.onnx_file import open_onnx
from converters.steps.smooth import smooth
from nearfar.bundle import Bundle
from nearfar.errors import ConversionError

WIDTH = 64
RANDOM = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    return (RANDOM.standard_normal(shape) / 8).astype(np.float32)


def rows(count: int = 32) -> np.ndarray:
    """Two channels are a hundred times the others, as in transformers."""
    found = RANDOM.standard_normal((count, WIDTH)).astype(np.float32)
    found[:, [3, 17]] *= 100
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A norm whose output two products read, one of them a `Gemm`; a fourth reads their sum.

    Weights are small where activations are large, so that all channels count alike.
    """
    scale = np.ones(WIDTH, np.float32)
    scale[[5, 40]] = 60
    names = {"scale": scale, "shift": weights(WIDTH), "bias": weights(WIDTH)}
    names |= {name: weights(WIDTH, WIDTH) for name in ("in", "q", "k", "out")}
    names["in"][[3, 17]] /= 100
    names["q"][[5, 40]] /= 60
    names["k"][:, [5, 40]] /= 60
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "in"], ["a"], name="first"),
            helper.make_node("LayerNormalization", ["a", "scale", "shift"], ["n"], name="norm"),
            helper.make_node("MatMul", ["n", "q"], ["b"], name="query"),
            helper.make_node("Gemm", ["n", "k", "bias"], ["c"], name="key", transB=1),
            helper.make_node("Add", ["b", "c"], ["d"], name="sum"),
            helper.make_node("MatMul", ["d", "out"], ["e"], name="last"),
            helper.make_node("Add", ["e", "d"], ["y"], name="residual"),
        ],
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in names.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (tmp_path / "source").mkdir()
    onnx.save(made, tmp_path / "source" / "attention.onnx")
    np.savez(tmp_path / "source" / "rows.npz", x=rows(64))
    return tmp_path / "source" / "attention.onnx"


def answer(path: Path, x: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]


def smoothed(model: Path, alpha: float, **more: object) -> tuple[onnx.GraphProto, object]:
    target = model.parent / "smoothed.onnx"
    feeds = [{"x": rows()}]
    done = smooth(
        model, target, feeds=feeds, alpha=alpha, max_error=1e-4, work=model.parent, **more
    )
    x = rows()
    np.testing.assert_allclose(answer(target, x), answer(model, x), rtol=1e-3, atol=1e-2)
    return onnx.load(target).graph, done


def test_factors_are_those_of_the_paper_and_go_into_the_norm_where_they_can(model: Path):
    graph, done = smoothed(model, 0.5)
    assert (done.products, done.folded, done.inserted) == (4, 1, 2)
    operators = [node.op_type for node in graph.node]
    assert operators.count("Mul") == 2
    stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    before = {one.name: numpy_helper.to_array(one) for one in onnx.load(model).graph.initializer}
    (norm,) = [node for node in graph.node if node.op_type == "LayerNormalization"]
    factors = before["scale"] / stored[norm.input[1]]
    np.testing.assert_allclose(before["shift"] / stored[norm.input[2]], factors, rtol=1e-4)
    names = {node.name: node.input[1] for node in graph.node if "MatMul" in node.op_type}
    np.testing.assert_allclose(stored[names["query"]], before["q"] * factors[:, None], rtol=1e-4)
    assert "q" not in stored
    # Activations 60 times as large and weights 60 times as small: both become like the others.
    assert 30 < factors[5] / np.median(factors) < 120


def test_a_kept_node_stays_and_what_reads_its_input_too(model: Path):
    graph, done = smoothed(model, 0.5, keep=("query", "first"))
    assert (done.products, done.folded, done.inserted) == (2, 0, 2)
    assert {one.name for one in graph.initializer} >= {"in", "q", "scale"}


def test_weights_that_several_products_read_are_scaled_for_each(model: Path):
    made = onnx.load(model)
    made.graph.node[0].input[1] = "q"
    onnx.save(made, model)
    graph, _ = smoothed(model, 0.5)
    names = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    assert names["first"] != names["query"]
    assert "q" not in {one.name for one in graph.initializer}
    graph, _ = smoothed(model, 0.5, keep=("query",))
    assert "q" in {one.name for one in graph.initializer}


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_smoothing_makes_eight_bits_better(model: Path, tmp_path: Path, method: str):
    def convert(alpha: float | None, **more: object) -> Bundle:
        settings = Settings(int8=Int8Settings(method=method, smooth=alpha))
        options = ConversionOptions(
            variants=("int8", "fp32"), measure=False, settings=settings, replace=True,
            samples=model.parent / "rows.npz",
        )  # fmt: skip
        return convert_model(model, tmp_path / "bundle", options, **more)

    def error(bundle: Bundle) -> float:
        figures = {one.metric: one.value for one in bundle.variant("int8").quality}
        return figures["relative_error_unfused"]

    plain = error(convert(None))
    bundle = convert(0.5, save_recipe=tmp_path / "r.toml")
    bundle.verify()
    assert error(bundle) < 0.6 * plain
    assert read_recipe(tmp_path / "r.toml").settings.int8.smooth == 0.5
    assert any("smoothed (alpha 0.5)" in one.method for one in report_in(bundle).variants)
    options = ConversionOptions(
        variants=("int8",), settings=Settings(int8=Int8Settings(method=method, smooth=0.5))
    )
    titles = [step.title for step in plan(open_onnx(model), options).steps]
    assert "move what is hard to round into weights" in titles


def test_it_needs_rounded_activations_and_products(model: Path, tmp_path: Path):
    settings = Settings(int8=Int8Settings(smooth=0.5))
    options = ConversionOptions(variants=("int8", "fp32"), measure=False, settings=settings)
    with pytest.raises(ConversionError, match="where activations are rounded"):
        convert_model(model, tmp_path / "bundle", options)
    with pytest.raises(ConversionError, match="the model has none"):
        smoothed(model, 0.5, keep=("first", "query", "key", "last"))
    with pytest.raises(ConversionError, match="not the same model"):
        smooth(
            model, tmp_path / "s.onnx", feeds=[{"x": rows()}], alpha=0.5, max_error=1e-12,
            work=tmp_path,
        )  # fmt: skip
