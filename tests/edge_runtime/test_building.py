"""From a bundle with a TensorRT variant to answers, with stand-ins for TensorRT and CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from edge_runtime.building import build_engines, tensorrt_variants
from edge_runtime.commands import app
from nearfar.bundle import Bundle, BundleWriter
from nearfar.bundle.manifest import (
    Manifest,
    Requirements,
    ShapeRange,
    TensorrtPlan,
    TensorSpec,
    Variant,
)
from nearfar.cli import run
from nearfar.engines import cuda_memory, tensorrt_store
from nearfar.engines.base import CancelToken
from nearfar.engines.cuda_memory import Cuda
from nearfar.engines.devices import Device
from nearfar.engines.loading import load_engine
from nearfar.engines.selection import candidates
from nearfar.engines.tensorrt_engine import TensorrtEngine
from nearfar.engines.tensorrt_store import TensorrtDevice
from nearfar.errors import BundleError, Cancelled, EngineError, InvalidInput, ModelNotFound
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_tensorrt import tensorrt as stand_in
from tests.support.tensorrt_path import use_stand_in
from tests.support.tiny import TENSOR_WEIGHTS, tensor_model

DEVICE = TensorrtDevice(version="10.3.0", gpu="Orin", sm_arch="87")
X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    scores = np.exp(x @ TENSOR_WEIGHTS)
    return scores / scores.sum(-1, keepdims=True)


def make_bundle(folder: Path, *, doc: str = "", fixed: bool = False) -> Bundle:
    """A model for the CPU and the same for TensorRT; with `fixed`, an input that has gone."""
    inputs = (TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),)
    if fixed:
        inputs += (TensorSpec(name="rate", datatype="INT64", shape=()),)
    plan = TensorrtPlan(
        profile=(ShapeRange(name="x", smallest=(1, 4), usual=(2, 4), largest=(8, 4)),),
        fixed={"rate": 16000.0} if fixed else {},
    )
    model = tensor_model()
    model.doc_string = doc
    with BundleWriter(folder) as writer:
        writer.file("trt-fp16/model.onnx").write_bytes(model.SerializeToString())
        writer.file("fp32/model.onnx").write_bytes(tensor_model().SerializeToString())
        return writer.finish(
            Manifest(
                name="tiny", version="1.0.0", task="tensor", inputs=inputs,
                outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 3)),),
                variants=(
                    Variant(id="fp32", engine="onnxruntime", precision="fp32",
                            entry="fp32/model.onnx", files=()),
                    Variant(id="trt-fp16", engine="tensorrt", precision="fp16",
                            entry="trt-fp16/model.onnx", files=(), quality_rank=1, tensorrt=plan,
                            requirements=Requirements(
                                execution_provider="TensorrtExecutionProvider")),
                ),
            )
        )  # fmt: skip


@pytest.fixture(autouse=True)
def on_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A device with TensorRT and a GPU, both stand-ins, and an empty store."""
    use_stand_in(monkeypatch)
    monkeypatch.setenv(tensorrt_store.FOLDER_VARIABLE, str(tmp_path / "engines"))
    monkeypatch.setattr(tensorrt_store, "probe_tensorrt", lambda: DEVICE)
    monkeypatch.syspath_prepend(str(Path(stand_in.__file__).parent))
    card = FakeCuda()
    monkeypatch.setattr(cuda_memory, "_imported", lambda: card)
    return card


def built(bundle: Bundle, **options: Any) -> list[Any]:
    return list(build_engines(bundle, tensorrt_variants(bundle), **options))


def test_a_built_engine_answers(tmp_path: Path, on_a_jetson: FakeCuda):
    bundle = make_bundle(tmp_path / "tiny")
    (state,) = built(bundle)
    assert state.is_new
    assert state.path.parent == tmp_path / "engines"
    engine = load_engine(bundle, "trt-fp16")
    assert engine.execution_provider == "TensorRT"
    for rows in (3, 1, 2):
        found = engine.infer({"x": X[:rows]})
        np.testing.assert_allclose(found["y"], softmax(X[:rows]), rtol=1e-5)
    # Larger and not contiguous.
    wide = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32).T
    np.testing.assert_allclose(engine.infer({"x": wide})["y"], softmax(wide), rtol=1e-5)
    assert len(on_a_jetson.buffers) == 2
    engine.close()
    engine.close()
    assert not on_a_jetson.buffers
    assert not on_a_jetson.streams
    with pytest.raises(EngineError, match="has been closed"):
        engine.infer({"x": X})


