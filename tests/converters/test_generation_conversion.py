"""Language models become onnxruntime-genai bundles."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.settings import Int4Settings, Settings
from converters.steps import genai_build
from converters.steps.genai_build import normalise_genai_folder
from converters.steps.verify_generation import CachedLogits
from nearfar.bundle import Bundle
from nearfar.errors import ConversionError
from tests.support.tiny_models import write_tiny_gguf, write_tiny_llama

pytest.importorskip("torch")
pytest.importorskip("onnxruntime_genai")


@pytest.fixture(scope="module")
def bundle(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return convert_model(tiny_llama, tmp_path_factory.mktemp("bundles") / "tiny-llama")


def test_both_variants_are_whole_compared_and_timed(bundle: Bundle):
    bundle.verify()
    manifest = bundle.manifest
    assert (manifest.task, manifest.context_length_tokens) == ("text-generation", 512)
    assert [v.id for v in manifest.variants] == ["fp32", "int4"]
    fp32, int4 = ({f.metric: f.value for f in v.quality} for v in manifest.variants)
    assert fp32["logit_max_abs_error"] < 1e-3
    assert 0.5 < int4["perplexity"] / fp32["perplexity"] < 2
    assert 0 <= int4["greedy_token_agreement"] <= 1
    for variant in manifest.variants:
        (figure,) = variant.latency
        assert figure.p50_ms > 0
        assert figure.ms_per_token
        assert figure.input_tokens == 64
    assert bundle.variant("int4").size_bytes < bundle.variant("fp32").size_bytes


def test_the_bundle_says_nothing_about_the_machine_it_was_made_on(bundle: Bundle):
    for path in bundle.path.rglob("*.json"):
        assert str(Path.home()) not in path.read_text()
        assert str(bundle.path.parent) not in path.read_text()


def test_the_library_continues_text_with_it(bundle: Bundle):
    import onnxruntime_genai as og

    model = og.Model(str(bundle.variant_entry(bundle.variant("int4"))))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=12)
    generator = og.Generator(model, parameters)
    generator.append_tokens([5, 6, 7])
    while not generator.is_done():
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) > 3


def test_a_gguf_file_gives_the_numbers_that_are_in_it(tiny_gguf: Path, tmp_path: Path):
    import gguf

    from converters.sources.detect import open_source
    from converters.sources.gguf import load_gguf

    model, tokenizer = load_gguf(open_source(tiny_gguf))
    stored = {t.name: t for t in gguf.GGUFReader(tiny_gguf).tensors}
    expected = stored["blk.0.ffn_up.weight"]
    got = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_array_equal(got.ravel(), np.asarray(expected.data).ravel())
    assert tokenizer.decode(tokenizer("near and far").input_ids) == "near and far"
    model.save_pretrained(str(tmp_path))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_quantized_gguf_file_is_not_rounded_a_second_time(tmp_path: Path):
    source = write_tiny_gguf(tmp_path / "Tiny.Q4_1.gguf", kind="Q4_1")
    options = ConversionOptions(variants=("int4", "fp32"), measure=False)
    bundle = convert_model(source, tmp_path / "carried", options)
    rounding = Settings(int4=Int4Settings(algorithm="k_quant_last"))
    rounded = convert_model(source, tmp_path / "rtn", replace(options, settings=rounding))
    ids = np.random.default_rng(0).integers(3, 512, 64)

    def logits(made: Bundle, variant_id: str) -> np.ndarray:
        return CachedLogits(made.variant_entry(made.variant(variant_id)))(ids)

    exact = logits(bundle, "fp32")
    carried = np.abs(logits(bundle, "int4") - exact).max()
    # What is left are activations in 8 bits inside the kernel.
    assert carried < 0.1 * np.abs(logits(rounded, "int4") - exact).max()
    nodes = onnx.load(
        bundle.variant_entry(bundle.variant("int4")) / "model.onnx", load_external_data=False
    ).graph.node
    assert sum(node.op_type == "ReduceSum" and "_sums" in node.name for node in nodes) == 4
    assert source.stat().st_size < bundle.variant("fp32").size_bytes


def test_a_builder_that_cannot_round_to_the_nearest_is_not_asked_to(tmp_path: Path, monkeypatch):
    versions = {"onnxruntime-genai": "0.11.4"}
    monkeypatch.setattr(genai_build, "tool_versions", lambda *_: versions)
    with pytest.raises(ConversionError, match=r"0\.11\.4.*'rtn'"):
        genai_build.build_genai(tmp_path, {"int4": tmp_path / "int4"}, tmp_path, "rtn")


def test_blocks_cannot_be_carried_from_full_precision(tiny_gguf: Path, tmp_path: Path):
    options = ConversionOptions(settings=Settings(int4=Int4Settings(algorithm="carry")))
    with pytest.raises(ConversionError, match="no blocks of 4 bits"):
        convert_model(tiny_gguf, tmp_path / "b", options)


def test_an_architecture_the_builder_does_not_know_is_a_typed_error(tmp_path: Path):
    folder = write_tiny_llama(tmp_path / "opt", "OPT", ffn_dim=64, word_embed_proj_dim=64)
    with pytest.raises(ConversionError, match=r"model builder failed.*not") as caught:
        convert_model(folder, tmp_path / "out" / "b", ConversionOptions(variants=("fp32",)))
    assert "Traceback" not in str(caught.value)
    assert os.listdir(tmp_path / "out") == []


def test_a_tokenizer_of_another_model_is_noticed(tmp_path: Path):
    folder = write_tiny_llama(tmp_path / "small", vocab_size=300)
    with pytest.raises(ConversionError, match="tokenizer makes token"):
        convert_model(folder, tmp_path / "b", ConversionOptions(variants=("fp32",)))


def test_what_older_versions_of_the_library_refuse_is_put_right(tmp_path: Path):
    (tmp_path / "model.onnx").touch()
    (tmp_path / "tokenizer.json").touch()
    search = {"top_p": None, "max_length": 8}
    (tmp_path / "genai_config.json").write_text(json.dumps({"search": search}))
    settings = {"tokenizer_class": "TokenizersBackend", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    normalise_genai_folder(tmp_path)
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert config == {"search": {"max_length": 8}}
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConversionError, match=r"wrote no tokenizer\.json"):
        normalise_genai_folder(tmp_path)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_conversion_that_is_stopped_leaves_nothing_behind(tiny_llama, tmp_path, signal_number):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "converters", str(tiny_llama), "-o", str(out / "bundle")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # Shells have what they start in the background ignore Ctrl-C, and so have we then.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("build "):
            break
    deadline_s = time.monotonic() + 30
    while not list(out.glob(".*/builder-*.log")) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    process.send_signal(signal_number)
    assert process.wait(timeout=30) == 130
    assert os.listdir(out) == []
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(out) not in processes.stdout
