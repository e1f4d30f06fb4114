"""A bundle as one file: the same bytes each time, and no way out of its folder."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nearfar.bundle import open_bundle
from nearfar.bundle.archive import default_cache, open_archive, pack, unpack
from nearfar.bundle.commands import app
from nearfar.bundle.keys import SigningKey
from nearfar.bundle.sealing import sign_bundle
from nearfar.cli import run
from nearfar.errors import BundleError, SecurityError
from tests.support.tiny import write_tiny_tensor_bundle


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture
def folder(tmp_path: Path, key: SigningKey) -> Path:
    bundle = write_tiny_tensor_bundle(tmp_path / "m", "m")
    (bundle.path / "README.md").write_text("about")
    return sign_bundle(bundle.path, key).path


@pytest.fixture
def packed(folder: Path) -> Path:
    return pack(open_bundle(folder), folder.parent / "m.nfb")


def tree(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, contents: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)


def test_what_is_unpacked_is_what_was_packed(packed: Path, folder: Path, tmp_path: Path, key):
    new = unpack(packed, tmp_path / "new", trusted_keys=[key.public])
    assert tree(new.path) == tree(folder)
    new.verify()


def test_the_same_bundle_gives_the_same_bytes(packed: Path, tmp_path: Path):
    new = unpack(packed, tmp_path / "new")
    assert pack(new, tmp_path / "again.nfb").read_bytes() == packed.read_bytes()
    names = list(members(packed))
    assert names[:2] == ["manifest.json", "signature.json"]
    assert names[2:] == sorted(names[2:])


def test_a_file_opens_like_a_folder_and_is_unpacked_once(packed: Path, cache: Path, key):
    opened = open_bundle(packed, trusted_keys=[key.public])
    opened.verify()
    assert opened.path.parent == default_cache()
    assert opened.path.is_relative_to(cache)
    inode = (opened.path / "manifest.json").stat().st_ino
    assert (open_bundle(packed).path / "manifest.json").stat().st_ino == inode
    with pytest.raises(SecurityError):
        open_bundle(packed, trusted_keys=[SigningKey.generate().public])


def test_an_unsigned_archive_is_refused_before_its_manifest_is_parsed(
    packed: Path, tmp_path: Path, key, monkeypatch
):
    contents = members(packed)
    del contents["signature.json"]
    rewrite(packed, contents)
    monkeypatch.setattr("nearfar.bundle.bundle._parse", lambda *_: pytest.fail("parsed"))
    with pytest.raises(SecurityError, match="is not signed"):
        unpack(packed, tmp_path / "new", trusted_keys=[key.public])
    assert not (tmp_path / "new").exists()


def _with(name: str, data: bytes = b"x") -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda contents: {**contents, name: data}


@pytest.mark.parametrize(
    "change",
    [
        _with("../evil"),
        _with("/evil"),
        _with("fp32/../../evil"),
        _with("C:evil"),
        _with("fp32/more.onnx"),
        _with("INT8/model.onnx"),
        _with("empty/", b""),
        _with("fp32/model.onnx", b"short"),
        lambda contents: {k: v for k, v in contents.items() if k != "fp32/model.onnx"},
        lambda contents: {k: v for k, v in contents.items() if k != "manifest.json"},
        lambda contents: {**contents, "int8/model.onnx": contents["int8/model.onnx"][::-1]},
        _with("manifest.json", b"{}"),
        _with("manifest.json", b" " * ((4 << 20) + 1)),
    ],
)
def test_what_does_not_belong_there_is_refused_and_leaves_nothing(
    packed: Path, tmp_path: Path, cache: Path, change
):
    rewrite(packed, change(members(packed)))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(BundleError):
        unpack(packed, tmp_path / "new")
    with pytest.raises(BundleError):
        open_bundle(packed)
    assert sorted(p.name for p in tmp_path.iterdir() if p != cache) == before
    assert list(default_cache().iterdir()) == []


def test_a_compressed_member_is_refused(packed: Path, tmp_path: Path):
    contents = members(packed)
    rewrite(packed, {**contents, "README.md": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(BundleError, match="is compressed"):
        unpack(packed, tmp_path / "new")


def test_a_link_is_refused(packed: Path, tmp_path: Path):
    contents = members(packed)
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in contents.items():
            info = zipfile.ZipInfo(name)
            if name == "README.md":
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, data)
    with pytest.raises(BundleError, match="not a regular file"):
        unpack(packed, tmp_path / "new")


def test_members_that_overlap_are_refused(packed: Path, tmp_path: Path, monkeypatch):
    real = zipfile.ZipFile.infolist

    def overlapping(self: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
        found = real(self)
        for info in found:
            info.file_size = info.compress_size = packed.stat().st_size // 2
        return found

    monkeypatch.setattr(zipfile.ZipFile, "infolist", overlapping)
    with pytest.raises(BundleError, match="more than it can hold"):
        unpack(packed, tmp_path / "new")


def test_every_cut_and_every_flipped_byte_is_noticed(packed: Path, tmp_path: Path, folder: Path):
    data = packed.read_bytes()
    for position in range(0, len(data), 97):
        packed.write_bytes(data[:position])
        with pytest.raises(BundleError):
            unpack(packed, tmp_path / "new")
        packed.write_bytes(data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :])
        try:
            new = unpack(packed, tmp_path / f"flipped{position}")
        except BundleError:
            continue
        # A date or a comment: what counts is as it was.
        assert tree(new.path) == tree(folder)


def test_targets_that_are_taken_are_left_alone(packed: Path, folder: Path, tmp_path: Path):
    with pytest.raises(BundleError, match="exists already"):
        pack(open_bundle(folder), packed)
    with pytest.raises(BundleError, match="already"):
        unpack(packed, folder)


def test_the_commands_pack_unpack_and_refuse_to_sign_a_file(folder: Path, tmp_path: Path, capsys):
    target, new = tmp_path / "x.nfb", tmp_path / "new"

    def call(*arguments: object) -> int:
        return run(app, [str(a) for a in arguments], program="nearfar bundle")

    assert call("pack", folder, "-o", target) == 0
    assert call("unpack", target, "-o", new) == 0
    assert call("diff", target, new) == 0
    assert call("verify", target) == 0
    key = tmp_path / "key"
    SigningKey.generate().save(key)
    assert call("unpack", target, "-o", tmp_path / "other", "--key", f"{key}.pub") == 1
    with pytest.raises(BundleError, match="is an archive"):
        sign_bundle(target, SigningKey.load(key))
    assert open_archive(target, cache=tmp_path / "c").path.parent == tmp_path / "c"
