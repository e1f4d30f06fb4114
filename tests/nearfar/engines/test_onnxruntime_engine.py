"""ONNX Runtime engine on tiny real models."""

from __future__ import annotations

import gc
import logging
import threading
import weakref

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nearfar.bundle import BundleWriter
from nearfar.bundle.manifest import Manifest, Requirements, TensorSpec, Variant
from nearfar.engines import load_engine
from nearfar.engines.base import CancelToken, SessionOptions, ShapeRange, TensorEngine
from nearfar.errors import BundleError, Cancelled, EngineError, InvalidInput
from tests.support.tiny import TENSOR_WEIGHTS, write_tiny_tensor_bundle

ort = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")

from nearfar.engines import onnxruntime_engine  # noqa: E402

X = np.array([[1, 2, 3, 4], [0, -1, 2, 0.5]], np.float32)


@pytest.fixture
def bundle(tmp_path):
    return write_tiny_tensor_bundle(tmp_path / "tiny")


def write_bundle(path, model, *, inputs, outputs, requirements=None):
    """A bundle around any bytes as model, so with hashes that hold."""
    with BundleWriter(path) as writer:
        data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
        file = writer.file("fp32/model.onnx")
        file.write_bytes(data)
        return writer.finish(
            Manifest(
                name="made",
                version="1.0.0",
                task="tensor",
                inputs=inputs,
                outputs=outputs,
                variants=(
                    Variant(
                        id="fp32",
                        engine="onnxruntime",
                        precision="fp32",
                        entry="fp32/model.onnx",
                        files=(),
                        requirements=requirements or Requirements(),
                    ),
                ),
            )
        )


