"""Input that is broken or meant to harm: a typed error, nothing half made, the cache as it was."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from converters.cache import digest_of_path
from converters.libraries import told_by_onnxruntime
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from nearfar.bundle import Bundle
from nearfar.errors import ConversionError
from tests.converters.test_sources import external_model
from tests.support.tiny import tensor_model

WEIGHTS = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A model that was converted, and whose steps are in the cache."""
    (tmp_path / "good").mkdir()
    onnx.save(tensor_model(WEIGHTS), tmp_path / "good" / "m.onnx")
    convert(tmp_path / "good" / "m.onnx", tmp_path / "first", tmp_path / "cache")
    return tmp_path / "good" / "m.onnx"


def convert(source: Path, target: Path, cache: Path, **options: object) -> Bundle:
    options.setdefault("variants", ("fp32", "int8"))
    chosen = ConversionOptions(name="m", measure=False, cache=cache, **options)  # type: ignore[arg-type]
    return convert_model(source, target, chosen)


def unknown_operator(folder: Path) -> Path:
    model = tensor_model(WEIGHTS)
    model.graph.node[0].op_type = "NoSuchOperator"
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def operator_without_kernel(folder: Path) -> Path:
    model = tensor_model(WEIGHTS)
    # A valid operator of a domain that only others' runtimes know.
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def nan_weights(folder: Path) -> Path:
    weights = WEIGHTS.copy()
    weights[3, 3] = np.nan
    onnx.save(tensor_model(weights), folder / "m.onnx")
    return folder / "m.onnx"


def cut_file(folder: Path) -> Path:
    data = tensor_model(WEIGHTS).SerializeToString()
    (folder / "m.onnx").write_bytes(data[: len(data) // 2])
    return folder / "m.onnx"


def weights_above(folder: Path) -> Path:
    (folder.parent / "secret.bin").write_bytes(bytes(48))
    return external_model(folder / "m.onnx", "../secret.bin")


def weights_anywhere(folder: Path) -> Path:
    return external_model(folder / "m.onnx", "/etc/hostname")


def weights_cut(folder: Path) -> Path:
    (folder / "w.bin").write_bytes(bytes(7))
    return external_model(folder / "m.onnx", "w.bin")


def weights_beyond_the_end(folder: Path) -> Path:
    path = external_model(folder / "m.onnx", "w.bin")
    (folder / "w.bin").write_bytes(bytes(48))
    model = onnx.load(str(path), load_external_data=False)
    model.graph.initializer[0].external_data.add(key="offset", value=str(1 << 40))
    path.write_bytes(model.SerializeToString())
    return path


def a_pickle(folder: Path) -> Path:
    (folder / "m.pt").write_bytes(pickle.dumps({"weight": 1}))
    return folder / "m.pt"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (unknown_operator, "NoSuchOperator"),
        (operator_without_kernel, "com.example"),
        (nan_weights, "weight 'weights' has NaN"),
        (cut_file, "not an ONNX model"),
        (weights_above, "outside the model's folder"),
        (weights_anywhere, "outside the model's folder"),
        (weights_cut, "cannot load"),
        (weights_beyond_the_end, "cannot load"),
        (a_pickle, "is a pickle"),
    ],
)
def test_bad_files_leave_nothing_and_harm_no_cache(
    good: Path, tmp_path: Path, make: Callable[[Path], Path], says: str
):
    cache = tmp_path / "cache"
    (tmp_path / "bad").mkdir()
    entries = {path.relative_to(cache): digest_of_path(path) for path in cache.glob("*/*")}
    assert entries
    with pytest.raises(ConversionError) as caught:
        convert(make(tmp_path / "bad"), tmp_path / "out" / "b", cache)
    assert says in str(caught.value)
    assert caught.value.fix
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []
    # Everything that was there is there unchanged, and serves.
    for path, digest in entries.items():
        assert digest_of_path(cache / path) == digest
    assert not list(cache.glob(".*"))
    again = convert(good, tmp_path / "second", cache)
    first = (tmp_path / "first" / "manifest.json").read_bytes()
    assert (again.path / "manifest.json").read_bytes() == first


def test_a_bundle_that_was_there_survives_a_failure(good: Path, tmp_path: Path):
    before = (tmp_path / "first" / "manifest.json").read_bytes()
    (tmp_path / "bad").mkdir()
    bad = nan_weights(tmp_path / "bad")
    with pytest.raises(ConversionError):
        convert(bad, tmp_path / "first", tmp_path / "cache", replace=True)
    assert (tmp_path / "first" / "manifest.json").read_bytes() == before


