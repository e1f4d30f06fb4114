"""Writing bundles: whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from nearfar.bundle import BundleWriter, open_bundle
from nearfar.bundle.manifest import Manifest, TensorSpec, Variant, decode_manifest, encode_manifest
from nearfar.errors import BundleError
from tests.support.tiny import write_tiny_tensor_bundle

MANIFEST = Manifest(
    name="m",
    version="1.0.0",
    task="tensor",
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1,)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1,)),),
    variants=(
        Variant(id="v", engine="onnxruntime", precision="fp32", entry="v/model.onnx", files=()),
    ),
)


def write(path: Path, content: bytes = b"model", *, replace: bool = True) -> None:
    with BundleWriter(path, replace=replace) as writer:
        writer.file("v/model.onnx").write_bytes(content)
        writer.file("notes.txt").write_text("shared")
        writer.finish(MANIFEST)


def test_files_are_assigned_hashed_and_sorted(tmp_path: Path):
    write(tmp_path / "m")
    bundle = open_bundle(tmp_path / "m")
    bundle.verify()
    assert [entry.path for entry in bundle.manifest.files] == ["notes.txt"]
    assert [entry.path for entry in bundle.manifest.variants[0].files] == ["v/model.onnx"]
    assert os.listdir(tmp_path) == ["m"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    one, other = (tmp_path / name / "manifest.json" for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_a_manifest_survives_the_round_trip(tmp_path: Path):
    manifest = write_tiny_tensor_bundle(tmp_path / "t").manifest
    assert decode_manifest(encode_manifest(manifest)) == manifest


def write_half(path: Path, error: type[BaseException]) -> None:
    with BundleWriter(path) as writer:
        writer.file("v/model.onnx").write_bytes(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_or_ctrl_c_leaves_nothing_behind(tmp_path: Path, error):
    with pytest.raises(error):
        write_half(tmp_path / "m", error)
    assert os.listdir(tmp_path) == []


def test_leaving_without_finish_leaves_nothing_behind(tmp_path: Path):
    with BundleWriter(tmp_path / "m") as writer:
        writer.file("v/model.onnx").write_bytes(b"half")
    assert os.listdir(tmp_path) == []


def test_an_error_while_replacing_keeps_the_old_bundle(tmp_path: Path):
    write(tmp_path / "m", b"old")
    with pytest.raises(ValueError):
        write_half(tmp_path / "m", ValueError)
    open_bundle(tmp_path / "m").verify()
    assert (tmp_path / "m" / "v" / "model.onnx").read_bytes() == b"old"


@pytest.mark.parametrize("has_exchange", [True, False])
def test_a_bundle_is_replaced_as_a_whole(tmp_path: Path, monkeypatch, has_exchange: bool):
    if not has_exchange:
        monkeypatch.setattr("nearfar.bundle.writer._exchange", lambda one, other: False)
    write(tmp_path / "m", b"old")
    write(tmp_path / "m", b"new")
    open_bundle(tmp_path / "m").verify()
    assert (tmp_path / "m" / "v" / "model.onnx").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["m"]


def test_a_reader_never_sees_half_a_bundle(tmp_path: Path):
    write(tmp_path / "m")
    code = (
        "import sys; from pathlib import Path; from tests.nearfar.bundle.test_writer import write\n"
        "for i in range(100): write(Path(sys.argv[1]), b'%06d' % i)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "m")])
    seen = set()
    try:
        while process.poll() is None:
            seen.add((tmp_path / "m" / "v" / "model.onnx").read_bytes())  # there at every moment
    finally:
        process.kill()
        process.wait()
    assert len(seen) > 2


def test_no_permission_to_replace_is_respected(tmp_path: Path):
    write(tmp_path / "m", b"old")
    with pytest.raises(BundleError, match="There is a bundle"):
        write(tmp_path / "m", b"new", replace=False)


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(BundleError, match="not a bundle"):
        write(tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"meow"


def test_a_file_in_the_place_of_the_bundle_is_refused(tmp_path: Path):
    (tmp_path / "m").write_text("a file")
    with pytest.raises(BundleError, match="not a folder"):
        write(tmp_path / "m")


def test_an_empty_folder_is_filled(tmp_path: Path):
    (tmp_path / "m").mkdir()
    write(tmp_path / "m", replace=False)
    open_bundle(tmp_path / "m").verify()


@pytest.mark.parametrize("path", ["../x", "/x", "manifest.json", "a/../../b"])
def test_the_writer_itself_is_confined(tmp_path: Path, path: str):
    with BundleWriter(tmp_path / "m") as writer, pytest.raises(BundleError):
        writer.file(path)


def test_a_link_does_not_get_into_a_bundle(tmp_path: Path):
    with BundleWriter(tmp_path / "m") as writer:
        writer.file("v/model.onnx").symlink_to("/etc/hostname")
        with pytest.raises(BundleError, match=r"v/model\.onnx.*not a regular file"):
            writer.finish(MANIFEST)


def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path):
    with BundleWriter(tmp_path / "m") as writer:
        writer.file("other/model.onnx").write_bytes(b"")
        with pytest.raises(BundleError, match=r"variants\[0\]\.files"):
            writer.finish(MANIFEST)
        with pytest.raises(BundleError, match="name"):
            writer.finish(msgspec.structs.replace(MANIFEST, name="No Good"))
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_one_is_not(tmp_path: Path):
    code = (
        "import sys, time; from nearfar.bundle import BundleWriter\n"
        "with BundleWriter(sys.argv[1]) as w: print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "m")], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    (left,) = tmp_path.iterdir()
    long_ago = time.time() - 3600
    os.utime(left, (long_ago, long_ago))
    write(tmp_path / "m")
    assert left.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.utime(left, (long_ago, long_ago))
    write(tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]
