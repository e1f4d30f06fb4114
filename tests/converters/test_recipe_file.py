"""Recipes: what a conversion did, done again with the same hashes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.commands import convert
from converters.recipe_file import (
    Recipe,
    RecipeBundle,
    RecipeSource,
    RecipeSteps,
    in_short,
    read_recipe,
    to_toml,
)
from converters.settings import Int8Settings, Settings
from converters.steps.verify_tensors import verify_tensors
from nearfar.bundle import open_bundle
from nearfar.cli import run
from nearfar.errors import ConfigError, ConversionError
from tests.support.tiny import HEAD_TAIL, classifier_model, tensor_model

WEIGHTS = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)


def nearfar_convert(*arguments: object) -> int:
    texts = [str(argument) for argument in arguments]
    return run(convert, texts, program="nearfar convert")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(tensor_model(WEIGHTS), tmp_path / "scores.onnx")
    np.savez(tmp_path / "real.npz", x=np.eye(64, dtype=np.float32))
    (tmp_path / "labels.txt").write_text("\n".join('abc"efg\u00e4'))
    return tmp_path / "scores.onnx"


@pytest.fixture
def recipe(model: Path) -> Path:
    """A recipe that a conversion with many options wrote."""
    folder = model.parent
    status = nearfar_convert(
        model, "-o", folder / "first", "--variants", "int8,fp32", "--no-measure",
        "--labels", folder / "labels.txt", "--samples", folder / "real.npz",
        "--name", "digits", "--license", "MIT", "--save-recipe", folder / "digits.toml",
    )  # fmt: skip
    assert status == 0
    return folder / "digits.toml"


def hashes(path: Path) -> dict[str, str]:
    bundle = open_bundle(path)
    bundle.verify()
    entries = [*bundle.manifest.files, *(e for v in bundle.manifest.variants for e in v.files)]
    return {entry.path: entry.sha256 for entry in entries}


def test_a_recipe_gives_the_same_bundle_byte_for_byte(model: Path, recipe: Path, capsys):
    folder = model.parent
    assert nearfar_convert(model, "-o", folder / "second", "--recipe", recipe) == 0
    assert "the files are those that the recipe states" in capsys.readouterr().out
    assert hashes(folder / "first") == hashes(folder / "second") == read_recipe(recipe).files
    # Nothing was measured, so the manifest, with all figures of quality, is the same too.
    manifests = [(folder / name / "manifest.json").read_bytes() for name in ("first", "second")]
    assert manifests[0] == manifests[1]


def test_another_process_gives_the_same_bundle(model: Path, recipe: Path):
    folder = model.parent
    command = [sys.executable, "-m", "converters", model, "-o", folder / "b", "--recipe", recipe]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7"}, capture_output=True)
    assert hashes(folder / "b") == hashes(folder / "first")


def test_a_recipe_of_a_recipe_is_the_same_recipe(model: Path, recipe: Path):
    folder = model.parent
    arguments = ("-o", folder / "b", "--recipe", recipe, "--save-recipe", folder / "again.toml")
    assert nearfar_convert(model, *arguments) == 0
    assert (folder / "again.toml").read_text() == recipe.read_text()


def test_the_recipe_says_everything_and_no_local_path(recipe: Path):
    found = read_recipe(recipe)
    assert found.source.kind == "onnx"
    assert (found.bundle.name, found.bundle.license) == ("digits", "MIT")
    assert found.bundle.task == "classification"
    assert found.convert.variants == ("fp32", "int8")
    assert found.convert.labels == tuple('abc"efg\u00e4')
    assert found.convert.samples == "real.npz"
    assert found.settings == Settings()
    assert {"onnx", "onnxruntime", "onnxslim", "nearfar"} <= found.versions.keys()
    assert str(recipe.parent) not in recipe.read_text()


def test_options_beside_a_recipe_win(model: Path, recipe: Path, capsys):
    folder = model.parent
    arguments = ("--recipe", recipe, "--variants", "fp32", "--name", "other")
    assert nearfar_convert(model, "-o", folder / "b", *arguments) == 0
    manifest = open_bundle(folder / "b").manifest
    assert manifest.name == "other"
    assert [variant.id for variant in manifest.variants] == ["fp32"]
    assert manifest.license == "MIT"
    assert "other files than the recipe states: int8/model.onnx" in capsys.readouterr().out


def test_a_setting_changed_in_the_recipe_changes_what_comes_out(model: Path, recipe: Path, capsys):
    recipe.write_text(recipe.read_text().replace("block_size = 128", "block_size = 32"))
    assert nearfar_convert(model, "-o", model.parent / "b", "--recipe", recipe) == 0
    assert "other files than the recipe states: int8/model.onnx" in capsys.readouterr().out
    graph = onnx.load(model.parent / "b" / "int8" / "model.onnx").graph
    sizes = [a.i for node in graph.node for a in node.attribute if a.name == "block_size"]
    assert sizes == [32]


@pytest.mark.parametrize(("gate", "is_held"), [(0.8, False), (0.0, True)])
def test_the_gate_that_is_stated_is_the_one_that_counts(model: Path, gate: float, is_held: bool):
    onnx.save(tensor_model(-WEIGHTS), model.parent / "wrong.onnx")
    feeds = [{"x": row[None, :]} for row in np.eye(64, dtype=np.float32)]
    with nullcontext() if is_held else pytest.raises(ConversionError, match="source's answer"):
        verify_tensors(
            model, {"int8": model.parent / "wrong.onnx"}, feeds,
            source_name="s", label_output="y", min_top1_agreement=gate,
        )  # fmt: skip


def test_another_source_and_other_versions_are_told(model: Path, recipe: Path, capsys):
    onnx.save(tensor_model(WEIGHTS * 2), model)
    recipe.write_text(re.sub(r'onnxslim = ".*"', 'onnxslim = "0.0.1"', recipe.read_text()))
    assert nearfar_convert(model, "-o", model.parent / "b", "--recipe", recipe) == 0
    out = capsys.readouterr().out
    assert "another source than the recipe's" in out
    assert "the recipe's was 0.0.1" in out


def test_other_samples_than_the_recipes_are_refused(model: Path, recipe: Path, capsys):
    np.savez(model.parent / "real.npz", x=np.zeros((2, 64), np.float32))
    assert nearfar_convert(model, "-o", model.parent / "b", "--recipe", recipe) == 1
    assert "other samples" in capsys.readouterr().err.replace("\n", " ")
    assert not (model.parent / "b").exists()


def test_preprocessing_is_written_into_the_recipe(tmp_path: Path):
    onnx.save(classifier_model(), tmp_path / "bytes.onnx")
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(HEAD_TAIL))
    first = ("-o", tmp_path / "a", "--preprocessing", tmp_path / "p.json", "--no-measure")
    toml = tmp_path / "r.toml"
    assert nearfar_convert(tmp_path / "bytes.onnx", *first, "--save-recipe", toml) == 0
    (tmp_path / "p.json").unlink()
    assert json.loads(read_recipe(toml).convert.preprocessing)["kind"] == "head-tail"
    assert nearfar_convert(tmp_path / "bytes.onnx", "-o", tmp_path / "b", "--recipe", toml) == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("format = 1", "format = 2", "format"),
        ('kind = "onnx"', 'kind = "tensorflow"', "source.kind"),
        ("block_size = 128", "block_size = 100", "settings.int8.block_size"),
        ("min_top1_agreement = 0.8", "min_top1_agreement = 1.8", "min_top1_agreement"),
        ("measure = false", "mesure = false", "mesure"),
        ("format = 1", "format = ", "not TOML"),
    ],
)
def test_mistakes_in_a_recipe_are_named(recipe: Path, before: str, after: str, says: str):
    text = recipe.read_text()
    assert before in text
    recipe.write_text(text.replace(before, after))
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_recipe(recipe)


def test_a_recipe_for_another_kind_of_source_is_refused(model: Path, recipe: Path, capsys):
    recipe.write_text(recipe.read_text().replace('kind = "onnx"', 'kind = "gguf"'))
    assert nearfar_convert(model, "-o", model.parent / "b", "--recipe", recipe) == 1
    assert "kind gguf" in capsys.readouterr().err
    assert not (model.parent / "b").exists()


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@given(TEXT, TEXT, st.lists(TEXT, max_size=12), st.dictionaries(TEXT, TEXT, max_size=4))
def test_any_text_survives_the_file(tmp_path_factory, name, description, labels, versions):
    path = tmp_path_factory.mktemp("r") / "r.toml"
    recipe = Recipe(
        source=RecipeSource(kind="onnx", name=name),
        bundle=RecipeBundle(name="x", description=description),
        convert=RecipeSteps(labels=tuple(labels)),
        settings=Settings(int8=Int8Settings(block_size=32)),
        versions=versions,
    )
    path.write_bytes(to_toml(recipe).encode())
    assert read_recipe(path) == recipe


def test_a_dry_run_shows_the_plan_and_makes_nothing(model: Path, capsys):
    before = sorted(model.parent.iterdir())
    assert nearfar_convert(model, "--variants", "fp32,int8", "--dry-run") == 0
    out = capsys.readouterr().out
    for expected in ("scores.onnx: fp32, int8", "quantize to INT8", "measure int8", "together"):
        assert expected in out
    assert sorted(model.parent.iterdir()) == before
    assert nearfar_convert(model, "--variants", "int2", "--dry-run") == 1


def test_without_an_output_nothing_is_converted(model: Path, capsys):
    assert nearfar_convert(model) == 2
    assert "-o FOLDER" in capsys.readouterr().err


def test_what_was_done_is_said_in_a_line():
    settings = Settings(seed=7, int8=Int8Settings(keep=("Conv_1",)))
    said = in_short(settings, ("fp32", "int8"))
    assert said == 'variants = ["fp32", "int8"], seed = 7, int8.keep = ["Conv_1"]'
    assert in_short(Settings(), ("fp32",)) == 'variants = ["fp32"]'
