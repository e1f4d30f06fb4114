"""Slicing: what goes is really gone, what stays says the same, and training brings it nearer."""

from __future__ import annotations

import io
import json
import runpy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from rich.console import Console

from converters import texts
from converters.commands import convert
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.recipe_file import read_recipe
from converters.recipes.text_generation import resolved
from converters.reporting import Reporter
from converters.settings import Gates, Int4Settings, Settings, SlimSettings
from converters.slim.corpus import encoder_corpus, generator_corpus, read_texts
from converters.slim.cut import slice_model
from converters.slim.importance import Importance, measure_importance
from converters.slim.make import Job, make_slim, read_facts
from converters.slim.shape import Cut, check_slim, cut_of, layout_of, shape_of
from converters.sources.gguf import open_gguf
from converters.sources.huggingface import load_huggingface, open_huggingface
from converters.steps import genai_build
from converters.steps.export_encoder import read_pooling
from converters.steps.genai_builder import RopeTheta
from nearfar.bundle import open_bundle
from nearfar.bundle.manifest import TextPreprocessing
from nearfar.cli import run
from nearfar.errors import ConfigError, ConversionError
from tests.support.tiny import tensor_model
from tests.support.tiny_models import write_tiny_bert, write_tiny_gguf, write_tiny_llama

torch = pytest.importorskip("torch")

#: Little work: the models are tiny, and the texts need not teach them English.
QUICK = SlimSettings(
    recovery_steps=20, learning_rate=1e-3, batch=4, tokens=32, texts=8, round_to=16
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, two key-value heads for four attention heads."""
    return write_tiny_llama(tmp_path_factory.mktemp("hf") / "llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one conversion exported, the next one takes."""
    return tmp_path_factory.mktemp("cache")


def quick(**changes: object) -> SlimSettings:
    return msgspec.structs.replace(QUICK, **changes)


def cut_down(folder: Path, importance: Importance | None = None, **changes: object):
    """(whole model, sliced one) without training."""
    model = load_huggingface(open_huggingface(folder))
    layout = layout_of(model.config.model_type)
    cut = cut_of(shape_of(model.config.to_dict(), layout), layout, quick(**changes))
    ids = np.arange(64, dtype=np.int64).reshape(2, 32) + 3
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found = importance or measure_importance(model, layout, cut.before, [feeds])
    return model, slice_model(model, layout, cut, found), torch.from_numpy(ids)


def nearfar_convert(*arguments: object) -> int:
    return run(convert, [str(part) for part in arguments], program="nearfar convert")


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_slicing_nothing_leaves_every_number_as_it_was(llama: Path):
    whole, sliced, ids = cut_down(llama)
    assert sliced.kept == (0, 1, 2, 3)
    assert torch.equal(logits(whole, ids), logits(sliced.model, ids))


def test_a_layer_that_changes_nothing_goes_first_and_is_not_missed(llama: Path):
    model = load_huggingface(open_huggingface(llama))
    layout = layout_of("llama")
    idle = model.model.layers[2]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
    cut = cut_of(shape_of(model.config.to_dict(), layout), layout, quick(drop_layers=1))
    ids = np.arange(32, dtype=np.int64).reshape(1, 32) + 3
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found = measure_importance(model, layout, cut.before, [feeds])
    assert found.layers[2] == pytest.approx(0, abs=1e-6)
    sliced = slice_model(model, layout, cut, found)
    assert sliced.kept == (0, 1, 3)
    assert len(sliced.model.model.layers) == 3
    assert not any(".layers.3." in name for name in sliced.model.state_dict())
    ids = torch.from_numpy(ids)
    torch.testing.assert_close(logits(model, ids), logits(sliced.model, ids))


def test_heads_and_channels_that_say_nothing_go_first_and_are_not_missed(llama: Path):
    model = load_huggingface(open_huggingface(llama))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :32] = 0  # heads 0 and 1, the first group
            layer.self_attn.v_proj.weight[:16] = 0
            layer.mlp.up_proj.weight[16:48] = 0
    layout = layout_of("llama")
    settings = quick(keep_heads=2, keep_mlp=0.75)
    cut = cut_of(shape_of(model.config.to_dict(), layout), layout, settings)
    ids = np.arange(32, dtype=np.int64).reshape(1, 32) + 3
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found = measure_importance(model, layout, cut.before, [feeds])
    assert (found.groups[:, 0] < found.groups[:, 1]).all()
    sliced = slice_model(model, layout, cut, found).model
    config = sliced.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    assert (config.intermediate_size, config.head_dim) == (96, 16)
    ids = torch.from_numpy(ids)
    torch.testing.assert_close(logits(model, ids), logits(sliced, ids))


