"""Paths of a manifest never lead out of the bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nearfar.bundle.paths import confined_file, path_problem, walk_files
from nearfar.errors import BundleError

#: Parts that attacks are made of, and ordinary ones.
PARTS = st.sampled_from(
    ["..", ".", "", "a", "b.onnx", "..a", "...", "c:", "C:", "\\", "..\\..", "\0", "é", "x" * 256]
)
PATHS = st.one_of(st.text(max_size=40), st.lists(PARTS, max_size=6).map("/".join))


@given(PATHS)
@settings(max_examples=500)
def test_an_accepted_path_stays_inside_on_any_reading(path: str):
    if path_problem(path) is not None:
        return
    root = Path("/bundle")
    joined = root.joinpath(*path.split("/"))
    assert joined.is_relative_to(root)
    assert joined != root
    assert ".." not in joined.parts
    assert str(Path(path)) == path  # nothing to normalise: one file has one name


@given(path=PATHS)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_path_gives_a_file_inside_or_a_bundle_error(tmp_path: Path, path: str):
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "a" / "b.onnx").write_bytes(b"")
    try:
        found = confined_file(tmp_path, path)
    except BundleError:
        return
    assert found.resolve().is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "empty"),
        ("/etc/passwd", "absolute"),
        ("a/../../b", "'..'"),
        ("..", "'..'"),
        ("./a", "'.'"),
        ("a//b", "empty part"),
        ("a/", "empty part"),
        ("a\\b", "backslash"),
        ("C:/x", "drive"),
        ("a\nb", "control"),
        ("a\0b", "control"),
        ("\ud800", "Unicode"),
        ("x" * 300, "long"),
        ("/".join(["abcdefgh"] * 200), "long"),
    ],
)
def test_each_way_out_is_named(path: str, problem: str):
    assert problem in (path_problem(path) or "")


@pytest.mark.parametrize("path", ["a", "a/b.onnx", "..a", "a..b/…", "model v2.onnx"])
def test_ordinary_names_are_accepted(path: str):
    assert path_problem(path) is None


def test_walking_lists_links_and_follows_none(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list(walk_files(tmp_path)) == ["b/x", "loop"]
