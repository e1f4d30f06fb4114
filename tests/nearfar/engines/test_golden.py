"""Golden inputs: a machine that computes something else is noticed."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

from nearfar.bundle import Bundle
from nearfar.bundle.commands import app
from nearfar.bundle.manifest import (
    Golden,
    Manifest,
    TensorSpec,
    Variant,
)
from nearfar.bundle.writer import BundleWriter
from nearfar.cli import run
from nearfar.engines.golden import (
    INPUTS,
    OUTPUTS,
    check_golden,
    relative_error,
    run_cases,
    to_npz,
)
from nearfar.errors import BundleError
from tests.support.tiny import tensor_model

WEIGHTS = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32) / 8
CASES = [{"x": np.random.default_rng(n).standard_normal((1, 64), np.float32)} for n in range(3)]


def write(
    path: Path, *, outputs: bytes | None = None, weights: np.ndarray = WEIGHTS, **golden: object
) -> Bundle:
    """A bundle whose golden outputs are those of `WEIGHTS`, whatever the model's weights are."""
    session = InferenceSession(tensor_model(WEIGHTS).SerializeToString())
    expected = [{"y": session.run(["y"], case)[0]} for case in CASES]
    with BundleWriter(path) as writer:
        onnx.save(tensor_model(weights), writer.file("fp32/model.onnx"))
        writer.file(INPUTS).write_bytes(to_npz(CASES))
        writer.file(OUTPUTS).write_bytes(outputs or to_npz(expected))
        stated = {"inputs": INPUTS, "outputs": OUTPUTS, "reference": "fp32",
                  "relative_error": {"fp32": 0.0}, **golden}  # fmt: skip
        return writer.finish(
            Manifest(
                name="m", version="1.0.0", task="tensor", golden=Golden(**stated),
                inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 64)),),
                outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 8)),),
                variants=(Variant(id="fp32", engine="onnxruntime", precision="fp32",
                                  entry="fp32/model.onnx", files=()),),
            )
        )  # fmt: skip


def test_a_machine_that_computes_the_same_is_good(tmp_path: Path, capsys):
    bundle = write(tmp_path / "b")
    result = check_golden(bundle, "fp32")
    assert result.is_good
    assert result.difference < 1e-5
    assert run(app, ["verify", str(bundle.path)], program="nearfar bundle") == 0
    assert "golden inputs: fp32 good: 3 cases" in capsys.readouterr().out


def test_a_machine_that_computes_something_else_is_named(tmp_path: Path, capsys):
    bundle = write(tmp_path / "b", weights=WEIGHTS * np.float32(1.5))
    assert not check_golden(bundle, "fp32").is_good
    assert run(app, ["verify", str(bundle.path)], program="nearfar bundle") == 1
    text = capsys.readouterr()
    assert "WRONG" in text.out
    assert "saturate" in text.err
    assert run(app, ["verify", "--no-golden", str(bundle.path)], program="nearfar bundle") == 0


def test_a_variant_that_was_off_at_home_may_be_off_here(tmp_path: Path):
    bundle = write(tmp_path / "b", weights=WEIGHTS * np.float32(1.5), relative_error={"fp32": 0.19})
    assert check_golden(bundle, "fp32").is_good


def compressed() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **{f"{n}/y": np.zeros((1, 8), np.float32) for n in range(3)})
    return stream.getvalue()


def pickled() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        inner = io.BytesIO()
        np.save(inner, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        archive.writestr("0/y.npy", inner.getvalue())
    return stream.getvalue()


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        (b"PK not a zip", "golden data"),
        (compressed(), "it is compressed"),
        (pickled(), "golden data"),
        (to_npz([{"y": np.zeros((1, 8), np.float32)}]), "1 cases for 3 inputs"),
    ],
)
def test_golden_files_are_read_with_care(tmp_path: Path, outputs: bytes, why: str):
    with pytest.raises(BundleError, match=why):
        check_golden(write(tmp_path / "b", outputs=outputs), "fp32")


def test_golden_files_must_be_listed(tmp_path: Path):
    with pytest.raises(BundleError, match="golden"):
        write(tmp_path / "b", inputs="golden/elsewhere.npz")


def test_a_bundle_without_golden_data_says_so(tmp_path: Path):
    bundle = write(tmp_path / "b")
    bare = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, golden=None))
    with pytest.raises(BundleError, match="no golden inputs"):
        check_golden(bare, "fp32")


def test_differences_are_shares_of_what_is_expected(tmp_path: Path):
    one = [{"y": np.array([3.0, 4.0], np.float32)}]
    assert relative_error(one, one) == 0.0
    assert relative_error([{"y": one[0]["y"] * 1.1}], one) == pytest.approx(0.1, rel=1e-3)
    assert relative_error([{"y": np.array([np.nan, 1.0], np.float32)}], one) > 1e100
    assert run_cases(write(tmp_path / "b"), "fp32", CASES)[0]["y"].shape == (1, 8)
