"""Recognising sources, and refusing what is damaged, unsafe or unsupported: by name, with a fix."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from converters.pipeline import convert_model
from converters.sources.base import find_wheel, slug, spdx
from converters.sources.detect import open_source
from converters.sources.gguf import GgufSource
from converters.sources.huggingface import HuggingFaceSource
from converters.sources.onnx_file import OnnxSource
from nearfar.errors import ConversionError
from tests.support.tiny import tensor_model
from tests.support.tiny_models import write_tiny_bert


def refusal(path: Path, tmp_path: Path) -> str:
    """The error of converting `path`; checks that it teaches and that nothing is left."""
    with pytest.raises(ConversionError) as caught:
        convert_model(path, tmp_path / "out" / "bundle")
    assert caught.value.fix
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    return str(caught.value)


def test_kinds_are_recognised_by_content(tmp_path, tiny_llama, tiny_bert, tiny_gguf):
    onnx.save(tensor_model(), tmp_path / "m.onnx")
    renamed = tmp_path / "renamed.dat"
    shutil.copyfile(tiny_gguf, renamed)
    assert isinstance(open_source(tmp_path / "m.onnx"), OnnxSource)
    assert isinstance(open_source(renamed), GgufSource)
    llama, bert = open_source(tiny_llama), open_source(tiny_bert)
    assert isinstance(llama, HuggingFaceSource)
    assert isinstance(bert, HuggingFaceSource)
    assert (llama.task, bert.task) == ("text-generation", "embedding")


def test_facts_are_taken_from_the_source(tiny_bert, tiny_gguf):
    gguf = open_source(tiny_gguf)
    assert (gguf.title, gguf.default_name, gguf.license) == ("Tiny-Llama", "tiny-llama", "MIT")
    assert len(gguf.sha256()) == 64
    assert open_source(tiny_bert).license == "Apache-2.0"


def test_the_wheel_a_model_came_in_is_found(tmp_path: Path):
    model = tmp_path / "package" / "models" / "model.onnx"
    model.parent.mkdir(parents=True)
    onnx.save(tensor_model(), model)
    info = tmp_path / "package-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: package\nVersion: 2.1\nLicense: apache-2.0\n\nLicense: X")
    (info / "RECORD").write_text("package/models/model.onnx,sha256=x,1\n")
    wheel = find_wheel(model)
    assert wheel is not None
    assert (wheel.name, wheel.version, wheel.license) == ("package", "2.1", "Apache-2.0")
    assert open_source(model).label == "model.onnx (package 2.1)"
    (info / "RECORD").write_text("package/models/other.onnx,sha256=x,1\n")
    assert find_wheel(model) is None


def test_nothing_there(tmp_path: Path):
    assert "There is no model at" in refusal(tmp_path / "nowhere.gguf", tmp_path)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.pkl"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    assert "is a pickle" in refusal(tmp_path / name, tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"hello", "not a model"),
        ("a", b"", "not a model"),
        ("a.gguf", b"not gguf", "does not begin with GGUF"),
        ("a.gguf", b"GGUF", "damaged or cut"),
        ("a.gguf", b"GGUF" + b"\xff" * 64, "damaged or cut"),
        ("a.onnx", b"", "not an ONNX model"),
        ("a.onnx", b"\x00\x01garbage", "not an ONNX model"),
        ("a.safetensors", b"x", "weights only"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, name: str, content: bytes, expected: str):
    (tmp_path / name).write_bytes(content)
    assert expected in refusal(tmp_path / name, tmp_path)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_a_cut_gguf_file_is_noticed_wherever_it_is_cut(tmp_path, tiny_gguf, share: float):
    data = tiny_gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: int(len(data) * share)])
    assert "cut" in refusal(cut, tmp_path)


def test_a_gguf_file_without_tokenizer_is_no_language_model(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "no language model" in refusal(tmp_path / "a.gguf", tmp_path)


def test_a_folder_without_config(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    assert "no config.json" in refusal(tmp_path / "folder", tmp_path)


def changed(folder: Path, tmp_path: Path, **changes: object) -> Path:
    """A copy of a model folder with another config.json; a value of `None` removes a key."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(kept))
    return copy