def test_an_engine_is_built_once(tmp_path: Path):
    bundle = make_bundle(tmp_path / "tiny")
    seen: list[tuple[str, int, int]] = []
    assert built(bundle, progress=lambda *step: seen.append(step))[0].is_new
    assert seen[-1] == ("Building engine", 2, 2)
    assert not built(bundle)[0].is_new
    assert built(bundle, is_forced=True)[0].is_new
    names = sorted(path.suffix for path in (tmp_path / "engines").iterdir())
    assert names == [".cache", ".engine", ".json"]


@pytest.mark.parametrize(
    "change",
    [{"version": "10.4.0"}, {"gpu": "Thor"}, {"sm_arch": "110"}],
)
def test_another_device_needs_another_engine(tmp_path: Path, change: dict[str, str]):
    bundle = make_bundle(tmp_path / "tiny")
    variant = bundle.variant("trt-fp16")
    other = msgspec.structs.replace(DEVICE, **change)
    assert tensorrt_store.engine_path(variant, other) != tensorrt_store.engine_path(variant, DEVICE)


def test_another_plan_or_file_needs_another_engine(tmp_path: Path):
    variant = make_bundle(tmp_path / "tiny").variant("trt-fp16")
    plan = msgspec.structs.replace(variant.tensorrt, optimization_level=5)
    entry = msgspec.structs.replace(variant.files[0], sha256="0" * 64)
    for other in (
        msgspec.structs.replace(variant, tensorrt=plan),
        msgspec.structs.replace(variant, files=(entry,)),
    ):
        assert tensorrt_store.engine_path(other, DEVICE) != tensorrt_store.engine_path(
            variant, DEVICE
        )


def test_the_engine_is_chosen_once_it_is_built(tmp_path: Path):
    bundle = make_bundle(tmp_path / "tiny")
    device = Device(
        machine="a Jetson", execution_providers=("CPUExecutionProvider",), physical_cores=4,
        memory_bytes=8 << 30, has_genai=False,
    )  # fmt: skip
    before = candidates(bundle.manifest, device, "edge")
    assert before[0].variant.id == "fp32"
    assert "nearfar edge build" in str(before[1].excluded)
    with pytest.raises(EngineError, match="nearfar edge build"):
        load_engine(bundle, "trt-fp16")
    built(bundle)
    assert candidates(bundle.manifest, device, "edge")[0].variant.id == "trt-fp16"


def test_calls_outside_the_profile_are_refused(tmp_path: Path):
    bundle = make_bundle(tmp_path / "tiny")
    built(bundle)
    engine = load_engine(bundle, "trt-fp16")
    with pytest.raises(InvalidInput, match=r"covers \[1, 4\] to \[8, 4\]"):
        engine.infer({"x": np.zeros((9, 4), np.float32)})
    with pytest.raises(InvalidInput, match="dtype"):
        engine.infer({"x": X.astype(np.float64)})
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        engine.infer({"x": X}, cancel)


def test_a_fixed_input_must_have_its_value(tmp_path: Path):
    bundle = make_bundle(tmp_path / "tiny", fixed=True)
    built(bundle)
    engine = load_engine(bundle, "trt-fp16")
    found = engine.infer({"x": X, "rate": np.array(16000)})
    np.testing.assert_allclose(found["y"], softmax(X), rtol=1e-5)
    with pytest.raises(InvalidInput, match="is not 16000"):
        engine.infer({"x": X, "rate": np.array(8000)})


@pytest.mark.parametrize(
    ("doc", "words"),
    [("refuse", "DynamicQuantizeLinear bad"), ("no engine", "out of memory"), ("crash", "signal 6"),
     ("hang", "did not finish within 1 s")],
)  # fmt: skip
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, doc: str, words: str):
    bundle = make_bundle(tmp_path / "tiny", doc=doc)
    with pytest.raises(EngineError, match=words):
        built(bundle, timeout_s=1.0 if doc == "hang" else 60.0)
    assert not [path for path in (tmp_path / "engines").iterdir() if path.suffix != ".cache"]


def test_a_damaged_engine_is_refused(tmp_path: Path):
    bundle = make_bundle(tmp_path / "tiny")
    (state,) = built(bundle)
    state.path.write_bytes(b"TRT!" + b"x" * 100)
    with pytest.raises(BundleError, match="damaged"):
        load_engine(bundle, "trt-fp16")


def test_a_store_that_others_may_write_is_refused(tmp_path: Path):
    bundle = make_bundle(tmp_path / "tiny")
    built(bundle)
    (tmp_path / "engines").chmod(0o777)
    with pytest.raises(EngineError, match="Others may write"):
        load_engine(bundle, "trt-fp16")
    with pytest.raises(EngineError, match="Others may write"):
        built(bundle)


