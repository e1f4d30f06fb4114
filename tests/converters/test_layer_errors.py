"""Which layers of a compressed variant err: found, named, and what to do about it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.report.contents import report_in
from converters.report.evidence import LayerErrors
from converters.report.words import damage_of, mending_of
from converters.reporting import Reporter
from converters.settings import Gates, Int8Settings, Settings
from converters.steps import layer_errors as step
from converters.steps.layer_errors import layer_errors
from converters.steps.quantize import Int8Quantizer, store_half
from converters.steps.sensitivity import Damage
from converters.tensorrt.graph import nodes_below
from nearfar.bundle import Bundle
from nearfar.errors import ConversionError

WIDTH = 64
INPUTS = np.random.default_rng(0).standard_normal((24, WIDTH)).astype(np.float32)
FEEDS = [{"x": row[None]} for row in INPUTS]


def constant(name: str, array: object) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array, np.float32), name)


def layers(count: int = 5, bad: int = 2, *, inside_branch: bool = False) -> onnx.ModelProto:
    """A chain of products; before layer `bad` one value of 64 is dropped that 8 bits would need.

    Its weights have one large row, which no input reaches, so that blocks round the others away.
    """
    random = np.random.default_rng(1)
    stored, nodes, value = [], [], "x"
    for number in range(count):
        weights = random.standard_normal((WIDTH, WIDTH)) / 8
        if number == bad:
            weights[5] *= 300
            stored.append(constant("mask", np.arange(WIDTH) != 5))
            nodes.append(helper.make_node("Mul", [value, "mask"], ["masked"], name="mask_out"))
            value = "masked"
        stored.append(constant(f"w{number}", weights))
        out = "y" if number == count - 1 else f"h{number}"
        nodes.append(helper.make_node("MatMul", [value, f"w{number}"], [out], name=f"n{number}"))
        value = out
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])
    graph = helper.make_graph(nodes, "layers", [x], [y], stored)
    if inside_branch:
        zeros = helper.make_node("Mul", ["x", "zero"], ["y"], name="silence")
        other = helper.make_graph([zeros], "other", [], [y], [constant("zero", 0)])
        inner = helper.make_graph(nodes, "inner", [], [y], stored)
        sixteen = numpy_helper.from_array(np.int64(16_000), "sixteen")
        rate = helper.make_tensor_value_info("rate", TensorProto.INT64, [])
        graph = helper.make_graph(
            [
                helper.make_node("Equal", ["rate", "sixteen"], ["is_sixteen"]),
                helper.make_node("If", ["is_sixteen"], ["y"], then_branch=inner, else_branch=other),
            ],
            "outer", [x, rate], [y], [sixteen],
        )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    made.ir_version = 9
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    onnx.save(layers(), tmp_path / "source" / "layers.onnx")
    return tmp_path / "source" / "layers.onnx"


class Heard(Reporter):
    """Remembers what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def quantized(model: Path, folder: Path, method: str) -> Path:
    (folder / "int8").mkdir()
    path = folder / "int8" / "model.onnx"
    if method == "fp16":
        store_half(model, path, "fp16")
    else:
        Int8Quantizer(model, folder, Int8Settings(method=method), FEEDS).write(path)
    return path


@pytest.mark.parametrize("method", ["weights", "dynamic", "static"])
def test_the_layer_that_errs_is_found_and_those_after_it_are_not_blamed(
    model: Path, tmp_path: Path, method: str
):
    found = layer_errors(model, quantized(model, tmp_path, method), FEEDS, tmp_path)
    worst = found.layers[0]
    assert worst.node == "n2"
    assert worst.error > 0.5 * found.error
    assert worst.operator == "MatMul"
    by_name = {one.node: one for one in found.layers}
    # What comes after only carries the error on: its own is small.
    assert by_name["n4"].output_error > 0.5 * worst.own_error
    assert by_name["n4"].own_error < 0.2 * by_name["n4"].output_error
    assert by_name["n2"].input_error < 0.2 * worst.own_error
    # Nothing is left behind.
    assert not (tmp_path / "layer-errors").exists()


def test_sixteen_bits_err_a_little_everywhere(model: Path, tmp_path: Path):
    found = layer_errors(model, quantized(model, tmp_path, "fp16"), FEEDS, tmp_path)
    assert {one.node for one in found.layers} >= {"n0", "n1", "n2", "n3", "n4"}
    assert all(one.own_error < 1e-3 for one in found.layers)


def test_equal_graphs_have_nobody_to_blame(model: Path, tmp_path: Path):
    assert layer_errors(model, model, FEEDS, tmp_path) == step.Comparison()


def test_of_many_layers_the_worst_are_found_in_few_runs(tmp_path: Path, monkeypatch):
    runs: list[int] = []
    original = step._Effect.__call__

    def counted(self, names):
        runs.append(len(names))
        return original(self, names)

    monkeypatch.setattr(step._Effect, "__call__", counted)
    (tmp_path / "source").mkdir()
    onnx.save(layers(80, bad=41), tmp_path / "source" / "deep.onnx")
    path = quantized(tmp_path / "source" / "deep.onnx", tmp_path, "weights")
    found = layer_errors(tmp_path / "source" / "deep.onnx", path, FEEDS[:2], tmp_path)
    assert found.layers[0].node == "n41"
    assert len(runs) <= 50
    assert found.error > sum(one.error for one in found.layers) * 0.9