def test_an_unsupported_architecture_is_named(tmp_path, tiny_bert):
    copy = changed(tiny_bert, tmp_path, architectures=["T5Model"], model_type="t5")
    assert "'T5Model', which is not supported" in refusal(copy, tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tmp_path, tiny_bert):
    copy = changed(tiny_bert, tmp_path, auto_map={"AutoModel": "evil.Model"})
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    assert "auto_map" in refusal(copy, tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_config_is_named(tmp_path, tiny_bert):
    copy = changed(tiny_bert, tmp_path)
    (copy / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(copy, tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.9])
def test_cut_safetensors_are_named(tmp_path, tiny_bert, keep: float):
    copy = changed(tiny_bert, tmp_path)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    assert "model.safetensors is damaged or cut" in refusal(copy, tmp_path)


def test_a_folder_with_pickled_weights_only(tmp_path, tiny_bert):
    copy = changed(tiny_bert, tmp_path)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pickles only (pytorch_model.bin)" in refusal(copy, tmp_path)


def test_a_shard_index_cannot_point_outside(tmp_path, tiny_bert):
    copy = changed(tiny_bert, tmp_path)
    index = {"weight_map": {"a": "../../etc/shadow"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside the folder" in refusal(copy, tmp_path)


def test_a_pooling_that_is_not_supported_is_named(tmp_path: Path):
    folder = write_tiny_bert(tmp_path / "bert", pooling="max")
    assert "no pooling, which is not supported" in refusal(folder, tmp_path)


def external_model(path: Path, location: str) -> Path:
    """An ONNX file whose weights lie in `location`."""
    weights = TensorProto(
        name="weights", data_type=TensorProto.FLOAT, dims=[4, 3],
        data_location=TensorProto.EXTERNAL,
    )  # fmt: skip
    weights.external_data.add(key="location", value=location)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weights"], ["y"])],
        "external",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "link.bin", "a/../../b"])
def test_onnx_weights_cannot_lie_outside_the_folder(tmp_path: Path, location: str):
    (tmp_path / "secret.bin").write_bytes(np.ones((4, 3), np.float32).tobytes())
    path = external_model(tmp_path / "model" / "m.onnx", location)
    (path.parent / "link.bin").symlink_to(tmp_path / "secret.bin")
    assert "outside the model's folder" in refusal(path, tmp_path)


def test_missing_onnx_weights_are_named(tmp_path: Path):
    path = external_model(tmp_path / "model" / "m.onnx", "weights.bin")
    assert "'weights.bin' with its weights is missing" in refusal(path, tmp_path)


def test_onnx_weights_beside_the_model_are_taken_along(tmp_path: Path):
    path = external_model(tmp_path / "model" / "m.onnx", "data/weights.bin")
    (path.parent / "data").mkdir()
    (path.parent / "data" / "weights.bin").write_bytes(np.ones((4, 3), np.float32).tobytes())
    bundle = convert_model(path, tmp_path / "bundle")
    (variant,) = bundle.manifest.variants
    assert {entry.path for entry in variant.files} == {"fp32/model.onnx", "fp32/data/weights.bin"}
    bundle.verify()


def test_an_onnx_model_that_the_engine_refuses(tmp_path: Path):
    model = tensor_model()
    model.graph.node[0].op_type = "NoSuchOperator"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert "ONNX Runtime cannot load" in refusal(tmp_path / "m.onnx", tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("SmolLM2 135M", "smollm2-135m"), ("__", "model"), ("é", "model"), ("a" * 99, "a" * 64)],
)
def test_names_are_made_of_titles(text: str, expected: str):
    assert slug(text) == expected


def test_licences_are_spelled_as_spdx_does():
    assert spdx("apache-2.0") == "Apache-2.0"
    assert spdx(" MIT ") == "MIT"
    assert spdx("other") == "other"
    assert spdx("Permission is hereby granted …" * 10) == ""
