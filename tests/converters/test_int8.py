"""INT8 by weights, dynamically, statically, and with sensitive nodes kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.commands import convert as command
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.recipe_file import find_recipe, read_recipe
from converters.settings import CalibrationSettings, Gates, Int8Settings, Settings
from converters.steps.gate import UNFUSED, quality_drop, refusal
from converters.steps.quantize import Int8Quantizer
from converters.steps.sensitivity import Damage, choose, rank
from nearfar.bundle import Bundle
from nearfar.bundle.manifest import QualityFigure
from nearfar.cli import run
from nearfar.errors import ConfigError, ConversionError

WIDTH = 64


def initializer(name: str, array: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(array.astype(np.float32), name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers; the second has one column a thousand times the others, so rounding hurts it."""
    random = np.random.default_rng(1)
    first = random.standard_normal((WIDTH, WIDTH)) / 8
    second = random.standard_normal((WIDTH, WIDTH)) / 8
    second[5] *= 1000  # blocks of 8 bits then have steps as large as the other weights
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["a"], name="harmless"),
            helper.make_node("Mul", ["a", "mask"], ["b"], name="mask_out"),
            helper.make_node("MatMul", ["b", "second"], ["y"], name="sensitive"),
        ],
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        [
            initializer("first", first),
            initializer("second", second),
            # The large row is never used: full precision does not notice it.
            initializer("mask", np.where(np.arange(WIDTH) == 5, 0.0, 1.0)),
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    made.ir_version = 9
    (tmp_path / "source").mkdir()
    onnx.save(made, tmp_path / "source" / "layers.onnx")
    return tmp_path / "source" / "layers.onnx"


def inputs(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{"x": random.standard_normal((1, WIDTH)).astype(np.float32)} for _ in range(count)]


def convert(model: Path, int8: Int8Settings, gate: float | None = None, **more: object) -> Bundle:
    settings = Settings(int8=int8, gates=Gates(max_quality_drop=gate))
    options = ConversionOptions(
        variants=("int8", "fp32"), measure=False, settings=settings, name="layers"
    )
    return convert_model(model, model.parent.parent / "bundle", options, **more)


def operators(bundle: Bundle) -> list[str]:
    path = bundle.variant_entry(bundle.variant("int8"))
    return [node.op_type for node in onnx.load(path).graph.node]


def figures(bundle: Bundle, variant_id: str = "int8") -> dict[str, float]:
    return {figure.metric: figure.value for figure in bundle.variant(variant_id).quality}


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_static_int8_has_calibrated_ranges(model: Path, method: str):
    int8 = Int8Settings(
        method="static", calibration=CalibrationSettings(method=method, percentile=99.9)
    )
    bundle = convert(model, int8)
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(operators(bundle))
    found = figures(bundle)
    # On the graph as written, and as this CPU's kernels compute it.
    assert found["relative_error"] > 0
    assert 0 < found["relative_error" + UNFUSED] < 1.5
    assert "relative_error" + UNFUSED not in figures(bundle, "fp32")


def test_static_int8_for_tensorrt_is_signed_and_symmetric(model: Path):
    calibration = CalibrationSettings(target="tensorrt")
    bundle = convert(model, Int8Settings(method="static", calibration=calibration))
    graph = onnx.load(bundle.variant_entry(bundle.variant("int8"))).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert nodes
    for node in nodes:
        zero_point = stored[node.input[2]]
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
    assert not any(array.dtype == np.int32 for array in stored.values())


def test_dynamic_int8_rounds_activations_in_every_call(model: Path):
    bundle = convert(model, Int8Settings(method="dynamic"))
    assert "MatMulInteger" in operators(bundle)


def test_damage_is_measured_for_each_node(model: Path, tmp_path: Path):
    quantizer = Int8Quantizer(model, tmp_path, Int8Settings(), ())
    assert set(quantizer.candidates) == {"harmless", "sensitive"}
    worst, other = rank(quantizer, model, inputs(8), tmp_path)
    assert (worst.node, other.node) == ("sensitive", "harmless")
    assert worst.error > 100 * other.error


def test_the_worst_node_is_kept_until_the_gate_holds(model: Path, tmp_path: Path):
    plain = convert(model, Int8Settings())
    assert operators(plain).count("MatMul") == 0
    lost = figures(plain)["relative_error"]
    recipe = tmp_path / "kept.toml"
    (tmp_path / "bundle").rename(tmp_path / "plain")
    bundle = convert(model, Int8Settings(), gate=0.05, save_recipe=recipe)
    assert operators(bundle).count("MatMul") == 1
    assert figures(bundle)["relative_error"] <= 0.05 < lost
    # What was found is part of the recipe, so that another machine finds the same.
    assert read_recipe(recipe).settings.int8.keep == ("sensitive",)


def test_a_variant_that_loses_too_much_is_left_out_and_the_reason_said(model: Path):
    lines: list[str] = []

    class Heard:
        def say(self, text: str) -> None:
            lines.append(text)

    from converters.reporting import Reporter

    reporter = Reporter()
    reporter.say = Heard().say  # type: ignore[method-assign]
    bundle = convert(model, Int8Settings(max_kept=0), gate=0.05, reporter=reporter)
    assert [variant.id for variant in bundle.manifest.variants] == ["fp32"]
    assert not (bundle.path / "int8").exists()
    bundle.verify()
    (line,) = [line for line in lines if line.startswith("! int8 loses")]
    assert "the limit is 5.0%" in line


def test_no_bundle_is_made_when_no_variant_is_left(model: Path):
    settings = Settings(int8=Int8Settings(max_kept=0), gates=Gates(max_quality_drop=0.05))
    options = ConversionOptions(variants=("int8",), measure=False, settings=settings)
    with pytest.raises(ConversionError, match="No variant is good enough: int8 loses"):
        convert_model(model, model.parent.parent / "bundle", options)
    assert not (model.parent.parent / "bundle").exists()


def test_a_node_to_keep_must_exist(model: Path):
    with pytest.raises(ConversionError, match="no node 'elsewhere'"):
        convert(model, Int8Settings(keep=("elsewhere",)))


@pytest.mark.parametrize(
    ("needed", "max_kept", "kept", "holds"),
    [(0, 8, 0, True), (1, 8, 1, True), (3, 8, 3, True), (8, 8, 8, True), (5, 4, 4, False)],
)
def test_as_few_nodes_are_kept_as_are_needed(needed: int, max_kept: int, kept: int, holds: bool):
    ranked = [Damage(f"n{number}", 20.0 - number) for number in range(10)]
    tried: list[int] = []

    def judge(keep: object) -> float:
        tried.append(len(keep))  # type: ignore[arg-type]
        return 0.0 if tried[-1] >= needed else 1.0 - tried[-1] / 100

    choice = choose(ranked, judge, limit=0.01, max_kept=max_kept)
    assert (len(choice.keep), choice.holds) == (kept, holds)
    assert choice.keep == tuple(f"n{number}" for number in range(kept))
    assert len(tried) == len(set(tried)) <= 6


def test_tables_are_rounded_row_by_row(tmp_path: Path):
    random = np.random.default_rng(0)
    table = random.standard_normal((256, 16)).astype(np.float32)
    table[::2] *= 1000  # one scale for all would leave nothing of the small rows
    table[7] = 0
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["y"], name="lookup")],
        "table",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", 16])],
        [initializer("table", table)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    made.ir_version = 9
    onnx.save(made, tmp_path / "m.onnx")
    quantizer = Int8Quantizer(tmp_path / "m.onnx", tmp_path, Int8Settings())
    assert quantizer.candidates == ("lookup",)
    quantizer.write(tmp_path / "int8.onnx")
    ids = np.arange(256).reshape(4, 64)
    (found,) = onnxruntime.InferenceSession(tmp_path / "int8.onnx").run(None, {"ids": ids})
    rows = np.abs(table[ids] - found).max(axis=-1)
    assert (rows <= np.abs(table[ids]).max(axis=-1) / 254 + 1e-6).all()
    assert (tmp_path / "int8.onnx").stat().st_size < 0.45 * (tmp_path / "m.onnx").stat().st_size


def figure(metric: str, value: float) -> QualityFigure:
    return QualityFigure(
        metric=metric, value=value, higher_is_better=True, samples=1000, reference="fp32"
    )


def test_the_gate_looks_at_the_figure_that_speaks_for_the_task():
    assert quality_drop([figure("cosine_mean", 0.99), figure("recall_at_10", 0.9)]) == (
        "recall_at_10", pytest.approx(0.1),
    )  # fmt: skip
    found = quality_drop([figure("perplexity", 18.0)], reference_perplexity=16.0)
    assert found == ("perplexity", pytest.approx(0.125))
    assert quality_drop([figure("max_abs_error", 0.1)]) is None
    assert refusal("int8", [figure("recall_at_10", 0.9)], None) is None
    assert refusal("int8", [figure("recall_at_10", 0.98)], 0.03) is None


def test_a_variant_that_saturates_on_this_cpu_is_left_out_and_the_model_not_blamed():
    found = [figure("top1_agreement", 0.114), figure("top1_agreement" + UNFUSED, 0.995)]
    said = refusal("int8", found, 0.01)
    assert said is not None
    assert "88.6%" in said.reason
    assert "saturate" in said.reason
    assert "--int8 weights" in said.hint


def test_the_command_line_takes_method_and_gate(model: Path, tmp_path: Path, capsys):
    base = [str(model), "-o", str(tmp_path / "b"), "--variants", "int8,fp32", "--no-measure"]
    recipe = tmp_path / "r.toml"
    options = ["--int8", "static", "--max-quality-drop", "90%", "--save-recipe", str(recipe)]
    assert run(command, [*base, *options], program="nearfar convert") == 0
    settings = read_recipe(recipe).settings
    assert (settings.int8.method, settings.gates.max_quality_drop) == ("static", 0.9)
    assert run(command, [*base, "--max-quality-drop", "much"], program="nearfar convert") == 2
    assert "Write it as 1% or as 0.01" in capsys.readouterr().err


def test_recipes_that_nearfar_brings_are_found_by_name(model: Path, capsys):
    for name in ("minilm-int8",):
        assert read_recipe(find_recipe(Path(name))).settings.gates.max_quality_drop == 0.03
    with pytest.raises(ConfigError, match="minilm-int8"):
        find_recipe(Path("no-such-recipe"))
    arguments = [str(model), "-o", "b", "--recipe", "minilm-int8"]
    assert run(command, arguments, program="nearfar convert") == 1
    assert "for a source of kind huggingface" in " ".join(capsys.readouterr().err.split())
