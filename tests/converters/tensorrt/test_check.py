"""The gate: what it makes of a library that takes, refuses, crashes or hangs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from converters.tensorrt.check import Verdict, check_graph, require_library
from converters.tensorrt.commands import app
from converters.tensorrt.findings import FIXES, explain
from converters.tensorrt.ranges import Bounds, bounds_of, profile_of, stated_axes, usual_of
from nearfar.bundle.manifest import AudioPreprocessing, ShapeRange, TextPreprocessing
from nearfar.cli import run
from nearfar.engines.tensorrt_build import BuildResult, RawError, build
from nearfar.errors import Cancelled, ConfigError, ConversionError, EngineError
from tests.converters.tensorrt import graphs
from tests.support.tensorrt_path import use_stand_in

PROFILE = (ShapeRange(name="x", smallest=(1, 16), usual=(4, 16), largest=(8, 16)),)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in(monkeypatch)


def linear(folder: Path, doc: str = "") -> Path:
    return graphs.save(graphs.linear(doc), folder / "model.onnx")


#: As TensorRT RTX 1.7.1 said it.
@pytest.mark.parametrize(
    ("operator", "text", "kind"),
    [
        ("QuantizeLinear", "Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is "
         "not supported. Please set kENABLE_UINT8…", "asymmetric-zero-point"),
        ("DequantizeLinear", "Invalid Node - dqb\nITensor::getDimensions: Error Code 4: API Usage "
         "Error (dqb: input has type Int32 but must have type FP8, FP4, Int4, Int8, or UInt8. In "
         "checkType at /_src/optimizer/common/nodeBase.cpp:456)\n[checkMacros.cpp::catchCudaError::"
         "250] Error Code 1: Cuda Runtime (In catchCudaError (cudaError 35: CUDA driver version is "
         "insufficient for CUDA runtime version))", "int32-bias"),
        ("MatMulNBits", "Assertion failed: a->getType() == nvinfer1::DataType::kHALF: input tensor "
         "A must be FP16.", "matmul-nbits"),
        ("GroupQueryAttention", "Assertion failed: !inputs.at(3).isNullTensor(): past_key is "
         "required.", "group-query-attention"),
        ("DynamicQuantizeLinear", "false", "dynamic-quantization"),
        ("QLinearMatMul", "false", "operator-quantization"),
        ("SequenceConstruct", "false", "unsupported-operator"),
        ("FastGelu", 'creator && "Plugin not found, are the plugin name, version, and namespace '
         'correct?"', "unsupported-operator"),
        ("NonZero", "Assertion failed: creator && …: NonZero plugin creator version 1 was not "
         "found in plugin registry.", "data-dependent-shape"),
        ("", 'Assertion failed: convertDtype(onnxDtype.elem_type(), &trtDtype) && "Failed to '
         'convert ONNX date type to TensorRT data type."', "unsupported-dtype"),
        ("", "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Quantized constant "
         "(t) is only allowed before DQ or PLUGIN_V2 or kPLUGIN_V3 node. …)", "bare-int8-table"),
        ("", "IBuilder::buildSerializedNetwork: Error Code 1: Myelin (… MyelinCheckException: "
         "CHECK(composite_op->is_decomposable()) failed. Attention operation was not supported by "
         "a dedicated kernel.", "attention-operator"),
        ("", "[graphScope.cpp::analyze::471] Error Code 2: Internal Error (Assertion "
         "tScope.getType() != ScopeType::kUNDEFINED failed.", "control-flow"),
        ("", "shape input 'k' has no range of values", "shape-input"),
        ("", "input 'x' of shape [-1, 4] has no range of sizes", "missing-range"),
        ("", "IBuilder::buildSerializedNetwork: Error Code 4: Shape Error (reshape of empty tensor "
         "to non-empty tensor.", "impossible-range"),
        ("", "Internal Error (kOPT values for profile 0 violate shape constraints: node_Conv_190: "
         "convolution/deconvolution does not support nonzero spatial output dimension with "
         "corresponding zero input dimension", "impossible-range"),
        ("Conv", "something nobody has seen", "refused"),
    ],
)  # fmt: skip
def test_refusals_are_explained(operator: str, text: str, kind: str):
    error = RawError(text=text, operator=operator, node="n1", code="UNSUPPORTED_NODE")
    (finding,) = explain(BuildResult(library="tensorrt_rtx 1", stage="parse", errors=(error,)))
    assert finding.kind == kind
    assert finding.is_fatal
    assert finding.nodes == ("n1",)
    assert "cudaError" not in str(finding)
    assert finding.fix == FIXES[finding.kind]


def test_every_kind_says_what_to_do():
    from typing import get_args

    from converters.tensorrt.findings import Kind

    assert set(FIXES) == set(get_args(Kind))


def test_a_graph_that_is_taken(tmp_path: Path, stand_in: None):
    verdict = check_graph(linear(tmp_path))
    assert verdict.accepted
    assert verdict.findings == ()
    assert verdict.engine_bytes > 0
    assert verdict.library == "tensorrt_rtx 10.3.0"
    assert verdict.facts().accepted


@pytest.mark.parametrize(
    ("doc", "kind"),
    [("refuse", "dynamic-quantization"), ("no engine", "out-of-memory"), ("crash", "crash"),
     ("hang", "timeout")],
)  # fmt: skip
def test_a_graph_that_is_not_taken(tmp_path: Path, stand_in: None, doc: str, kind: str):
    verdict = check_graph(linear(tmp_path, doc), timeout_s=1.5 if doc == "hang" else 60)
    assert not verdict.accepted
    assert verdict.fixed_accepted is None
    assert [finding.kind for finding in verdict.findings] == [kind]
    if kind == "crash":
        assert "signal 6" in str(verdict.findings[0])


def test_a_repaired_graph_is_tried_and_kept(tmp_path: Path, stand_in: None):
    path = graphs.save(graphs.quantized(128, np.uint8), tmp_path / "q.onnx")
    before = path.read_bytes()
    target = tmp_path / "fixed.onnx"
    verdict = check_graph(path, save_fixed=target)
    # The stand-in takes everything: that the graph would be read otherwise is enough.
    assert not verdict.accepted
    assert verdict.fixed_accepted
    assert verdict.findings[0].is_fixed
    assert path.read_bytes() == before
    onnx.checker.check_model(onnx.load(target))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["fixed.onnx", "q.onnx"]


def test_a_graph_is_judged_with_its_fixed_inputs(tmp_path: Path, stand_in: None):
    path = graphs.save(graphs.branching(), tmp_path / "b.onnx")
    assert check_graph(path, fixed={"rate": 8000}).accepted


def test_a_file_that_is_no_model(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff\xff\xff")
    with pytest.raises(ConversionError, match="cannot be read as an ONNX model"):
        check_graph(path)


def test_a_missing_library_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NEARFAR_TENSORRT_PYTHON", "/nowhere/python")
    with pytest.raises(EngineError, match="cannot be started"):
        require_library()


def test_a_python_without_the_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # `-S` leaves out everything installed.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setenv("NEARFAR_TENSORRT_PYTHON", str(bare))
    with pytest.raises(ConversionError, match="has no tensorrt_rtx"):
        require_library()
    verdict = check_graph(linear(tmp_path))
    assert not verdict.accepted
    assert verdict.is_unavailable


def test_a_build_tells_its_progress_and_keeps_its_timings(tmp_path: Path, stand_in: None):
    seen: list[tuple[str, int, int]] = []
    engine, timings = tmp_path / "engine", tmp_path / "timings"
    result = build(
        linear(tmp_path), library="tensorrt", profile=PROFILE, engine=engine, timing_cache=timings,
        workspace_bytes=1 << 20, optimization_level=1,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert result.is_built
    assert seen == [("Building engine", 0, 2), ("Building engine", 1, 2), ("Building engine", 2, 2)]
    assert engine.read_bytes().startswith(b"TRT!")
    assert timings.read_bytes() == b"t"
    build(tmp_path / "model.onnx", library="tensorrt", profile=PROFILE, timing_cache=timings)
    assert timings.read_bytes() == b"tt"


def test_a_missing_range_is_a_result(tmp_path: Path, stand_in: None):
    result = build(linear(tmp_path), library="tensorrt")
    assert result.stage == "profile"
    assert "'x' of shape [-1, 16] has no range" in result.errors[0].text


def test_a_build_can_be_cancelled(tmp_path: Path, stand_in: None):
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        build(linear(tmp_path, "hang"), library="tensorrt", profile=PROFILE, cancelled=cancelled)


def test_the_child_needs_the_standard_library_only():
    child = Path(build.__code__.co_filename).with_name("tensorrt_child.py")
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(child)],
        input=json.dumps({"library": "tensorrt_rtx", "model": "m"}).encode(),
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["stage"] == "library"


def free(*shapes: tuple[str, list[object]]) -> onnx.ModelProto:
    inputs = [graphs.value(name, graphs.FLOAT, shape) for name, shape in shapes]
    return graphs.model(
        [graphs.node("Identity", [shapes[0][0]], ["y"])],
        inputs,
        [graphs.value("y", graphs.FLOAT, None)],
    )


def test_ranges_come_from_statements_samples_and_limits():
    model = free(
        ("ids", ["batch", "tokens"]), ("image", ["batch", 3, "height", "width"]), ("k", [4])
    )
    profile = profile_of(
        model,
        {"height": (8, 16, 32), "image.3": (1, 2, 3)},
        sample={"ids": (1, 50), "image": (1, 3, 20, 20)},
        bounds=Bounds(most=64),
    )
    assert [one.name for one in profile] == ["ids", "image"]
    assert (profile[0].smallest, profile[0].usual, profile[0].largest) == (
        (1, 1),
        (4, 50),
        (16, 64),
    )
    assert profile[1].largest == (16, 3, 32, 3)
    assert stated_axes(model, profile) == {
        "batch": (1, 4, 16), "tokens": (1, 50, 64), "height": (8, 16, 32), "width": (1, 2, 3),
    }  # fmt: skip
    # A recipe's statement gives the same profile without a sample.
    assert profile_of(model, stated_axes(model, profile)) == profile


def test_ranges_of_texts_and_sounds_are_those_that_a_bundle_lets_through():
    text = TextPreprocessing(tokenizer="tokenizer.json", max_length_tokens=130)
    sound = AudioPreprocessing(input="x", sample_rate_hz=8000, min_samples=105, max_samples=240_000)
    for spec, sample, sizes in (
        (text, {"x": (1, 50)}, (1, 50, 130)),
        (text, {}, (1, 32, 130)),
        (text, {"x": (1, 400)}, (1, 130, 130)),
        (sound, {"x": (1, 4000)}, (105, 4000, 16_000)),
        (sound, usual_of(sound), (105, 8000, 32_000)),
        (sound, {"x": (1, 239_000)}, (105, 239_000, 240_000)),
        (None, {"x": (1, 7)}, (1, 7, 28)),
    ):
        model = free(("x", ["batch", "size"]))
        (found,) = profile_of(model, {}, sample=sample, bounds=bounds_of(spec, sample))
        assert (found.smallest[1], found.usual[1], found.largest[1]) == sizes


def test_axes_without_a_name_are_stated_by_place():
    model = free(("x", [None, None]))
    profile = profile_of(model, {"x.1": (4, 4, 4)})
    assert profile[0].largest == (16, 4)
    assert stated_axes(model, profile) == {"x.0": (1, 4, 16), "x.1": (4, 4, 4)}


@pytest.mark.parametrize(
    ("axes", "words"),
    [({"tokens": (1, 2, 3)}, "no free axis 'tokens'"), ({"batch": (4, 2, 8)}, "range of 'batch'")],
)
def test_statements_that_do_not_fit(axes: dict[str, tuple[int, int, int]], words: str):
    with pytest.raises(ConfigError, match=words):
        profile_of(free(("x", ["batch", 4])), axes)


def test_the_command_says_what_is_refused_and_why(tmp_path: Path, stand_in: None):
    path = str(graphs.save(graphs.quantized(128, np.uint8), tmp_path / "q.onnx"))
    runner = CliRunner()
    done = runner.invoke(app, ["check", path])
    assert done.exit_code == 1
    assert "refused; taken when repaired" in done.stdout
    done = runner.invoke(app, ["check", path, "--json"])
    line = json.loads(done.stdout)
    assert line["findings"][0]["kind"] == "asymmetric-zero-point"
    line.pop("graph")
    assert msgspec.convert(line, Verdict).fixed_accepted
    done = runner.invoke(app, ["fix", path, "-o", str(tmp_path / "f.onnx")])
    assert done.exit_code == 0
    assert (tmp_path / "f.onnx").exists()
    done = runner.invoke(app, ["check", str(tmp_path / "f.onnx"), "--axis", "b=1,2,3"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("option", [["--axis", "b=1,2"], ["--fixed", "rate"]])
def test_the_command_refuses_what_it_cannot_read(tmp_path: Path, option: list[str]):
    assert run(app, ["check", str(linear(tmp_path)), *option], program="x") == 2


def _real() -> str | None:
    stated = os.environ.get("NEARFAR_TENSORRT_PYTHON")
    if stated:
        return stated
    return sys.executable if importlib.util.find_spec("tensorrt_rtx") else None


@pytest.mark.skipif(_real() is None, reason="needs tensorrt-rtx (NEARFAR_TENSORRT_PYTHON)")
@pytest.mark.parametrize(
    ("made", "is_taken", "is_taken_repaired"),
    [
        (graphs.linear(), True, None),
        (graphs.quantized(0, np.int8), True, None),
        (graphs.quantized(128, np.uint8), False, True),
        (graphs.quantized(0, np.int8, is_bias_int32=True), False, True),
        (graphs.table(), False, True),
        (graphs.nbits(4), False, True),
        (graphs.nbits(8, scales=np.linspace(-1, 1, 16).astype(np.float32)), False, True),
    ],
)
def test_the_real_library_agrees(
    tmp_path: Path, made: onnx.ModelProto, is_taken: bool, is_taken_repaired: bool | None
):
    verdict = check_graph(graphs.save(made, tmp_path / "model.onnx"))
    assert (verdict.accepted, verdict.fixed_accepted) == (is_taken, is_taken_repaired)
