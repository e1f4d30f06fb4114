"""`nearfar bundle diff` and `nearfar bundle extract`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from nearfar.bundle import BundleStore, open_bundle
from nearfar.bundle.commands import app
from nearfar.bundle.diff import differences
from nearfar.bundle.extract import extract_variant
from nearfar.bundle.keys import SigningKey
from nearfar.bundle.manifest import encode_manifest
from nearfar.bundle.sealing import sign_bundle
from nearfar.cli import run
from nearfar.errors import BundleError, ModelNotFound
from tests.support.tiny import write_tiny_tensor_bundle


def nearfar_bundle(*arguments: object) -> int:
    return run(app, [str(argument) for argument in arguments], program="nearfar bundle")


@pytest.fixture
def bundle(tmp_path: Path):
    return write_tiny_tensor_bundle(tmp_path / "a")


def test_a_copy_does_not_differ_wherever_it_lies(bundle, tmp_path: Path, capsys):
    shutil.copytree(bundle.path, tmp_path / "b")
    assert nearfar_bundle("diff", bundle.path, tmp_path / "b") == 0
    assert "no difference" in capsys.readouterr().out


def test_fields_are_named_by_variant_file_and_metric(bundle):
    int8, fp32 = bundle.manifest.variants
    worse = msgspec.structs.replace(int8.quality[0], value=0.5)
    file = msgspec.structs.replace(int8.files[0], sha256="0" * 64)
    changed = msgspec.structs.replace(int8, quality=(worse,), files=(file,))
    other = msgspec.structs.replace(
        bundle.manifest, version="1.1.0", variants=(fp32, changed), labels=("a", "b", "c")
    )
    found = {one.field: (one.before, one.after) for one in differences(bundle.manifest, other)}
    assert found == {
        "labels": ("low, middle, high", "a, b, c"),
        "variants[int8].files[int8/model.onnx].sha256": (int8.files[0].sha256, "0" * 64),
        "variants[int8].quality[top1_agreement fp32].value": (1.0, 0.5),
        "version": ("1.0.0", "1.1.0"),
    }
    only = differences(bundle.manifest, other, files_only=True)
    assert [one.field for one in only] == ["variants[int8].files[int8/model.onnx].sha256"]


def test_a_variant_that_is_gone_is_a_difference(bundle, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    extract_variant(bundle, "fp32", tmp_path / "b")
    assert nearfar_bundle("diff", bundle.path, tmp_path / "b") == 1
    out = capsys.readouterr().out
    assert "variants[int8].files[int8/model.onnx].sha256" in out
    assert "variants[fp32]" not in out
    assert nearfar_bundle("diff", bundle.path, tmp_path / "b", "--json", "--files-only") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["field"].rpartition(".")[2] for line in lines} == {"sha256", "size_bytes"}
    assert all(line["after"] is None for line in lines)


def test_a_manifest_cannot_write_on_the_terminal_through_diff(bundle, tmp_path: Path, capsys):
    shutil.copytree(bundle.path, tmp_path / "b")
    evil = msgspec.structs.replace(bundle.manifest, description="[red]\x1b[2J")
    (tmp_path / "b" / "manifest.json").write_bytes(encode_manifest(evil))
    assert nearfar_bundle("diff", bundle.path, tmp_path / "b") == 1
    out = capsys.readouterr().out
    assert "[red]" in out
    assert "\x1b[2J" not in out


def test_one_variant_is_a_whole_bundle_of_its_own(bundle, tmp_path: Path):
    new = extract_variant(bundle, "int8", tmp_path / "store" / "b")
    new.verify()
    assert [variant.id for variant in new.manifest.variants] == ["int8"]
    assert new.variant("int8") == bundle.variant("int8")
    assert not (new.path / "fp32").exists()
    assert BundleStore(tmp_path / "store").open("tiny").path == new.path


def test_extract_says_that_the_signature_is_gone_and_can_make_a_new_one(
    bundle, tmp_path: Path, capsys
):
    key = SigningKey.generate()
    key.save(tmp_path / "key")
    sign_bundle(bundle.path, key)
    arguments = ("extract", bundle.path, "--variant", "int8", "-o", tmp_path / "b")
    assert nearfar_bundle(*arguments) == 0
    assert "signature was dropped" in capsys.readouterr().err
    assert not (tmp_path / "b" / "signature.json").exists()
    assert nearfar_bundle(*arguments) == 1  # there is a bundle already
    assert nearfar_bundle(*arguments, "--force", "--sign", tmp_path / "key") == 0
    open_bundle(tmp_path / "b", trusted_keys=[key.public]).verify()


def test_what_cannot_be_extracted_leaves_nothing(bundle, tmp_path: Path):
    with pytest.raises(ModelNotFound, match="int4"):
        extract_variant(bundle, "int4", tmp_path / "b")
    with pytest.raises(BundleError, match="extract from"):
        extract_variant(bundle, "int8", bundle.path, replace=True)
    (bundle.path / "int8" / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError):
        extract_variant(bundle, "int8", tmp_path / "b")
    assert not (tmp_path / "b").exists()
