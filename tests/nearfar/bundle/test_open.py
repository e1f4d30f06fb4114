"""Opening and verifying bundles: every kind of damage is named."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from nearfar.bundle import Bundle, open_bundle
from nearfar.bundle.bundle import MAX_MANIFEST_BYTES
from nearfar.errors import BundleError, ModelNotFound
from tests.support.tiny import write_tiny_classifier_bundle, write_tiny_tensor_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_tensor_bundle(tmp_path / "tiny")


@pytest.fixture
def with_shared_file(tmp_path: Path) -> Path:
    """A bundle whose manifest names a shared file ``notes.txt``."""
    path = write_tiny_tensor_bundle(tmp_path / "shared").path
    (path / "notes.txt").write_text("shared")
    digest = hashlib.sha256(b"shared").hexdigest()
    entry = {"path": "notes.txt", "size_bytes": 6, "sha256": digest}
    change(path, lambda m: m["files"].append(entry))
    return path


def change(path: Path, edit) -> None:
    """Rewrite the manifest in `path` after `edit(manifest)`."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))


def test_a_written_bundle_opens_and_verifies(bundle: Bundle):
    opened = open_bundle(bundle.path)
    opened.verify()
    assert opened.manifest == bundle.manifest
    assert opened.size_bytes() == opened.size_bytes("fp32") + opened.size_bytes("int8")


def test_the_classifier_bundle_verifies(tmp_path: Path):
    write_tiny_classifier_bundle(tmp_path / "c").verify()


def test_shared_files_are_verified_before_they_are_handed_out(with_shared_file: Path):
    opened = open_bundle(with_shared_file)
    assert opened.shared_file("notes.txt").read_text() == "shared"
    (with_shared_file / "notes.txt").write_text("SHARED")
    with pytest.raises(BundleError, match=r"notes\.txt.*SHA-256"):
        opened.shared_file("notes.txt")


def test_a_shared_file_that_is_not_listed_is_refused(bundle: Bundle):
    with pytest.raises(BundleError, match=r"no shared file 'int8/model\.onnx'"):
        bundle.shared_file("int8/model.onnx")


@pytest.mark.parametrize("variant_id", [None, "int8"])
def test_a_flipped_bit_is_found_even_if_size_and_time_stay(bundle: Bundle, variant_id):
    bundle.verify()
    file = bundle.path / "int8" / "model.onnx"
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match=r"int8/model\.onnx.*SHA-256"):
        bundle.verify(variant_id)
    bundle.verify("fp32")


def test_the_entry_is_verified_before_an_engine_gets_it(bundle: Bundle):
    variant = bundle.manifest.variant("int8")
    assert variant is not None
    assert bundle.variant_entry(variant) == bundle.path / "int8" / "model.onnx"
    (bundle.path / "int8" / "model.onnx").write_bytes(b"x" * variant.size_bytes)
    with pytest.raises(BundleError, match=r"int8/model\.onnx"):
        bundle.variant_entry(variant)


def test_a_cut_file_is_found_on_opening(bundle: Bundle):
    file = bundle.path / "fp32" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"fp32/model\.onnx.*bytes; manifest\.json states"):
        open_bundle(bundle.path)


def test_a_missing_file_is_found_on_opening(bundle: Bundle):
    (bundle.path / "fp32" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"fp32/model\.onnx.*cannot be found"):
        open_bundle(bundle.path)