def test_a_branch_that_a_number_decides_is_looked_into(tmp_path: Path):
    for name, method in (("source", None), ("int8", "weights")):
        (tmp_path / name).mkdir()
        made = layers(inside_branch=True)
        if method:
            attributes = made.graph.node[1].attribute
            branch = next(one.g for one in attributes if one.name == "then_branch")
            for tensor in branch.initializer:
                if tensor.name == "w3":
                    tensor.CopyFrom(constant("w3", np.rint(numpy_helper.to_array(tensor) * 9) / 9))
        onnx.save(made, tmp_path / name / "m.onnx")
    feeds = [{**feed, "rate": np.array(16_000)} for feed in FEEDS]
    found = layer_errors(tmp_path / "source/m.onnx", tmp_path / "int8/m.onnx", feeds, tmp_path)
    assert [one.operator for one in found.layers] == ["MatMul"]
    assert found.layers[0].own_error > 0.01
    # It can be named to stay as it is.
    quantizer = Int8Quantizer(tmp_path / "source/m.onnx", tmp_path, Int8Settings(keep=("n3",)))
    quantizer.write(tmp_path / "kept.onnx")
    nodes = nodes_below(onnx.load(tmp_path / "kept.onnx").graph)
    assert [node.name for node in nodes if node.op_type == "MatMul"] == ["n3"]


def convert(model: Path, settings: Settings, **options: object) -> tuple[Bundle, list[str]]:
    heard = Heard()
    bundle = convert_model(
        model,
        model.parent.parent / "bundle",
        ConversionOptions(
            variants=("int8", "fp32"), measure=False, settings=settings, replace=True,
            cache=model.parent.parent / "cache", **options,
        ),
        reporter=heard,
    )  # fmt: skip
    return bundle, heard.lines


def test_the_gate_names_the_layers_and_keeping_them_helps(model: Path):
    gates = Gates(max_quality_drop=0.05)
    bundle, lines = convert(model, Settings(int8=Int8Settings(max_kept=0), gates=gates))
    (line,) = [line for line in lines if line.startswith("! int8 loses")]
    assert "the limit is 5.0%; the damage comes from n2 (" in line
    assert 'int8.keep = ["n2"' in line
    report = report_in(bundle)
    (found,) = report.layers
    assert (found.variant_id, found.kind, found.errors[0].node) == ("int8", "inside", "n2")
    (row,) = [one for one in report.variants if one.id == "int8"]
    assert "the damage comes from n2" in row.reason
    page = (bundle.path / "report.html").read_text()
    assert "where its error is made" in page
    assert ">n2<" in page
    # It is taken at its word.
    kept, lines = convert(model, Settings(int8=Int8Settings(max_kept=0, keep=("n2",)), gates=gates))
    assert [one.id for one in kept.manifest.variants] == ["fp32", "int8"]
    assert not any(line.startswith("!") for line in lines)


def test_a_variant_that_stays_is_explained_too_and_the_second_time_from_the_cache(
    model: Path, monkeypatch
):
    bundle, _ = convert(model, Settings())
    assert bundle.manifest.variant("int8") is not None
    before = (bundle.path / "report.json").read_bytes()
    assert report_in(bundle).layers[0].errors[0].node == "n2"

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("converters.recipes.layers.layer_errors", never)
    again, _ = convert(model, Settings())
    assert (again.path / "report.json").read_bytes() == before


def test_a_variant_that_errs_little_is_not_looked_into(tmp_path: Path):
    (tmp_path / "source").mkdir()
    made = layers(2, bad=-1)
    onnx.save(made, tmp_path / "source" / "layers.onnx")
    settings = Settings(int8=Int8Settings(block_size=16))
    bundle, _ = convert(tmp_path / "source" / "layers.onnx", settings)
    (lost,) = [one.lost for one in report_in(bundle).variants if one.id == "int8"]
    assert lost < 0.01
    assert report_in(bundle).layers == ()


def test_a_model_that_is_another_one_names_its_layers(model: Path, tmp_path: Path):
    np.savez(tmp_path / "rows.npz", x=INPUTS)
    labels = tuple(f"class {number}" for number in range(WIDTH))
    settings = Settings(gates=Gates(min_top1_agreement=0.99))
    with pytest.raises(ConversionError, match=r"cases only; the damage comes from n2") as caught:
        convert(model, settings, labels=labels, samples=tmp_path / "rows.npz")
    assert 'int8.keep = ["n2"' in str(caught.value.fix)
    assert not (tmp_path / "bundle").exists()


def test_what_is_said_of_layers():
    errors = tuple(Damage(f"n{number}", 0.5**number) for number in range(6))
    found = LayerErrors(variant_id="int8", method="", kind="inside", errors=errors, error=2.0)
    assert damage_of(found) == "the damage comes from n0 (50%), n1 (25%) and n2 (12%)"
    assert mending_of(found, "int8", ["old"]).endswith('int8.keep = ["old", "n0", "n1", "n2"]')
    assert "tensorrt.keep" in mending_of(found, "trt-int8")
    assert mending_of(found, "int4").endswith('int4.keep = ["n0", "n1", "n2"]')
    assert mending_of(found, "fp16") == ""
    even = LayerErrors(variant_id="int8", method="", errors=errors[:3], error=100.0)
    assert damage_of(even) == "the damage comes from many layers alike"
    assert mending_of(even, "int8") == ""


def test_a_step_within_a_step_is_shown_on_a_terminal():
    text = io.StringIO()
    reporter = Reporter(Console(file=text, force_terminal=True, width=80))
    with reporter.step("outer"), reporter.step("inner") as step:
        step.note("found")
    assert text.getvalue().index("inner: found") < text.getvalue().index("✓ outer")