def test_padding_says_nothing_about_importance(llama: Path):
    model = load_huggingface(open_huggingface(llama))
    layout = layout_of("llama")
    shape = shape_of(model.config.to_dict(), layout)
    ids = np.arange(32, dtype=np.int64).reshape(1, 32) + 3
    mask = np.ones_like(ids)
    short = measure_importance(
        model, layout, shape, [{"input_ids": ids[:, :20], "attention_mask": mask[:, :20]}]
    )
    mask[:, 20:] = 0
    padded = measure_importance(model, layout, shape, [{"input_ids": ids, "attention_mask": mask}])
    np.testing.assert_allclose(short.layers, padded.layers, rtol=1e-4)
    np.testing.assert_allclose(short.channels, padded.channels, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Mistral"])
def test_other_decoders_keep_what_is_their_own(tmp_path: Path, architecture: str):
    changes = {"head_dim": 16} if architecture == "Qwen3" else {}
    folder = write_tiny_llama(tmp_path / "whole", architecture, num_hidden_layers=3, **changes)
    _, sliced, ids = cut_down(folder, drop_layers=(1,), keep_heads=2, keep_mlp=0.5)
    sliced.model.save_pretrained(str(tmp_path / "sliced"))
    (tmp_path / "sliced" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    again = load_huggingface(open_huggingface(tmp_path / "sliced"))
    assert again.config.num_hidden_layers == 2
    assert torch.equal(logits(sliced.model, ids), logits(again, ids))


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "MPNet"])
def test_encoders_are_sliced_trained_and_written_as_any_other(tmp_path: Path, kind: str):
    source = open_huggingface(write_tiny_bert(tmp_path / "whole", kind=kind))
    spec = TextPreprocessing(tokenizer="", max_length_tokens=64, truncate=True)
    settings = quick(drop_layers=1, keep_mlp=0.5)
    trained = read_texts(None, settings)
    corpus = encoder_corpus(source.path / "tokenizer.json", spec, trained, settings)
    job = Job(source=source, origin=source, settings=settings, seed=1, corpus=corpus,
              pooling=read_pooling(source))  # fmt: skip
    steps: list[int] = []
    make_slim(job, tmp_path / "a", lambda done, _: steps.append(done))
    facts = read_facts(tmp_path / "a")
    assert steps == list(range(1, 21))
    assert facts.loss < facts.loss_before
    assert facts.parameters < facts.parameters_before
    made = open_huggingface(tmp_path / "a")
    assert (made.task, made.license) == ("embedding", "Apache-2.0")
    assert read_pooling(made) == read_pooling(source)
    layers = made.config.get("num_hidden_layers", made.config.get("n_layers"))
    assert (layers, made.config.get("intermediate_size", made.config.get("hidden_dim"))) == (1, 64)
    if kind == "DistilBert":
        make_slim(job, tmp_path / "b")
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
        assert weights[0] == weights[1]


def test_training_brings_a_language_model_nearer_and_time_ends_it(llama: Path, tmp_path: Path):
    source = open_huggingface(llama)
    found = {}
    for name, settings in {
        "trained": quick(drop_layers=2, keep_mlp=0.5),
        "cut": quick(drop_layers=2, keep_mlp=0.5, recovery_steps=0),
        "late": quick(drop_layers=2, recovery_steps=1000, recovery_limit_s=0.05),
    }.items():
        corpus = generator_corpus(llama / "tokenizer.json", read_texts(None, QUICK), settings)
        job = Job(source=source, origin=source, settings=settings, seed=1, corpus=corpus)
        make_slim(job, tmp_path / name)
        found[name] = read_facts(tmp_path / name)
    assert found["trained"].loss < found["trained"].loss_before == found["cut"].loss
    assert 0 < found["late"].steps < 1000
    # The tables of words are the whole model's.
    tables = [
        load_huggingface(open_huggingface(folder)).get_input_embeddings().weight
        for folder in (llama, tmp_path / "trained")
    ]
    assert torch.equal(*tables)


def test_texts_of_training_are_never_those_of_judging():
    trained = texts.training_passages(300)
    assert len(set(trained)) == 300
    assert not set(trained) & set(texts.passages(10_000))
    assert not set(trained) & set(texts.calibration_passages(10_000))
    assert trained[:50] == texts.training_passages(50)