def test_an_engine_of_something_else_is_refused(tmp_path: Path, on_a_jetson: FakeCuda):
    bundle = make_bundle(tmp_path / "tiny")
    variant = bundle.variant("trt-fp16")
    model = tensor_model()
    model.graph.input[0].name = model.graph.node[0].input[0] = "z"
    data = b"TRT!" + model.SerializeToString()
    with pytest.raises(BundleError, match="its manifest states others"):
        TensorrtEngine(data, variant, manifest=bundle.manifest, trt=stand_in, cuda=Cuda())
    with pytest.raises(EngineError, match="magic tag does not match"):
        TensorrtEngine(b"?", variant, manifest=bundle.manifest, trt=stand_in, cuda=Cuda())
    assert not on_a_jetson.streams


def test_fp64_is_fp32_to_tensorrt_and_fp64_to_callers(tmp_path: Path):
    bundle = make_bundle(tmp_path / "tiny")
    model = tensor_model()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    weights = model.graph.initializer[0]
    weights.CopyFrom(onnx.numpy_helper.from_array(TENSOR_WEIGHTS.astype(np.float64), weights.name))
    wide = tuple(
        msgspec.structs.replace(spec, datatype="FP64")
        for spec in (*bundle.manifest.inputs, *bundle.manifest.outputs)
    )
    manifest = msgspec.structs.replace(bundle.manifest, inputs=wide[:1], outputs=wide[1:])
    engine = TensorrtEngine(
        b"TRT!" + model.SerializeToString(), bundle.variant("trt-fp16"), manifest=manifest,
        trt=stand_in, cuda=Cuda(),
    )  # fmt: skip
    found = engine.infer({"x": X.astype(np.float64)})["y"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, softmax(X), rtol=1e-5)


def test_a_card_without_memory_is_told(tmp_path: Path, on_a_jetson: FakeCuda):
    bundle = make_bundle(tmp_path / "tiny")
    built(bundle)
    engine = load_engine(bundle, "trt-fp16")
    on_a_jetson.limit_bytes = 8
    with pytest.raises(EngineError, match="cudaErrorMemoryAllocation"):
        engine.infer({"x": X})
    on_a_jetson.limit_bytes = 1 << 20
    np.testing.assert_allclose(engine.infer({"x": X})["y"], softmax(X), rtol=1e-5)


def test_without_tensorrt_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = make_bundle(tmp_path / "tiny")
    with pytest.raises(EngineError, match="no GPU at all"):
        built(bundle, device=TensorrtDevice(why_not="there is no GPU at all"))
    with pytest.raises(ModelNotFound, match="trt-int8"):
        tensorrt_variants(bundle, "trt-int8")


def test_the_command_builds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_bundle(tmp_path / "models" / "tiny")
    assert run(app, ["build", "tiny", "--models", str(tmp_path / "models")], program="x") == 0
    assert run(app, ["build", str(tmp_path / "models" / "tiny")], program="x") == 0
    said = capsys.readouterr().out
    assert "trt-fp16: built in" in said
    assert "trt-fp16: was there already" in said


def test_a_machine_without_the_package_is_probed_without_a_child(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    tensorrt_store.probe_tensorrt.cache_clear()
    monkeypatch.setattr(tensorrt_store.importlib.util, "find_spec", lambda name: None)
    found = tensorrt_store.probe_tensorrt()
    tensorrt_store.probe_tensorrt.cache_clear()
    assert "JetPack" in found.why_not


def test_plans_that_do_not_hold_together_are_refused(tmp_path: Path):
    manifest = make_bundle(tmp_path / "tiny").manifest
    variant = manifest.variants[1]
    from nearfar.bundle.checks import manifest_problems

    sizes = variant.tensorrt.profile[0]
    for plan in (
        None,
        TensorrtPlan(profile=(msgspec.structs.replace(sizes, usual=(9, 4)),)),
        TensorrtPlan(profile=(msgspec.structs.replace(sizes, usual=(2,)),)),
        TensorrtPlan(fixed={"rate": float("nan")}),
        TensorrtPlan(workspace_bytes=-1),
        TensorrtPlan(optimization_level=9),
    ):
        changed = msgspec.structs.replace(variant, tensorrt=plan)
        bad = msgspec.structs.replace(manifest, variants=(manifest.variants[0], changed))
        assert next(field for field, _ in manifest_problems(bad)).startswith("variants[1].tensorrt")
    assert not list(manifest_problems(manifest))