def test_inputs_that_the_model_does_not_take(good: Path, tmp_path: Path):
    np.savez(tmp_path / "wrong.npz", x=np.zeros((4, 65), np.float32))
    with pytest.raises(ConversionError, match=r"has the shape \[4, 65\], the model takes"):
        convert(good, tmp_path / "out", tmp_path / "cache", samples=tmp_path / "wrong.npz")
    assert not (tmp_path / "out").exists()


def test_samples_that_are_no_archive_are_not_called_a_pickle(good: Path, tmp_path: Path):
    (tmp_path / "rows.npz").write_bytes(b"no")
    with pytest.raises(ConversionError, match="no archive of arrays") as caught:
        convert(good, tmp_path / "out", tmp_path / "cache", samples=tmp_path / "rows.npz")
    assert "allow_pickle" not in str(caught.value)


def test_refusals_of_onnxruntime_are_told_without_its_insides():
    said = told_by_onnxruntime(
        RuntimeError(
            "[ONNXRuntimeError] : 1 : FAIL : Load model from /m.onnx failed:/src/core/graph/"
            "model.cc:256 onnxruntime::Model::Model(onnx::ModelProto&&, const onnxruntime::"
            "ModelOptions&) Unsupported model IR version: 14, max supported IR version: 10\n"
        )
    )
    assert said == "Unsupported model IR version: 14, max supported IR version: 10"


# -- Hugging Face folders and GGUF files


@pytest.fixture
def encoder(tiny_bert: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_bert, tmp_path / "encoder")
    return tmp_path / "encoder"


def refused(source: Path, tmp_path: Path, **options: object) -> str:
    with pytest.raises(ConversionError) as caught:
        convert(source, tmp_path / "out" / "b", tmp_path / "cache", **options)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []
    return str(caught.value)


def test_a_missing_tokenizer(encoder: Path, tmp_path: Path):
    (encoder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(encoder, tmp_path)
    # A vocabulary without words passes for a tokenizer in transformers.
    (encoder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    assert "tokenizer" in refused(encoder, tmp_path)


def test_nan_in_safetensors_is_named(encoder: Path, tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(encoder / "model.safetensors")
    name = next(name for name in sorted(tensors) if "encoder.layer.0" in name)
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
    said = refused(encoder, tmp_path)
    assert "NaN" in said
    assert name.removeprefix("bert.") in said


def test_a_header_that_points_beyond_the_file(encoder: Path, tmp_path: Path):
    file = encoder / "model.safetensors"
    header = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    assert "damaged or cut" in refused(encoder, tmp_path)


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_pickled_weights_are_read_only_when_asked_for(encoder: Path, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    torch.save(load_file(encoder / "model.safetensors"), encoder / "pytorch_model.bin")
    (encoder / "model.safetensors").unlink()
    assert "--allow-pickle" in refused(encoder, tmp_path, variants=("fp32",))
    bundle = convert(
        encoder, tmp_path / "b", tmp_path / "cache", allow_pickle=True, variants=("fp32",)
    )
    bundle.verify()
    assert bundle.manifest.task == "embedding"


def test_code_in_a_pickle_is_not_run_even_then(encoder: Path, tmp_path: Path):
    (encoder / "model.safetensors").unlink()
    (encoder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    said = refused(encoder, tmp_path, allow_pickle=True)
    # torch's own advice is to run it.
    assert "hold more than weights" in said
    assert "weights_only" not in said
    assert not (tmp_path / "exploded").exists()


def test_a_gguf_file_with_damaged_blocks(tiny_gguf: Path, tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    data = bytearray(tiny_gguf.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(tiny_gguf).tensors if t.name == "blk.0.ffn_up.weight")
    start = int(tensor.data_offset)
    data[start : start + 4] = np.float32("nan").tobytes()
    (tmp_path / "damaged.gguf").write_bytes(data)
    said = refused(tmp_path / "damaged.gguf", tmp_path, variants=("fp32",))
    assert "up_proj" in said
    assert "NaN" in said


def test_an_external_path_in_a_subgraph_cannot_leave_the_folder(tmp_path: Path):
    """Not only the weights at the top may name a file."""
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])], "inner", [],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])],
        [onnx.TensorProto(name="w", data_type=1, dims=[2],
                          data_location=onnx.TensorProto.EXTERNAL)],
    )  # fmt: skip
    inner.initializer[0].external_data.add(key="location", value="../../etc/passwd")
    graph = helper.make_graph(
        [helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner)], "outer",
        [helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.zeros(1, np.float32), "unused")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert "outside the model's folder" in refused(tmp_path / "m.onnx", tmp_path)