def test_a_person_may_give_texts(tmp_path: Path):
    file = tmp_path / "texts.txt"
    file.write_text("Near is\nhere.\n\n\n\nFar is there.\n")
    assert read_texts(file, QUICK) == ["Near is\nhere.", "Far is there."]
    file.write_text("\n\n")
    with pytest.raises(ConversionError, match="no text"):
        read_texts(file, QUICK)
    with pytest.raises(ConversionError, match="cannot be read"):
        read_texts(tmp_path, QUICK)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"drop_layers": 4}, "slim.drop_layers"),
        ({"drop_layers": (1, 4)}, "slim.drop_layers"),
        ({"keep_heads": 3}, "slim.keep_heads"),
        ({"keep_heads": 6}, "slim.keep_heads"),
        ({"keep_mlp": 0.01}, "slim.keep_mlp"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_name(
    llama: Path, tmp_path: Path, changes: dict[str, object], field: str
):
    settings = Settings(slim=quick(**changes))
    with pytest.raises(ConfigError) as caught:
        convert_model(llama, tmp_path / "b", ConversionOptions(settings=settings))
    assert caught.value.field == field
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_sliced_is_refused(tmp_path: Path, tiny_bert: Path, tiny_gguf: Path, capsys):
    def refused(*arguments: object) -> str:
        assert nearfar_convert(*arguments) != 0
        return capsys.readouterr().err

    out = tmp_path / "b"
    assert "share the hidden size evenly" in refused(tiny_bert, "-o", out, "--keep-heads", 2)
    assert "--keep-mlp 1.5" in refused(tiny_bert, "-o", out, "--keep-mlp", 1.5)
    assert "Of 1 layers 1 cannot go" in refused(tiny_gguf, "-o", out, "--drop-layers", 1)
    assert "whole model only" in refused(tiny_bert, "-o", out, "--drop-layers", 1, "--auto")
    wished = ("--drop-layers", 1, "--variants", "fp32")
    assert "No variant is asked for" in refused(tiny_bert, "-o", out, *wished)
    opt = write_tiny_llama(tmp_path / "opt", "OPT", ffn_dim=64, word_embed_proj_dim=64)
    assert "'opt' cannot be sliced" in refused(opt, "-o", out, "--drop-layers", 1)
    onnx.save(tensor_model(), str(tmp_path / "m.onnx"))
    assert "not a transformer" in refused(tmp_path / "m.onnx", "-o", out, "--drop-layers", 1)


def test_an_encoder_is_sliced_with_one_command(
    tmp_path: Path, tiny_bert: Path, cache: Path, capsys
):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'format = 1\n[source]\nkind = "huggingface"\n[bundle]\nname = "tiny"\n'
        '[convert]\nmeasure = false\nvariants = ["fp32", "slim", "int8"]\n'
        "[settings]\npassages = 32\n"
        "[settings.slim]\ndrop_layers = [1]\nkeep_mlp = 0.5\nrecovery_steps = 4\nbatch = 4\n"
        "tokens = 32\ntexts = 8\n"
    )
    arguments = [tiny_bert, "--recipe", recipe, "--cache", cache]
    assert nearfar_convert(*arguments, "--dry-run") == 0
    assert "1 of 2 layers" in capsys.readouterr().out
    saved = tmp_path / "saved.toml"
    assert nearfar_convert(*arguments, "-o", tmp_path / "a", "--save-recipe", saved) == 0
    assert "1 of 2 layers dropped (1, counted from 0)" in capsys.readouterr().out
    assert read_recipe(saved).settings.slim.drop_layers == (1,)
    bundle = open_bundle(tmp_path / "a")
    manifest = bundle.manifest
    assert [one.id for one in manifest.variants] == ["fp32", "slim", "int8"]
    assert {figure.reference for figure in bundle.variant("slim").quality} == {"fp32"}
    assert {figure.reference for figure in bundle.variant("int8").quality} == {"fp32"}
    assert bundle.variant("slim").size_bytes < bundle.variant("fp32").size_bytes
    assert bundle.variant("int8").size_bytes < bundle.variant("slim").size_bytes
    assert (
        "Changed: slim and what is made of it: 1 of 2 layers"
        in (bundle.path / "README.md").read_text()
    )


def test_the_gate_holds_sliced_variants_against_the_whole_model(
    tmp_path: Path, tiny_bert: Path, cache: Path
):
    sliced = SlimSettings(
        drop_layers=(1,), keep_mlp=0.5, recovery_steps=4, batch=4, tokens=32, texts=8
    )
    gates = Gates(max_quality_drop=0.0, min_mean_cosine=0.0)
    settings = Settings(passages=32, slim=sliced, gates=gates)
    told = io.StringIO()
    options = ConversionOptions(
        measure=False, golden=False, settings=settings, cache=cache,
        variants=("fp32", "slim", "int8"),
    )  # fmt: skip
    reporter = Reporter(Console(file=told))
    bundle = convert_model(tiny_bert, tmp_path / "b", options, reporter=reporter)
    # The same slicing, trained once: the exports and the training are those of the test before.
    assert "results of earlier steps were taken" in told.getvalue()
    assert [one.id for one in bundle.manifest.variants] == ["fp32"]
    report = json.loads((bundle.path / "report.json").read_text())
    refused = {one["id"]: one for one in report["variants"] if one["outcome"] == "refused"}
    assert "limit is 0.0%" in refused["slim"]["reason"]
    assert "slim.drop_layers" in refused["slim"]["hint"]
    assert "made of slim" in refused["int8"]["reason"]
    options = replace(options, variants=())
    with pytest.raises(ConversionError, match="No variant is good enough"):
        convert_model(tiny_bert, tmp_path / "c", options)
    assert not (tmp_path / "c").exists()