def graph_model(nodes, inputs, outputs, *, initializers=(), opset=17):
    graph = helper.make_graph(nodes, "made", inputs, outputs, list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 9
    return model


def spec(name, datatype, *shape):
    return TensorSpec(name=name, datatype=datatype, shape=shape)


def test_outputs_are_those_of_the_model(bundle):
    engine = load_engine(bundle, "fp32")
    assert isinstance(engine, TensorEngine)
    scores = np.exp(X @ TENSOR_WEIGHTS)
    np.testing.assert_allclose(
        engine.infer({"x": X})["y"], scores / scores.sum(axis=1, keepdims=True), rtol=1e-5
    )
    assert engine.execution_provider == "CPUExecutionProvider"
    assert engine.variant_id == "fp32"
    assert engine.inputs == [spec("x", "FP32", -1, 4)]


def test_outputs_belong_to_the_caller(bundle):
    engine = load_engine(bundle, "fp32")
    first = engine.infer({"x": X})["y"]
    kept = first.copy()
    engine.infer({"x": X * 2})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("array", [X.T.copy().T, X[::-1], np.asfortranarray(X)])
def test_arrays_need_not_lie_in_one_piece(bundle, array):
    engine = load_engine(bundle, "fp32")
    whole = engine.infer({"x": np.ascontiguousarray(array)})["y"]
    np.testing.assert_array_equal(engine.infer({"x": array})["y"], whole)


def test_wrong_inputs_are_refused_before_the_model_runs(bundle):
    with pytest.raises(InvalidInput, match=r"shape \[4\], expected \[-1, 4\]"):
        load_engine(bundle, "fp32").infer({"x": X[0]})


def test_options_do_not_change_the_outputs(bundle):
    plain = load_engine(bundle, "fp32").infer({"x": X})["y"]
    options = SessionOptions(threads=1, use_arena=False, allow_spinning=False)
    np.testing.assert_allclose(load_engine(bundle, "fp32", options).infer({"x": X})["y"], plain)


def test_outputs_bound_to_a_device_are_those_of_a_plain_run(bundle):
    session = ort.InferenceSession(
        str(bundle.variant_entry(bundle.variant("fp32"))), providers=["CPUExecutionProvider"]
    )
    (bound,) = onnxruntime_engine._run_bound(session, {"x": X}, ["y"], "cpu")
    np.testing.assert_array_equal(bound, session.run(None, {"x": X})[0])


def test_threads_may_share_an_engine(bundle):
    engine = load_engine(bundle, "fp32")
    expected = {n: engine.infer({"x": X * n})["y"] for n in range(4)}
    wrong = []

    def work(n):
        for _ in range(200):
            if not np.array_equal(engine.infer({"x": X * n})["y"], expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_closing_frees_the_session_and_refuses_calls(bundle):
    engine = load_engine(bundle, "fp32")
    session = weakref.ref(engine._session)
    engine.close()
    engine.close()
    gc.collect()
    assert session() is None
    with pytest.raises(EngineError, match="tiny/fp32 has been closed"):
        engine.infer({"x": X})


def test_a_file_that_is_no_model_is_a_bundle_error(tmp_path):
    made = write_bundle(
        tmp_path / "made", b"not a model", inputs=(spec("x", "FP32", 1),),
        outputs=(spec("y", "FP32", 1),),
    )  # fmt: skip
    with pytest.raises(BundleError, match=r"cannot read model\.onnx of made/fp32"):
        load_engine(made, "fp32")


def test_a_model_newer_than_the_runtime_is_an_engine_error(tmp_path):
    vector = helper.make_tensor_value_info
    model = graph_model(
        [helper.make_node("Relu", ["x"], ["y"])],
        [vector("x", TensorProto.FLOAT, [1])],
        [vector("y", TensorProto.FLOAT, [1])],
        opset=999,
    )
    made = write_bundle(
        tmp_path / "made", model, inputs=(spec("x", "FP32", 1),), outputs=(spec("y", "FP32", 1),)
    )
    with pytest.raises(EngineError, match=r"cannot load made/fp32.*Update onnxruntime"):
        load_engine(made, "fp32")


def test_a_manifest_that_describes_another_model_is_a_bundle_error(tmp_path):
    vector = helper.make_tensor_value_info
    model = graph_model(
        [helper.make_node("Relu", ["x"], ["y"])],
        [vector("x", TensorProto.FLOAT, [1])],
        [vector("y", TensorProto.FLOAT, [1])],
    )
    made = write_bundle(
        tmp_path / "made", model, inputs=(spec("x", "FP16", 1),), outputs=(spec("y", "FP32", 1),)
    )
    with pytest.raises(BundleError, match=r"inputs x FP32\[1\]; its manifest states x FP16\[1\]"):
        load_engine(made, "fp32")


def test_shapes_only_the_model_knows_to_be_wrong_are_invalid_input_or_engine_errors(tmp_path):
    vector = helper.make_tensor_value_info
    model = graph_model(
        [helper.make_node("Add", ["a", "b"], ["y"])],
        [vector("a", TensorProto.FLOAT, ["n"]), vector("b", TensorProto.FLOAT, ["m"])],
        [vector("y", TensorProto.FLOAT, ["k"])],
    )
    made = write_bundle(
        tmp_path / "made",
        model,
        inputs=(spec("a", "FP32", -1), spec("b", "FP32", -1)),
        outputs=(spec("y", "FP32", -1),),
    )
    with pytest.raises((InvalidInput, EngineError), match="made/fp32"):
        load_engine(made, "fp32").infer(
            {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}
        )


def test_strings_reach_the_model_as_text(tmp_path):
    vector = helper.make_tensor_value_info
    model = graph_model(
        [helper.make_node("Identity", ["text"], ["same"])],
        [vector("text", TensorProto.STRING, ["n"])],
        [vector("same", TensorProto.STRING, ["n"])],
    )
    made = write_bundle(
        tmp_path / "made", model, inputs=(spec("text", "BYTES", -1),),
        outputs=(spec("same", "BYTES", -1),),
    )  # fmt: skip
    engine = load_engine(made, "fp32")
    for array in (np.array(["né", "b"]), np.array(["né".encode(), b"b"], object)):
        assert engine.infer({"text": array})["same"].tolist() == ["né", "b"]
    with pytest.raises(InvalidInput, match="not UTF-8"):
        engine.infer({"text": np.array([b"\xff"], object)})


def test_a_constant_input_may_be_left_out(tmp_path):
    vector = helper.make_tensor_value_info
    model = graph_model(
        [helper.make_node("Add", ["x", "c"], ["y"])],
        [vector("x", TensorProto.FLOAT, [1]), vector("c", TensorProto.FLOAT, [1])],
        [vector("y", TensorProto.FLOAT, [1])],
        initializers=[numpy_helper.from_array(np.ones(1, np.float32), "c")],
    )
    made = write_bundle(
        tmp_path / "made", model, inputs=(spec("x", "FP32", 1),), outputs=(spec("y", "FP32", 1),)
    )
    assert load_engine(made, "fp32").infer({"x": np.ones(1, np.float32)})["y"].tolist() == [2]


# -- execution providers ---------------------------------------------------------------------------


def test_a_wished_provider_that_is_not_installed_is_named(bundle):
    options = SessionOptions(
        execution_providers=("QNNExecutionProvider",), require_execution_provider=True
    )
    with pytest.raises(EngineError, match="QNNExecutionProvider is not in the installed"):
        load_engine(bundle, "fp32", options)


def test_a_provider_that_does_not_start_is_an_error_where_it_is_required(caplog):
    wished, actual = "CUDAExecutionProvider", "CPUExecutionProvider"
    required = SessionOptions(require_execution_provider=True)
    with pytest.raises(EngineError, match=f"would run on {actual}.*could not start {wished}"):
        onnxruntime_engine._check_fallback("tiny/fp32", wished, actual, required)
    with caplog.at_level(logging.WARNING):
        onnxruntime_engine._check_fallback("tiny/fp32", wished, actual, SessionOptions())
    assert "CUDAExecutionProvider did not start" in caplog.text


def test_without_a_wish_the_best_installed_provider_is_tried_first(monkeypatch, bundle):
    variant = bundle.variant("fp32")
    cuda = Variant(
        id="c", engine="onnxruntime", precision="fp16", entry="x", files=(),
        requirements=Requirements(execution_provider="CUDAExecutionProvider"),
    )  # fmt: skip
    available = ["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    choose = onnxruntime_engine._wished_providers
    assert choose(SessionOptions(), variant) == list(reversed(available))
    assert choose(SessionOptions(), cuda) == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    wish = SessionOptions(execution_providers=("TensorrtExecutionProvider",))
    assert choose(wish, variant) == ["TensorrtExecutionProvider", "CPUExecutionProvider"]


def test_tensorrt_settings_are_those_of_its_documentation(tmp_path):
    options = SessionOptions(
        cache_dir=str(tmp_path),
        shape_ranges=(
            ShapeRange(name="ids", smallest=(1, 1), usual=(1, 128), largest=(8, 256)),
            ShapeRange(name="mask", smallest=(1, 1), usual=(1, 128), largest=(8, 256)),
        ),
    )
    settings = onnxruntime_engine.provider_options("TensorrtExecutionProvider", options, "fp16")
    assert settings == {
        "trt_fp16_enable": "True",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(tmp_path),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(tmp_path),
        "trt_profile_min_shapes": "ids:1x1,mask:1x1",
        "trt_profile_opt_shapes": "ids:1x128,mask:1x128",
        "trt_profile_max_shapes": "ids:8x256,mask:8x256",
    }
    assert onnxruntime_engine.provider_options("CPUExecutionProvider", options, "fp16") == {}


def test_small_devices_get_a_gpu_arena_that_grows_as_asked_for():
    settings = onnxruntime_engine.provider_options(
        "CUDAExecutionProvider", SessionOptions(use_arena=False), "fp32"
    )
    assert settings["arena_extend_strategy"] == "kSameAsRequested"


@pytest.mark.gpu
def test_a_gpu_runs_the_model_with_the_same_outputs(bundle):
    options = SessionOptions(
        execution_providers=("CUDAExecutionProvider",), require_execution_provider=True
    )
    engine = load_engine(bundle, "fp32", options)
    assert engine.execution_provider == "CUDAExecutionProvider"
    plain = load_engine(
        bundle, "fp32", SessionOptions(execution_providers=("CPUExecutionProvider",))
    )
    np.testing.assert_allclose(engine.infer({"x": X})["y"], plain.infer({"x": X})["y"], rtol=1e-3)


def test_every_exception_of_onnxruntime_is_translated():
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    raised = {
        item for item in vars(state).values()
        if isinstance(item, type) and issubclass(item, BaseException)
    }  # fmt: skip
    assert len(raised) >= 10
    assert raised <= set(onnxruntime_engine.ORT_EXCEPTIONS)


@pytest.mark.parametrize(
    "array",
    [X.tolist(), None, X.astype(">f4"), X.astype(np.float64), X[0], X[:, :3], "text"],
    ids=["list", "none", "swapped bytes", "float64", "rank", "size", "text"],
)
def test_whatever_is_wrong_with_an_input_names_it(bundle, array):
    # ONNX Runtime itself takes lists, None and swapped bytes, and computes something.
    with pytest.raises(InvalidInput) as caught:
        load_engine(bundle, "fp32").infer({"x": array})
    assert caught.value.field == "x"


@pytest.mark.parametrize(("feeds", "name"), [({}, "x"), ({"x": X, "z": X}, "z"), ({"z": X}, "x")])
def test_missing_and_extra_inputs_are_named(bundle, feeds, name):
    with pytest.raises(InvalidInput) as caught:
        load_engine(bundle, "fp32").infer(feeds)
    assert caught.value.field == name


def test_a_call_that_runs_can_be_cancelled(tmp_path):
    """A chain of matrix products takes seconds; between two of them it ends."""
    size, nodes = 512, 2000
    weights = numpy_helper.from_array(np.eye(size, dtype=np.float32), "weights")
    chain = [
        helper.make_node("MatMul", ["x" if i == 0 else f"t{i}", "weights"], [f"t{i + 1}"])
        for i in range(nodes)
    ]
    chain.append(helper.make_node("Identity", [f"t{nodes}"], ["y"]))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        chain, "long",
        [value("x", TensorProto.FLOAT, ["rows", size])],
        [value("y", TensorProto.FLOAT, ["rows", size])],
        [weights],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    spec = {"datatype": "FP32", "shape": (-1, size)}
    bundle = write_bundle(
        tmp_path / "long", model,
        inputs=(TensorSpec(name="x", **spec),), outputs=(TensorSpec(name="y", **spec),),
    )  # fmt: skip
    engine = load_engine(bundle, "fp32")
    cancel = CancelToken()
    ended: list[BaseException] = []

    def run() -> None:
        try:
            engine.infer({"x": np.ones((2048, size), np.float32)}, cancel)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    cancel.cancel()
    thread.join(20.0)
    assert [type(error) for error in ended] == [Cancelled]
    # What is cancelled before it starts does not start.
    with pytest.raises(Cancelled):
        engine.infer({"x": np.ones((2048, size), np.float32)}, cancel)
    engine.close()
