"""Finding bundles by name and version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nearfar.bundle import BundleStore
from nearfar.errors import BundleError, ModelNotFound
from tests.support.tiny import write_tiny_tensor_bundle


def test_bundles_are_found_at_three_depths(tmp_path: Path):
    write_tiny_tensor_bundle(tmp_path / "one", "one")
    write_tiny_tensor_bundle(tmp_path / "deep" / "two", "two")
    write_tiny_tensor_bundle(tmp_path / "too" / "deep" / "three", "three")
    write_tiny_tensor_bundle(tmp_path / ".hidden", "hidden")
    assert [m.name for m in BundleStore(tmp_path).models()] == ["one", "two"]
    assert [m.name for m in BundleStore(tmp_path / "one").models()] == ["one"]


def test_the_newest_version_is_taken_unless_one_is_named(tmp_path: Path):
    for version in ("1.9.0", "1.10.0", "1.10.0-rc.1"):
        write_tiny_tensor_bundle(tmp_path / "m" / version, "m", version)
    store = BundleStore(tmp_path)
    assert [m.version for m in store.models()] == ["1.10.0"]
    assert store.open("m").manifest.version == "1.10.0"
    assert store.open("m", "1.9.0").path == tmp_path / "m" / "1.9.0"


def test_an_unknown_model_or_version_lists_what_is_there(tmp_path: Path):
    write_tiny_tensor_bundle(tmp_path / "m", "m", "1.0.0")
    store = BundleStore(tmp_path)
    with pytest.raises(ModelNotFound, match=r"'other'.*holds m 1\.0\.0"):
        store.open("other")
    with pytest.raises(ModelNotFound, match=r"'m' 2\.0\.0.*holds m 1\.0\.0"):
        store.open("m", "2.0.0")


def test_a_store_that_does_not_exist_is_empty_and_says_so(tmp_path: Path):
    store = BundleStore(tmp_path / "nowhere")
    assert store.models() == []
    with pytest.raises(ModelNotFound, match="does not exist"):
        store.open("m")


def test_bundles_that_come_change_and_go_are_noticed(tmp_path: Path):
    store = BundleStore(tmp_path)
    assert store.models() == []
    write_tiny_tensor_bundle(tmp_path / "m", "m", "1.0.0")
    assert store.open("m").manifest.version == "1.0.0"
    write_tiny_tensor_bundle(tmp_path / "m", "m", "1.1.0")
    assert store.open("m").manifest.version == "1.1.0"
    shutil.rmtree(tmp_path / "m")
    assert store.models() == []


def test_a_broken_bundle_hides_no_other_and_is_named_when_asked_for(tmp_path: Path):
    write_tiny_tensor_bundle(tmp_path / "good", "good")
    write_tiny_tensor_bundle(tmp_path / "bad", "bad")
    (tmp_path / "bad" / "manifest.json").write_text("{")
    store = BundleStore(tmp_path)
    assert [m.name for m in store.models()] == ["good"]
    with pytest.raises(BundleError, match=r"bad/manifest\.json is not valid JSON"):
        store.open("bad")
    with pytest.raises(ModelNotFound, match="1 unreadable"):
        store.open("other")


def test_two_different_bundles_of_one_version_are_not_chosen_between(tmp_path: Path):
    write_tiny_tensor_bundle(tmp_path / "a", "m")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    store = BundleStore(tmp_path)
    assert store.open("m").path == tmp_path / "a"  # the same bundle twice is no problem
    file = tmp_path / "b" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"description": "another"}))
    with pytest.raises(BundleError, match="different bundles"):
        store.open("m")