@pytest.fixture
def builder_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs onnxruntime-genai's builder in this process, which has imported what it needs."""
    pytest.importorskip("onnxruntime_genai")
    from transformers import PretrainedConfig

    if not hasattr(PretrainedConfig, "rope_theta"):
        monkeypatch.setattr(PretrainedConfig, "rope_theta", RopeTheta(), raising=False)

    def run_inside(commands: Mapping[str, list[str]], work: Path) -> None:
        for command in commands.values():
            monkeypatch.chdir(work)
            monkeypatch.setattr("sys.argv", command[2:])
            runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
            monkeypatch.chdir("/")

    monkeypatch.setattr(genai_build, "_run", run_inside)


@pytest.mark.usefixtures("builder_inside")
def test_a_language_model_is_sliced_exported_and_held_against_the_whole(tmp_path: Path):
    source = write_tiny_llama(tmp_path / "llama", head_dim=32)
    settings = Settings(slim=quick(drop_layers=1, keep_heads=2, keep_mlp=0.5, recovery_steps=4))
    options = ConversionOptions(
        measure=False, settings=settings, variants=("fp32", "slim", "int4"), keep_work=True
    )
    bundle = convert_model(source, tmp_path / "b", options)
    assert [one.id for one in bundle.manifest.variants] == ["fp32", "slim", "int4"]
    slim = {figure.metric: figure for figure in bundle.variant("slim").quality}
    # The export says what the sliced model says, and is compared with the whole one.
    assert slim["logit_max_abs_error"].value < 1e-3
    assert slim["perplexity"].reference == "fp32"
    genai = json.loads((bundle.path / "slim" / "genai_config.json").read_text())
    decoder = genai["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_attention_heads"]) == (1, 2)
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (1, 32)
    assert open_huggingface(tmp_path / "b.work" / "slim").config["intermediate_size"] == 64
    report = json.loads((bundle.path / "report.json").read_text())
    methods = {one["id"]: one["method"] for one in report["variants"]}
    assert methods["int4"].startswith("sliced, ")


def test_blocks_of_a_file_are_not_carried_into_a_sliced_model(tmp_path: Path):
    source = open_gguf(write_tiny_gguf(tmp_path / "Tiny.Q4_1.gguf", kind="Q4_1"))
    assert resolved(source, Int4Settings(), is_sliced=False).algorithm == "carry"
    assert resolved(source, Int4Settings(), is_sliced=True).algorithm == "k_quant_mixed"
    with pytest.raises(ConfigError) as caught:
        resolved(source, Int4Settings(algorithm="carry"), is_sliced=True)
    assert caught.value.field == "int4.algorithm"


def test_plain_graphs_are_not_made_of_sliced_models(llama: Path, tmp_path: Path):
    options = ConversionOptions(
        settings=Settings(slim=quick(drop_layers=1)), variants=("fp32", "onnx-int4")
    )
    with pytest.raises(ConfigError, match="variants wishes for onnx-int4, and slim") as caught:
        convert_model(llama, tmp_path / "b", options)
    assert caught.value.field == "variants"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        # 32 and 96 weights are an odd number of blocks of 32.
        ({"keep_heads": 2}, "slim.keep_heads"),
        ({"keep_mlp": 0.75}, "slim.keep_mlp"),
    ],
)
def test_widths_that_4_bits_cannot_have_are_refused_before_training(
    llama: Path, changes: dict[str, object], field: str
):
    source = open_huggingface(llama)

    def cut(variants: tuple[str, ...], algorithm: str = "auto") -> Cut | None:
        int4 = Int4Settings(algorithm=algorithm)
        settings = Settings(slim=quick(**changes), int4=int4)
        return check_slim(source, ConversionOptions(settings=settings, variants=variants))

    for variants in ((), ("int4",)):
        with pytest.raises(ConfigError, match="no multiple of 64") as caught:
            cut(variants)
        assert caught.value.field == field
    assert cut(("slim", "fp32")) is not None
    assert cut(("int4",), "rtn") is not None
