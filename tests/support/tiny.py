"""Tiny but real bundles, written in milliseconds, for tests of everything that uses bundles.

They hold real ONNX models that a real engine runs; needs the `onnx` package.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nearfar.bundle import Bundle, BundleWriter
from nearfar.bundle.manifest import (
    AudioPreprocessing,
    HeadTailPreprocessing,
    ImagePreprocessing,
    LatencyFigure,
    Manifest,
    QualityFigure,
    StreamPreprocessing,
    StreamRate,
    StreamState,
    TensorSpec,
    TextPreprocessing,
    Variant,
)

#: Both variants of the tensor bundle compute softmax(x @ TENSOR_WEIGHTS); int8 rounds the weights.
TENSOR_WEIGHTS = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
TENSOR_LABELS = ("low", "middle", "high")

#: The classifier calls bytes "text" or "binary" by their mean value.
CLASSIFIER_LABELS = ("text", "binary")
HEAD_TAIL = HeadTailPreprocessing(head_bytes=16, tail_bytes=16, block_bytes=64, padding_value=256)


#: Pictures are called by the colour that is strongest on the whole, sounds by how loud they are,
#: texts by whether they have more of `GLAD` or of other words.
COLOURS, LOUDNESS, MOODS = ("red", "green", "blue"), ("quiet", "loud"), ("sad", "glad")
GLAD = ("day", "good", "great")
IMAGE = ImagePreprocessing(input="pixels", resize=(10,), crop=(8, 8))
AUDIO = AudioPreprocessing(
    input="samples", sample_rate_hz=16_000, min_samples=80, max_samples=80_000
)


def tensor_model(weights: np.ndarray = TENSOR_WEIGHTS) -> onnx.ModelProto:
    """``y = softmax(x @ weights)``; x FP32 [-1, 4], y FP32 [-1, 3]."""
    rows, columns = weights.shape
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weights"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["y"], axis=-1),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", columns])],
        [numpy_helper.from_array(weights.astype(np.float32), "weights")],
    )
    return _model(graph)


def classifier_model() -> onnx.ModelProto:
    """``bytes`` INT32 [-1, 32] to ``scores`` FP32 [-1, 2]: bytes above 127 speak for binary."""
    width = HEAD_TAIL.head_bytes + HEAD_TAIL.tail_bytes
    constants = {
        "limit": np.float32(127.5),
        "padding": np.float32(255.5),
        "scale": np.array([[-1.0, 1.0]], np.float32),
        "bias": np.array([[0.5, -0.5]], np.float32),
        "width": np.float32(width),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["bytes"], ["values"], to=TensorProto.FLOAT),
            helper.make_node("Greater", ["values", "limit"], ["is_high"]),
            helper.make_node("Less", ["values", "padding"], ["is_byte"]),
            helper.make_node("And", ["is_high", "is_byte"], ["counts"]),
            helper.make_node("Cast", ["counts"], ["ones"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["ones"], ["share"], axes=[1], keepdims=1),
            helper.make_node("Mul", ["share", "width"], ["count"]),
            helper.make_node("Mul", ["count", "scale"], ["votes"]),
            helper.make_node("Add", ["votes", "bias"], ["raw"]),
            helper.make_node("Softmax", ["raw"], ["scores"], axis=-1),
        ],
        "tiny_classifier",
        [helper.make_tensor_value_info("bytes", TensorProto.INT32, ["batch", width])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return _model(graph)


def stream_model() -> onnx.ModelProto:
    """``level = stateN = state / 2 + mean(|x|) + 0 * sr``: hears, and remembers (`STREAM`)."""
    graph = helper.make_graph(
        [
            helper.make_node("Abs", ["x"], ["loud"]),
            helper.make_node("ReduceMean", ["loud"], ["mean"], axes=[1], keepdims=1),
            helper.make_node("Mul", ["state", "half"], ["faded"]),
            helper.make_node("Cast", ["sr"], ["rate"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["rate", "zero"], ["nothing"]),
            helper.make_node("Add", ["mean", "faded"], ["sum"]),
            helper.make_node("Add", ["sum", "nothing"], ["stateN"]),
            helper.make_node("Identity", ["stateN"], ["level"]),
        ],
        "tiny_stream",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "samples"]),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["batch", 1]),
            helper.make_tensor_value_info("sr", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("level", TensorProto.FLOAT, ["batch", 1]),
            helper.make_tensor_value_info("stateN", TensorProto.FLOAT, ["batch", 1]),
        ],
        [
            numpy_helper.from_array(np.float32(value).reshape(()), name)
            for name, value in (("half", 0.5), ("zero", 0.0))
        ],
    )
    return _model(graph)


#: Two rates, so that one has to be chosen.
STREAM = StreamPreprocessing(
    input="x",
    rate_input="sr",
    rates=(
        StreamRate(sample_rate_hz=8, window_samples=4, context_samples=2),
        StreamRate(sample_rate_hz=16, window_samples=8, context_samples=4),
    ),
    states=(StreamState(input="state", output="stateN", shape=(1, 1)),),
)


def write_tiny_stream_bundle(path: Path, name: str = "ear", version: str = "1.0.0") -> Bundle:
    """One variant ``fp32`` of `stream_model`, with preprocessing `STREAM`."""
    with BundleWriter(path) as writer:
        onnx.save(stream_model(), writer.file("fp32/model.onnx"))
        return writer.finish(
            Manifest(
                name=name,
                version=version,
                task="tensor",
                inputs=(
                    TensorSpec(name="x", datatype="FP32", shape=(-1, -1)),
                    TensorSpec(name="state", datatype="FP32", shape=(-1, 1)),
                    TensorSpec(name="sr", datatype="INT64", shape=()),
                ),
                outputs=(
                    TensorSpec(name="level", datatype="FP32", shape=(-1, 1)),
                    TensorSpec(name="stateN", datatype="FP32", shape=(-1, 1)),
                ),
                preprocessing=STREAM,
                variants=(_variant("fp32", placement=("edge", "cloud"), quality_rank=0),),
            )
        )


def write_tiny_tensor_bundle(
    path: Path, name: str = "tiny", version: str = "1.0.0", *, task: str = "classification"
) -> Bundle:
    """Variants ``fp32`` (cloud first) and ``int8`` (edge first); x FP32 [-1,4] to y FP32 [-1,3]."""
    rounded = np.round(TENSOR_WEIGHTS * 127) / 127
    with BundleWriter(path) as writer:
        for variant_id, weights in (("fp32", TENSOR_WEIGHTS), ("int8", rounded)):
            onnx.save(tensor_model(weights), writer.file(f"{variant_id}/model.onnx"))
        return writer.finish(
            Manifest(
                name=name,
                version=version,
                task=task,
                inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),),
                outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 3)),),
                labels=TENSOR_LABELS if task == "classification" else (),
                label_output="y" if task == "classification" else None,
                variants=(
                    _variant("int8", placement=("edge", "cloud"), quality_rank=1),
                    _variant("fp32", placement=("cloud", "edge"), quality_rank=0),
                ),
            )
        )


def write_tiny_classifier_bundle(
    path: Path, name: str = "tiny-classifier", version: str = "1.0.0"
) -> Bundle:
    """One variant ``fp32`` that classifies any bytes as "text" or "binary" (`HEAD_TAIL`)."""
    with BundleWriter(path) as writer:
        onnx.save(classifier_model(), writer.file("fp32/model.onnx"))
        return writer.finish(
            Manifest(
                name=name,
                version=version,
                task="classification",
                inputs=(TensorSpec(name="bytes", datatype="INT32", shape=(-1, 32)),),
                outputs=(TensorSpec(name="scores", datatype="FP32", shape=(-1, 2)),),
                preprocessing=HEAD_TAIL,
                labels=CLASSIFIER_LABELS,
                label_output="scores",
                variants=(_variant("fp32", placement=("edge", "cloud"), quality_rank=0),),
            )
        )


def mean_model(
    name: str,
    shape: list[int | str],
    weights: np.ndarray,
    bias: np.ndarray,
    *,
    is_ids: bool = False,
) -> onnx.ModelProto:
    """``scores = softmax(mean(|input|) @ weights + bias)``; the mean is over the last axes."""
    axes = list(range(-1, 1 - len(shape), -1)) if len(shape) > 2 else [-1]
    graph = helper.make_graph(
        [
            helper.make_node("Cast", [name], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Abs", ["number"], ["size"]),
            helper.make_node("ReduceMean", ["size"], ["mean"], axes=axes, keepdims=len(shape) == 2),
            helper.make_node("MatMul", ["mean", "weights"], ["weighted"]),
            helper.make_node("Add", ["weighted", "bias"], ["sum"]),
            helper.make_node("Softmax", ["sum"], ["scores"], axis=-1),
        ],
        "mean",
        [
            helper.make_tensor_value_info(
                name, TensorProto.INT64 if is_ids else TensorProto.FLOAT, shape
            )
        ],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", weights.shape[1]])],
        [
            numpy_helper.from_array(weights.astype(np.float32), "weights"),
            numpy_helper.from_array(bias.astype(np.float32), "bias"),
        ],
    )
    return _model(graph)


def write_tiny_image_bundle(path: Path, name: str = "colour") -> Bundle:
    """Variants ``fp32`` (cloud first) and ``int8`` (edge first); `IMAGE`, `COLOURS`."""
    shape = ["batch", *IMAGE.shape]
    models = {
        variant: mean_model("pixels", shape, factor * np.eye(3), np.zeros(3))
        for variant, factor in (("fp32", 8.0), ("int8", 7.9))
    }
    return _write_classifier(path, name, models, IMAGE, shape, COLOURS)


def write_tiny_sound_bundle(path: Path, name: str = "noise") -> Bundle:
    """Variants ``fp32`` (cloud first) and ``int8`` (edge first); `AUDIO`, `LOUDNESS`."""
    shape: list[int | str] = ["batch", "samples"]
    models = {
        variant: mean_model("samples", shape, factor * np.array([[-9, 9]]), np.array([1, -1]))
        for variant, factor in (("fp32", 1.0), ("int8", 0.99))
    }
    return _write_classifier(path, name, models, AUDIO, shape, LOUDNESS)


def write_tiny_text_bundle(path: Path, name: str = "mood") -> Bundle:
    """Variants ``fp32`` (cloud first) and ``int8`` (edge first); `MOODS`. Needs `tokenizers`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    numbers = {word: number for number, word in enumerate(("other", "?", "[PAD]", *GLAD))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="other"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    shape: list[int | str] = ["batch", "tokens"]
    graphs = {
        variant: mean_model(
            "input_ids", shape, factor * np.array([[-1, 1]]), np.array([0.5, -0.5]), is_ids=True
        )
        for variant, factor in (("fp32", 1.0), ("int8", 0.99))
    }
    spec = TextPreprocessing(tokenizer="tokenizer.json", max_length_tokens=16)
    return _write_classifier(path, name, graphs, spec, shape, MOODS, tokenizer.to_str())


def _write_classifier(
    path: Path,
    name: str,
    models: dict[str, onnx.ModelProto],
    spec: ImagePreprocessing | AudioPreprocessing | TextPreprocessing,
    shape: list[int | str],
    labels: tuple[str, ...],
    tokenizer: str = "",
) -> Bundle:
    sizes = tuple(size if isinstance(size, int) else -1 for size in shape)
    is_text = isinstance(spec, TextPreprocessing)
    given = "input_ids" if isinstance(spec, TextPreprocessing) else spec.input
    with BundleWriter(path) as writer:
        if is_text:
            writer.file("tokenizer.json").write_text(tokenizer)
        for variant_id, model in models.items():
            onnx.save(model, writer.file(f"{variant_id}/model.onnx"))
        return writer.finish(
            Manifest(
                name=name,
                version="1.0.0",
                task="classification",
                inputs=(
                    TensorSpec(name=given, datatype="INT64" if is_text else "FP32", shape=sizes),
                ),
                outputs=(TensorSpec(name="scores", datatype="FP32", shape=(-1, len(labels))),),
                preprocessing=spec,
                labels=labels,
                label_output="scores",
                variants=(
                    _variant("int8", placement=("edge", "cloud"), quality_rank=1),
                    _variant("fp32", placement=("cloud", "edge"), quality_rank=0),
                ),
            )
        )


def _variant(variant_id: str, *, placement: tuple[str, ...], quality_rank: int) -> Variant:
    return Variant(
        id=variant_id,
        engine="onnxruntime",
        precision=variant_id,
        entry=f"{variant_id}/model.onnx",
        files=(),
        placement=placement,
        quality_rank=quality_rank,
        quality=(
            QualityFigure(
                metric="top1_agreement", value=1.0, higher_is_better=True, samples=8,
                reference="fp32",
            ),
        ),
        latency=(
            LatencyFigure(
                machine="test machine", execution_provider="CPUExecutionProvider",
                p50_ms=0.05, p99_ms=0.2, calls=100,
            ),
        ),
    )  # fmt: skip


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    # IR 9 and opset 17 are read by every ONNX Runtime in use.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    return model
