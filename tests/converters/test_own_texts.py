"""Texts of one's own: read line by line or as JSONL, split, and used in place of the usual ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converters import texts
from converters.options import ConversionOptions
from converters.own_texts import OwnText, calibration_texts, judged_texts, read_texts
from converters.pipeline import convert_model
from converters.recipe_file import options_of, read_recipe
from converters.settings import Int8Settings, Settings
from nearfar.errors import ConversionError

LABELS = ("no", "yes")


def test_lines_and_json_lines_are_texts(tmp_path: Path):
    plain = tmp_path / "a.txt"
    plain.write_text("one\n\n  two\u2028still two \n", encoding="utf-8")
    assert read_texts(plain) == [OwnText("one"), OwnText("two\u2028still two")]
    stored = tmp_path / "a.jsonl"
    rows = ["one", {"text": "two", "label": "yes"}, {"text": "three", "label": 0}]
    stored.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert read_texts(stored, LABELS) == [OwnText("one"), OwnText("two", 1), OwnText("three", 0)]
    assert read_texts(stored)[1] == OwnText("two")  # encoders have no labels


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ('{"txt": "a"}', "line 2 has no text"),
        ("7", "line 2 has no text"),
        ('{"text": "a", "label": "maybe"}', "line 2 has a label that the model does not know"),
        ('{"text": "a", "label": 2}', "line 2 has a label"),
        ('{"text": "a", "label": true}', "line 2 has a label"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "a.jsonl"
    path.write_text(f'"fine"\n{line}\n', encoding="utf-8")
    with pytest.raises(ConversionError, match=message):
        read_texts(path, LABELS)


def test_files_without_texts_are_refused(tmp_path: Path):
    path = tmp_path / "a.txt"
    with pytest.raises(ConversionError, match="cannot be read as texts"):
        read_texts(path)
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(ConversionError, match="cannot be read as texts"):
        read_texts(path)
    path.write_text(" \n\n")
    with pytest.raises(ConversionError, match="holds no text"):
        read_texts(path)
    path.write_text("same\n" * 100)
    with pytest.raises(ConversionError, match="1 different texts, and at least 48"):
        judged_texts(path, 128)


def test_what_is_calibrated_with_is_not_judged_on(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"text {number}" for number in range(100)))
    judged, calibrated = judged_texts(path, 32), calibration_texts(path, 1000)
    assert (len(judged), len(calibrated)) == (75, 25)
    assert not set(judged) & set(calibrated)
    assert calibration_texts(path, 8) == calibrated[:8]
    assert judged_texts(None, 40) == texts.passages(40)


def test_an_encoder_is_calibrated_and_judged_on_them(tiny_bert: Path, tmp_path: Path):
    own = tmp_path / "own.txt"
    own.write_text("\n".join(f"what is number {number}?" for number in range(60)))
    settings = Settings(passages=64, int8=Int8Settings(method="static"))
    options = ConversionOptions(
        name="own", measure=False, samples=own, settings=settings, golden=True
    )
    recipe = tmp_path / "recipe.toml"
    bundle = convert_model(tiny_bert, tmp_path / "bundle", options, save_recipe=recipe)
    for variant in bundle.manifest.variants:
        assert {figure.samples for figure in variant.quality} == {45}
    whole = b"".join(file.read_bytes() for file in bundle.path.rglob("*") if file.is_file())
    assert b"what is number" not in whole  # nothing of the texts is carried along
    assert options_of(read_recipe(recipe), recipe).samples == own
    own.write_text("changed\n")
    with pytest.raises(ConversionError, match="other samples"):
        options_of(read_recipe(recipe), recipe)
