"""Which models are served, and as which variant."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cloud_runtime.models import ServedModels
from nearfar.bundle import BundleStore
from nearfar.bundle.manifest import Requirements, decode_manifest, encode_manifest
from nearfar.errors import BundleError, EngineError, ModelNotFound
from tests.support.tiny import write_tiny_classifier_bundle, write_tiny_tensor_bundle


@pytest.fixture
def root(tmp_path) -> Path:
    write_tiny_tensor_bundle(tmp_path / "tiny")
    write_tiny_classifier_bundle(tmp_path / "tiny-classifier")
    return tmp_path


def needs_what_no_machine_has(bundle: Path) -> None:
    manifest = decode_manifest((bundle / "manifest.json").read_bytes())
    requirements = Requirements(execution_provider="NoSuchExecutionProvider")
    variants = tuple(
        msgspec.structs.replace(variant, requirements=requirements) for variant in manifest.variants
    )
    path = bundle / "manifest.json"
    path.chmod(0o644)
    path.write_bytes(encode_manifest(msgspec.structs.replace(manifest, variants=variants)))


def load(root: Path, **options) -> tuple[ServedModels, list[str]]:
    lines: list[str] = []
    return ServedModels.load(BundleStore(root), progress=lines.append, **options), lines


def test_the_variant_meant_for_the_cloud_is_served(root):
    models, _ = load(root)
    assert models.get("tiny").variant.id == "fp32"
    assert [variant.id for variant in models.get("tiny").manifest.variants] == ["fp32"]
    models.close()


def test_progress_names_model_variant_size_and_provider(root):
    models, lines = load(root, names=("tiny",))
    assert lines[0].startswith("tiny: loading fp32 (")
    assert lines[1].startswith("tiny: fp32 on CPUExecutionProvider, ready after ")
    models.close()


def test_models_that_cannot_run_here_are_left_out_and_said_so(root):
    needs_what_no_machine_has(root / "tiny")
    models, lines = load(root)
    assert models.names == ("tiny-classifier",)
    (line,) = [line for line in lines if line.startswith("tiny: ")]
    assert line.startswith("tiny: left out, because ")
    assert "NoSuchExecutionProvider" in line
    models.close()


def test_a_model_asked_for_by_name_must_run_here(root):
    needs_what_no_machine_has(root / "tiny")
    with pytest.raises(EngineError, match=r"'tiny' cannot be served.*NoSuchExecutionProvider"):
        load(root, names=("tiny",))


def test_a_store_without_a_model_that_runs_here_is_an_error(root):
    needs_what_no_machine_has(root / "tiny")
    needs_what_no_machine_has(root / "tiny-classifier")
    with pytest.raises(ModelNotFound, match="no model to serve"):
        load(root)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelNotFound, match="does not exist"):
        load(tmp_path / "none")


def test_a_damaged_bundle_stops_the_start(root):
    model = root / "tiny" / "fp32" / "model.onnx"
    model.chmod(0o644)
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        load(root)