def test_a_folder_in_the_place_of_a_file_is_refused(bundle: Bundle):
    file = bundle.path / "fp32" / "model.onnx"
    file.unlink()
    file.mkdir()
    with pytest.raises(BundleError, match="not a regular file"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("part", ["int8/model.onnx", "int8"])
def test_links_inside_a_bundle_are_refused(bundle: Bundle, tmp_path: Path, part: str):
    inside = bundle.path / part
    outside = tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(BundleError, match="symbolic link"):
        open_bundle(bundle.path)


def test_a_bundle_may_be_reached_through_a_link(bundle: Bundle, tmp_path: Path):
    (tmp_path / "link").symlink_to(bundle.path)
    open_bundle(tmp_path / "link").verify()


def test_an_unlisted_file_is_reported_by_verify(bundle: Bundle):
    (bundle.path / "README.md").write_text("allowed")
    bundle.verify()
    (bundle.path / "int8" / "extra.bin").write_bytes(b"?")
    with pytest.raises(BundleError, match=r"int8/extra\.bin.*not named"):
        bundle.verify()


def test_an_unlisted_file_in_an_entry_folder_stops_the_engine(tmp_path: Path):
    path = write_tiny_tensor_bundle(tmp_path / "folder").path
    change(path, lambda m: [v.update(entry=v["id"]) for v in m["variants"]])
    opened = open_bundle(path)
    variant = opened.manifest.variant("int8")
    assert opened.variant_entry(variant) == path / "int8"
    (path / "int8" / "chat_template.jinja").write_text("injected")
    with pytest.raises(BundleError, match=r"chat_template\.jinja"):
        opened.variant_entry(variant)


def test_an_unknown_variant_lists_the_known_ones(bundle: Bundle):
    with pytest.raises(ModelNotFound, match="int8, fp32"):
        bundle.verify("int2")


def test_progress_adds_up_to_the_size(bundle: Bundle):
    for _ in range(2):  # read, then remembered
        counts: list[int] = []
        bundle.verify(progress=counts.append)
        assert sum(counts) == bundle.size_bytes()


def test_no_folder_and_no_manifest_are_told_apart(tmp_path: Path):
    with pytest.raises(BundleError, match="no bundle folder at"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        open_bundle(tmp_path)


def test_a_manifest_larger_than_the_bound_is_not_parsed(bundle: Bundle):
    (bundle.path / "manifest.json").write_bytes(b" " * (MAX_MANIFEST_BYTES + 1))
    with pytest.raises(BundleError, match="larger than"):
        open_bundle(bundle.path)


def test_a_named_pipe_as_manifest_is_refused_at_once(bundle: Bundle):
    (bundle.path / "manifest.json").unlink()
    os.mkfifo(bundle.path / "manifest.json")
    with pytest.raises(BundleError, match="not a regular file"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null{}"])
def test_what_is_not_json_is_refused(bundle: Bundle, text: bytes):
    (bundle.path / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("version", [0, 2, 10**9])
def test_an_unknown_schema_version_is_refused_before_anything_else(bundle: Bundle, version: int):
    change(bundle.path, lambda m: m.update(schema_version=version, variants="of another form"))
    with pytest.raises(BundleError, match=f"schema_version {version}"):
        open_bundle(bundle.path)


def test_unknown_fields_are_ignored(bundle: Bundle):
    change(bundle.path, lambda m: m.update(from_the_future={"x": 1}))
    assert open_bundle(bundle.path).manifest == bundle.manifest


def first(manifest: dict) -> dict:
    return manifest["variants"][0]


DAMAGES = {
    "name": lambda m: m.update(name="../up"),
    "version": lambda m: m.update(version="1.0"),
    "task": lambda m: m.update(task="guessing"),
    "variants": lambda m: m.update(variants=[]),
    "variants[0].id": lambda m: first(m).update(id="a/b"),
    "variants[0].engine": lambda m: first(m).update(engine="pickle"),
    "variants[0].files": lambda m: first(m).update(files=[]),
    "variants[0].entry": lambda m: first(m).update(entry="fp32/model.onnx"),
    "variants[0].placement": lambda m: first(m).update(placement=[]),
    "variants[0].files[0].path": lambda m: first(m)["files"][0].update(path="../x"),
    "variants[0].files[0].size_bytes": lambda m: first(m)["files"][0].update(size_bytes=-1),
    "variants[0].files[0].sha256": lambda m: first(m)["files"][0].update(sha256="AB"),
    "variants[0].requirements.memory_bytes": lambda m: first(m).update(
        requirements={"memory_bytes": -1}
    ),
    "variants[0].latency[0]": lambda m: first(m)["latency"][0].update(p50_ms=-1.0),
    "inputs[0].datatype": lambda m: m["inputs"][0].update(datatype="FP8"),
    "inputs[0].shape": lambda m: m["inputs"][0].update(shape=[-2]),
    "inputs[0].name": lambda m: m["inputs"][0].update(name=""),
    "inputs": lambda m: m.update(inputs=[]),
    "label_output": lambda m: m.update(label_output="z"),
    "embedding_output": lambda m: m.update(embedding_output="z"),
    "context_length_tokens": lambda m: m.update(task="text-generation"),
    "preprocessing.tokenizer": lambda m: m.update(
        preprocessing={"kind": "text", "tokenizer": "t.json", "max_length_tokens": 8}
    ),
    "preprocessing.padding_value": lambda m: m.update(
        preprocessing={
            "kind": "head-tail", "head_bytes": 8, "tail_bytes": 8, "block_bytes": 16,
            "padding_value": 0,
        }
    ),
    "preprocessing.block_bytes": lambda m: m.update(
        preprocessing={
            "kind": "head-tail", "head_bytes": 8, "tail_bytes": 8, "block_bytes": 1 << 40,
            "padding_value": 256,
        }
    ),
}  # fmt: skip


@pytest.mark.parametrize("field", DAMAGES)
def test_every_wrong_field_is_named(bundle: Bundle, field: str):
    change(bundle.path, DAMAGES[field])
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle.path)
    assert f"field {field}:" in str(caught.value)
    assert "manifest.json" in str(caught.value)
    assert caught.value.fix


def test_a_variant_id_used_twice_is_refused(bundle: Bundle):
    change(bundle.path, lambda m: m["variants"][1].update(id=first(m)["id"]))
    with pytest.raises(BundleError, match="more than once"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("path", ["int8/model.onnx", "INT8/Model.onnx"])
def test_a_file_named_twice_is_refused(bundle: Bundle, path: str):
    entry = {"path": path, "size_bytes": 1, "sha256": "0" * 64}
    change(bundle.path, lambda m: m["files"].append(entry))
    with pytest.raises(BundleError, match="a second time"):
        open_bundle(bundle.path)


def test_the_manifest_may_not_list_itself(bundle: Bundle):
    entry = {"path": "manifest.json", "size_bytes": 1, "sha256": "0" * 64}
    change(bundle.path, lambda m: m["files"].append(entry))
    with pytest.raises(BundleError, match="the manifest itself"):
        open_bundle(bundle.path)
