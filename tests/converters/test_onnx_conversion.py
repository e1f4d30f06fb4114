"""ONNX files become bundles that compute the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.settings import Int8Settings, Settings
from nearfar.bundle import Bundle
from nearfar.errors import BundleError, ConversionError, InvalidInput
from tests.support.tiny import CLASSIFIER_LABELS, HEAD_TAIL, classifier_model, tensor_model

WEIGHTS = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    onnx.save(tensor_model(WEIGHTS), tmp_path / "source" / "scores.onnx")
    return tmp_path / "source" / "scores.onnx"


def convert(model: Path, **options: object) -> Bundle:
    options.setdefault("measure", False)
    return convert_model(model, model.parent.parent / "bundle", ConversionOptions(**options))


def run(bundle: Bundle, variant_id: str, **feeds: np.ndarray) -> np.ndarray:
    path = bundle.variant_entry(bundle.variant(variant_id))
    return onnxruntime.InferenceSession(str(path)).run(None, feeds)[0]


def figures(bundle: Bundle, variant_id: str) -> dict[str, float]:
    return {figure.metric: figure.value for figure in bundle.variant(variant_id).quality}


def test_a_plain_model_is_served_as_tensors(model: Path):
    bundle = convert(model)
    manifest = bundle.manifest
    bundle.verify()
    assert (manifest.name, manifest.task, manifest.version) == ("scores", "tensor", "1.0.0")
    assert [(s.name, s.datatype, s.shape) for s in manifest.inputs] == [("x", "FP32", (-1, 64))]
    assert figures(bundle, "fp32")["max_abs_error"] < 1e-6
    assert len(manifest.lineage.source_sha256) == 64
    assert "onnxruntime" in manifest.lineage.tools
    x = np.ones((2, 64), np.float32)
    expected = onnxruntime.InferenceSession(str(model)).run(None, {"x": x})[0]
    np.testing.assert_allclose(run(bundle, "fp32", x=x), expected, rtol=1e-5)


def test_right_classes_among_the_samples_give_accuracy_and_f1(model: Path, tmp_path: Path):
    random = np.random.default_rng(3)
    x = random.standard_normal((40, 64)).astype(np.float32)
    right = onnxruntime.InferenceSession(str(model)).run(None, {"x": x})[0].argmax(axis=-1)
    wrong = right.copy()
    wrong[:10] = (wrong[:10] + 1) % 8
    np.savez(tmp_path / "rows.npz", x=x, labels=wrong)
    labels = tuple("abcdefgh")
    options = {"labels": labels, "samples": tmp_path / "rows.npz", "variants": ("int8", "fp32")}
    settings = Settings(int8=Int8Settings(method="static"))
    bundle = convert(model, settings=settings, **options)
    found = figures(bundle, "fp32")
    # The search and the calibration took every fourth row: 10 of 40, three of them wrong.
    assert found["accuracy"] == pytest.approx(23 / 30)
    assert 0.5 < found["f1_macro"] < 1
    assert {"accuracy", "f1_macro", "accuracy_unfused"} <= set(figures(bundle, "int8"))
    np.savez(tmp_path / "rows.npz", x=x, labels=np.array(["a"] * 40))
    with pytest.raises(ConversionError, match="40 whole numbers are needed"):
        convert(model, **options, replace=True)


def test_labels_make_a_classifier_and_int8_is_compared_with_the_source(model: Path):
    labels = model.parent / "labels.txt"
    labels.write_text("\n".join("abcdefgh"))
    bundle = convert(
        model, labels=labels, variants=("int8", "fp32"), name="digits", version="2.1.0"
    )
    manifest = bundle.manifest
    assert (manifest.name, manifest.version, manifest.task) == ("digits", "2.1.0", "classification")
    assert manifest.labels == tuple("abcdefgh")
    assert manifest.label_output == "y"
    assert [v.id for v in manifest.variants] == ["fp32", "int8"]
    assert manifest.variants[0].placement[0] == "cloud"
    assert manifest.variants[1].placement[0] == "edge"
    assert figures(bundle, "fp32")["top1_agreement"] == 1.0
    assert figures(bundle, "int8")["top1_agreement"] >= 0.9
    assert 0 < figures(bundle, "int8")["max_abs_error"] < 0.1
    assert bundle.variant("int8").size_bytes != bundle.variant("fp32").size_bytes


def test_figures_come_from_the_samples_that_were_given(model: Path):
    np.savez(model.parent / "real.npz", x=np.eye(64, dtype=np.float32))
    bundle = convert(model, samples=model.parent / "real.npz")
    assert bundle.manifest.variants[0].quality[0].samples == 64


@pytest.mark.parametrize(
    "arrays",
    [
        {"z": np.zeros((2, 64), np.float32)},
        {"x": np.zeros((2, 64), np.float64)},
        {"x": np.zeros((0, 64), np.float32)},
    ],
)
def test_samples_that_do_not_fit_are_named(model: Path, arrays):
    np.savez(model.parent / "real.npz", **arrays)
    with pytest.raises(ConversionError, match=r"real\.npz"):
        convert(model, samples=model.parent / "real.npz")


def test_a_pickle_among_the_samples_is_not_loaded(model: Path):
    np.save(model.parent / "real.npz", np.array([object()]), allow_pickle=True)
    (model.parent / "real.npz.npy").rename(model.parent / "real.npz")
    with pytest.raises(ConversionError, match=r"real\.npz"):
        convert(model, samples=model.parent / "real.npz")


def test_speed_and_memory_are_measured(model: Path):
    (variant,) = convert(model, measure=True).manifest.variants
    (figure,) = variant.latency
    assert 0 < figure.p50_ms <= figure.p99_ms
    assert figure.calls >= 20
    assert "core" in figure.machine
    assert variant.requirements.memory_bytes > 0


def test_a_magika_model_needs_no_options(tmp_path: Path):
    folder = tmp_path / "bytes_v1"
    folder.mkdir()
    onnx.save(classifier_model(), folder / "model.onnx")
    config = {
        "beg_size": HEAD_TAIL.head_bytes, "mid_size": 0, "end_size": HEAD_TAIL.tail_bytes,
        "block_size": HEAD_TAIL.block_bytes, "padding_token": 256, "min_file_size_for_dl": 8,
        "target_labels_space": list(CLASSIFIER_LABELS),
    }  # fmt: skip
    (folder / "config.min.json").write_text(json.dumps(config))
    bundle = convert(folder / "model.onnx")
    manifest = bundle.manifest
    assert manifest.name == "bytes-v1"
    assert manifest.labels == CLASSIFIER_LABELS
    assert manifest.preprocessing.min_bytes == 8
    (quality, *_) = manifest.variants[0].quality
    assert (quality.metric, quality.value) == ("top1_agreement", 1.0)
    assert quality.samples >= 50  # real files of this Python


def test_preprocessing_can_be_given_as_json(tmp_path: Path):
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "m.onnx"
    onnx.save(classifier_model(), path)
    stated = (
        '{"kind":"head-tail","head_bytes":16,"tail_bytes":16,"block_bytes":64,"padding_value":256}'
    )
    assert convert(path, preprocessing=stated).manifest.preprocessing.tail_bytes == 16
    (tmp_path / "p.json").write_text(stated.replace("16", "17"))
    with pytest.raises(ConversionError, match="rows of 34"):
        convert(path, preprocessing=str(tmp_path / "p.json"), replace=True)


@pytest.mark.parametrize("stated", ["{", '{"kind":"guess"}', '{"kind":"text"}', "/nowhere.json"])
def test_preprocessing_that_does_not_fit_is_refused(model: Path, stated: str):
    with pytest.raises(ConversionError, match="--preprocessing"):
        convert(model, preprocessing=stated)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("few.txt", "a\nb", "2 labels, but output 'y' has 8 scores"),
        ("none.txt", "\n\n", "no labels"),
        ("bad.json", '{"a": 1}', "not a list of labels"),
        ("broken.json", "[", "cannot be read"),
        ("binary.txt", b"\xff\xfe\xff", "cannot be read"),
    ],
)
def test_labels_that_do_not_fit_are_refused(model: Path, name: str, content, expected: str):
    file = model.parent / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConversionError, match=expected):
        convert(model, labels=file)


def test_a_model_that_gives_nan_is_refused_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "source").mkdir()
    onnx.save(tensor_model(WEIGHTS * np.float32("inf")), tmp_path / "source" / "m.onnx")
    with pytest.raises(ConversionError, match="NaN"):
        convert(tmp_path / "source" / "m.onnx")
    assert os.listdir(tmp_path) == ["source"]


def test_an_existing_bundle_is_replaced_only_when_allowed(model: Path):
    first = convert(model, description="first")
    with pytest.raises(BundleError, match="--force"):
        convert(model, description="second")
    assert first.manifest.description == "first"
    assert convert(model, description="second", replace=True).manifest.description == "second"


def test_two_conversions_give_the_same_bytes(model: Path):
    first = convert(model, variants=("int8", "fp32")).manifest
    assert convert(model, variants=("int8", "fp32"), replace=True).manifest == first


def test_intermediate_files_are_kept_on_request_only(model: Path):
    convert(model)
    assert sorted(os.listdir(model.parent.parent)) == ["bundle", "source"]
    convert(model, keep_work=True, replace=True)
    assert sorted(os.listdir(model.parent.parent)) == ["bundle", "bundle.work", "source"]


@pytest.mark.parametrize(
    "options", [{"name": "Not Good"}, {"name": "../up"}, {"name": ""}, {"version": "1"}]
)
def test_names_and_versions_are_checked_first(model: Path, options):
    with pytest.raises(InvalidInput):
        convert(model, **options)


def test_a_variant_that_cannot_be_made_lists_those_that_can(model: Path):
    with pytest.raises(ConversionError, match="fp32, fp16, bf16, int8, int4"):
        convert(model, variants=("int2",))


def test_a_task_that_does_not_fit_is_refused(model: Path):
    with pytest.raises(ConversionError, match="text-generation"):
        convert(model, task="text-generation")
