"""Classifiers of texts, images and sounds from Hugging Face folders answer as transformers does."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from converters import texts
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.plan import plan
from converters.report.contents import report_in
from converters.search.search import search_model
from converters.settings import Settings, SlimSettings
from converters.sources.classifier import labels_of
from converters.sources.detect import open_source
from converters.sources.huggingface import load_huggingface, open_huggingface
from converters.steps.classifier_module import classifier_module
from converters.steps.processors import read_image
from converters.steps.raw_samples import made_up
from nearfar.bundle import Bundle
from nearfar.engines.model import LoadedModel
from nearfar.errors import ConfigError, ConversionError, InvalidInput
from sdk import Client
from tests.support import tiny_models

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Write = Callable[[Path], Path]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_tiny_text_classifier(tmp_path_factory.mktemp("hf") / "mood")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_tiny_image_classifier(tmp_path_factory.mktemp("hf") / "animal")


@pytest.fixture(scope="module")
def audio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_tiny_audio_classifier(tmp_path_factory.mktemp("hf") / "word")


def converted(folder: Path, **options: object) -> Bundle:
    chosen = ConversionOptions(name=folder.name, measure=False, **options)  # type: ignore[arg-type]
    return convert_model(folder, folder.parent / "store" / folder.name, chosen)


def check(bundle: Bundle, data: str | bytes, wanted: list[dict[str, object]]) -> None:
    """Full precision, and what the device answers, against a pipeline of transformers."""
    manifest = bundle.manifest
    told = {str(one["label"]): float(one["score"]) for one in wanted}  # type: ignore[arg-type]
    model = LoadedModel(bundle, "fp32")
    outputs = model.infer_raw("text" if isinstance(data, str) else "bytes", [data])
    model.close()
    exact = dict(zip(manifest.labels, outputs["scores"][0].tolist(), strict=True))
    assert exact == pytest.approx(told, abs=1e-4)
    with Client(models=bundle.path.parent) as client:
        result = client.classify(manifest.name, data, top_k=10)
    assert result.variant == "int8"
    assert result.label == max(told, key=told.__getitem__)
    assert dict(result.top) == pytest.approx(told, abs=0.1)


def test_texts_get_the_labels_that_transformers_gives_them(text_folder: Path, tmp_path: Path):
    planned = plan(open_source(text_folder), ConversionOptions())
    samples = tmp_path / "samples.jsonl"
    rows = [{"text": text, "label": "glad"} for text in texts.passages(40)]
    samples.write_text("\n".join(map(json.dumps, rows)))
    bundle = converted(text_folder, samples=samples)
    manifest = bundle.manifest
    assert [one.id for one in manifest.variants] == list(planned.variants) == ["fp32", "int8"]
    assert (manifest.task, manifest.labels) == ("classification", ("calm", "glad", "sad"))
    assert (manifest.label_output, manifest.multi_label) == ("scores", False)
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert {one.name: one.shape for one in manifest.inputs} == dict.fromkeys(names, (-1, -1))
    assert {one.name: one.shape for one in manifest.outputs} == {
        "scores": (-1, 3), "logits": (-1, 3),
    }  # fmt: skip
    assert manifest.golden is not None
    values = {one.metric: one.value for one in bundle.variant("int8").quality}
    assert values["top1_agreement"] >= 0.9
    assert 0 < values["accuracy"] < 1  # some are glad, and all are said to be
    ask = transformers.pipeline("text-classification", str(text_folder), top_k=None)
    given = [*texts.passages(40)[::4], "near"]
    answers = ask(given, truncation=True, max_length=130)
    assert len({row[0]["label"] for row in answers}) > 1  # the comparison can fail
    for text, wanted in zip(given, answers, strict=True):
        check(bundle, text, wanted)
    with Client(models=bundle.path.parent) as client, pytest.raises(InvalidInput, match="text"):
        client.classify("mood", b"bytes")


def test_images_get_the_labels_that_transformers_gives_them(image_folder: Path):
    from PIL import Image

    bundle = converted(image_folder)
    spec = bundle.manifest.preprocessing
    assert (spec.resize, spec.crop, spec.resample) == ((40,), (32, 32), "bicubic")
    assert bundle.manifest.labels == ("cat", "dog", "elk", "fox")
    assert [one.id for one in bundle.manifest.variants] == ["fp32", "int8"]
    ask = transformers.pipeline("image-classification", str(image_folder), top_k=4)
    told = set()
    for data in made_up(spec, 99, 4):
        with Image.open(io.BytesIO(data)) as image:
            wanted = ask(image)
        check(bundle, data, wanted)
        told.add(wanted[0]["label"])
    assert len(told) > 1  # the comparison can fail
    with Client(models=bundle.path.parent) as client, pytest.raises(InvalidInput, match="no image"):
        client.classify("animal", b"no image")


def test_sounds_get_the_labels_that_transformers_gives_them(audio_folder: Path, tmp_path: Path):
    samples = tmp_path / "heard"
    for number, label in enumerate(("no", "yes") * 4):
        (samples / label).mkdir(parents=True, exist_ok=True)
        (samples / label / f"{number}.wav").write_bytes(_wav(4000 + 100 * number, number))
    bundle = converted(audio_folder, samples=samples, variants=("fp32", "int8", "trt-bf16"))
    spec = bundle.manifest.preprocessing
    assert (spec.sample_rate_hz, spec.normalize, spec.min_samples) == (8000, True, 105)
    (sizes,) = bundle.variant("trt-bf16").tensorrt.profile
    # From the shortest sound to four times the first; TensorRT must have kernels for all of them.
    assert (sizes.smallest, sizes.usual, sizes.largest) == ((1, 105), (4, 4000), (16, 16000))
    figures = {one.metric: one for one in bundle.variant("int8").quality}
    assert figures["accuracy"].samples == 8  # the folders' names are labels
    ask = transformers.pipeline("audio-classification", str(audio_folder), top_k=2)
    for seed in range(3):
        data = _wav(8000, seed)
        with wave.open(io.BytesIO(data)) as file:
            heard = np.frombuffer(file.readframes(8000), "<i2") / np.float32(32768)
        check(bundle, data, ask({"raw": heard, "sampling_rate": 8000}))
    with Client(models=bundle.path.parent) as client, pytest.raises(InvalidInput, match="105"):
        client.classify("word", _wav(104, 0))


def _wav(count: int, seed: int) -> bytes:
    generator = np.random.default_rng(seed)
    sound = np.sin(np.arange(count) * generator.uniform(0.05, 1)) + generator.normal(0, 0.2, count)
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((sound * 8000).astype("<i2").tobytes())
    return stream.getvalue()


def test_several_classes_may_be_true_where_the_model_was_trained_so(tmp_path: Path):
    import torch

    folder = tiny_models.write_tiny_text_classifier(
        tmp_path / "m", problem_type="multi_label_classification", type_vocab_size=1
    )
    model = load_huggingface(open_huggingface(folder))
    module = classifier_module(model, open_huggingface(folder).config)
    assert module.input_names == ("input_ids", "attention_mask")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        found = module(ids, torch.ones_like(ids))
        wanted = model(input_ids=ids).logits.sigmoid()
    torch.testing.assert_close(found["scores"], wanted)


def test_a_search_knows_what_a_classifier_is_judged_by(tmp_path: Path):
    """Layers that share weights, texts with several classes, variants made of a bundle."""
    folder = tiny_models.write_tiny_text_classifier(
        tmp_path / "themes", kind="Albert", embedding_size=32, num_hidden_layers=2,
        problem_type="multi_label_classification",
    )  # fmt: skip
    options = ConversionOptions(measure=False, variants=("fp32", "trt-fp16"))
    bundle = convert_model(folder, tmp_path / "whole", options)
    (sizes, *_) = bundle.variant("trt-fp16").tensorrt.profile
    assert (sizes.usual, sizes.largest) == ((4, 130), (16, 130))  # as many as it has positions
    found = search_model(
        folder, tmp_path / "best", ConversionOptions(measure=False),
        ways=("int8-dynamic", "int8-static-minmax"),
    )  # fmt: skip
    report = report_in(found)
    tried = {one.id: one for one in report.variants if one.id != "fp32"}
    assert set(tried) == {"int8-dynamic", "int8-static-minmax"}
    for one in tried.values():
        assert one.outcome != "failed", one.reason
        figures = {figure.metric: figure for figure in one.quality}
        assert figures["labels_agreement"].value > 0.7
    assert found.manifest.multi_label
    assert found.manifest.label_output == "scores"


def edited(folder: Path, target: Path, name: str, change: Callable[[dict], None]) -> Path:  # type: ignore[type-arg]
    shutil.copytree(folder, target)
    settings = json.loads((target / name).read_text())
    change(settings)
    (target / name).write_text(json.dumps(settings))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "config.json: id2label has 2 names, and none for 1"),
        ({"id2label": {"0": "a"}}, "names 1 class"),
        ({"id2label": ["a", "b"]}, "id2label is no object"),
        ({"problem_type": "regression"}, "regression"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "Python code of its own"),
        ({"architectures": ["GPT2ForSequenceClassification"], "model_type": "gpt2"}, "'gpt2'"),
        ({"architectures": ["BertForWhatever"]}, "config.json has the architecture 'BertForWh"),
        (
            {"architectures": ["ASTForAudioClassification"],
             "model_type": "audio-spectrogram-transformer"},
            "sees spectrograms",
        ),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_converted_is_named(
    text_folder: Path, tmp_path: Path, changes: dict[str, object], message: str
):
    folder = edited(text_folder, tmp_path / "m", "config.json", lambda one: one.update(changes))
    with pytest.raises(ConversionError, match=message) as caught:
        open_source(folder)
    assert caught.value.fix


def test_labels_that_nobody_named_are_two(text_folder: Path):
    assert labels_of(text_folder, {}) == ("LABEL_0", "LABEL_1")


def test_names_that_do_not_fit_the_head_are_refused(text_folder: Path, tmp_path: Path):
    def fewer(config: dict[str, object]) -> None:
        config["id2label"] = {"0": "calm", "1": "glad"}
        config.pop("label2id", None)

    folder = edited(text_folder, tmp_path / "m", "config.json", fewer)
    with pytest.raises(ConversionError, match=r"config\.json does not fit the weights: 'classif"):
        load_huggingface(open_huggingface(folder))


def test_a_head_that_was_never_trained_is_refused(text_folder: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(text_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"no weight 'classifier\.weight'"):
        load_huggingface(open_huggingface(folder))


def test_missing_files_are_named(text_folder: Path, image_folder: Path, tmp_path: Path):
    shutil.copytree(text_folder, tmp_path / "text")
    for file in (tmp_path / "text").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConversionError, match="has no tokenizer"):
        convert_model(tmp_path / "text", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    shutil.copytree(image_folder, tmp_path / "image")
    (tmp_path / "image" / "preprocessor_config.json").unlink()
    with pytest.raises(ConversionError, match=r"has no preprocessor_config\.json"):
        open_source(tmp_path / "image")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_map": {"AutoImageProcessor": "x.Y"}}, "Python code of its own"),
        ({"do_resize": False}, "do_resize is off"),
        ({"image_mean": [0.5]}, "1 numbers in image_mean"),
        # Its sizes mean something else than they say.
        (
            {"image_processor_type": "LevitImageProcessor", "crop_pct": None,
             "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32},
             "do_center_crop": True},
            "LevitImageProcessor of .* does more than its settings say",
        ),
    ],
)  # fmt: skip
def test_a_processor_that_a_bundle_cannot_follow_is_refused(
    image_folder: Path, tmp_path: Path, settings: dict[str, object], message: str
):
    folder = edited(
        image_folder, tmp_path / "m", "preprocessor_config.json", lambda one: one.update(settings)
    )
    with pytest.raises(ConversionError, match=message):
        read_image(open_huggingface(folder), 0)


@pytest.mark.parametrize(
    ("settings", "resize", "crop"),
    [
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 48},
          "crop_pct": None}, (32, 48), None),
        ({"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36},
          "crop_size": {"height": 30, "width": 32}, "do_center_crop": True, "crop_pct": None},
         (36,), (30, 32)),
        ({"size": {"shortest_edge": 384}}, (384, 384), None),
    ],
)  # fmt: skip
def test_processors_are_followed_by_what_they_do(
    image_folder: Path,
    tmp_path: Path,
    settings: dict[str, object],
    resize: tuple[int, ...],
    crop: tuple[int, int] | None,
):
    folder = edited(
        image_folder, tmp_path / "m", "preprocessor_config.json", lambda one: one.update(settings)
    )
    spec = read_image(open_huggingface(folder), 0)  # compares with the processor itself
    assert (spec.resize, spec.crop) == (resize, crop)


def test_classifiers_are_not_sliced(text_folder: Path):
    wished = ConversionOptions(settings=Settings(slim=SlimSettings(drop_layers=1)))
    with pytest.raises(ConfigError, match="is a classifier"):
        plan(open_source(text_folder), wished)


def test_the_stand_ins_of_the_examples_can_be_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script = Path(__file__).parents[2] / "examples" / "stand_ins.py"
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path)])
    runpy.run_path(str(script))
    for name in ("animal", "word", "mood"):
        assert list(plan(open_source(tmp_path / name), ConversionOptions()).variants) == [
            "fp32", "int8",
        ]  # fmt: skip
    assert read_image(open_huggingface(tmp_path / "animal"), 0).shape == (3, 64, 64)
