from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from nearfar.bundle import Bundle
from nearfar.engines import load_engine
from nearfar.engines.model import LoadedModel
from nearfar.errors import BundleError, EngineError, InvalidInput, ModelNotFound
from nearfar.generation import GenerationOptions, Prompt
from tests.support.tiny import write_tiny_classifier_bundle, write_tiny_tensor_bundle


@pytest.fixture
def bundle(tmp_path):
    return write_tiny_tensor_bundle(tmp_path / "tiny")


def as_engine(bundle, engine):
    variants = tuple(
        msgspec.structs.replace(variant, engine=engine) for variant in bundle.manifest.variants
    )
    manifest = msgspec.structs.replace(bundle.manifest, variants=variants)
    return Bundle(bundle.path, manifest)


@pytest.mark.parametrize("engine", ["torch"])
def test_engines_this_version_does_not_run_are_named_with_what_to_do(bundle, engine):
    with pytest.raises(EngineError, match=f"'{engine}', which this version does not run") as caught:
        load_engine(as_engine(bundle, engine), "fp32")
    assert "onnxruntime, onnxruntime-genai" in caught.value.fix


def test_an_unknown_variant_is_not_found(bundle):
    with pytest.raises(ModelNotFound, match="'int3'"):
        load_engine(bundle, "int3")


def test_a_changed_file_is_refused_before_a_library_reads_it(bundle):
    file = bundle.path / "fp32" / "model.onnx"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256"):
        load_engine(bundle, "fp32")
    load_engine(bundle, "int8").close()  # the other variant is whole


def test_a_missing_package_is_named_with_how_to_install_it(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "nearfar.engines.onnxruntime_engine", raising=False)
    with pytest.raises(EngineError, match=r"nearfar\[edge\]") as caught:
        load_engine(bundle, "fp32")
    assert "onnxruntime" in caught.value.problem


def test_a_folder_that_is_no_text_model_is_a_bundle_error(bundle):
    pytest.importorskip("onnxruntime_genai")
    with pytest.raises(BundleError, match=r"genai_config\.json of tiny/fp32 is missing"):
        load_engine(as_engine(bundle, "onnxruntime-genai"), "fp32")


def test_importing_the_engines_imports_no_inference_library():
    statement = (
        "import sys, nearfar.engines.model, nearfar.engines.selection, edge_runtime\n"
        "heavy = {'onnxruntime', 'onnxruntime_genai', 'tokenizers', 'torch', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", statement], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# -- LoadedModel -----------------------------------------------------------------------------------


def test_bytes_are_preprocessed_and_run(tmp_path):
    model = LoadedModel(write_tiny_classifier_bundle(tmp_path / "c"), "fp32")
    scores = model.infer_raw("bytes", [b"plain text " * 9, bytes(range(200, 250)) * 3])["scores"]
    assert scores.argmax(axis=1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("form", "items"), [("text", ["a"]), ("bytes", ["a"]), ("text", [b"a"]), ("bytes", [b"a", "b"])]
)
def test_items_of_another_form_are_refused(tmp_path, form, items):
    model = LoadedModel(write_tiny_classifier_bundle(tmp_path / "c"), "fp32")
    with pytest.raises(InvalidInput, match="takes bytes"):
        model.infer_raw(form, items)


def test_an_empty_batch_is_refused(tmp_path):
    model = LoadedModel(write_tiny_classifier_bundle(tmp_path / "c"), "fp32")
    with pytest.raises(InvalidInput, match="batch is empty"):
        model.infer_raw("bytes", [])


def test_a_tensor_model_does_not_preprocess_and_does_not_generate(bundle):
    model = LoadedModel(bundle, "fp32")
    with pytest.raises(InvalidInput, match="Use tensors"):
        model.infer_raw("text", ["a"])
    with pytest.raises(InvalidInput, match=r"Use infer\(\)"):
        model.generate(Prompt(text="a"), GenerationOptions())
