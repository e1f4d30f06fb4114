"""Language models become bundles for onnxruntime-genai, and plain graphs with a KV cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from converters import texts
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.plan import plan
from converters.recipes.cached_text import twins
from converters.settings import Int4Settings, Settings
from converters.sources.detect import open_source
from converters.steps import genai_build
from converters.steps.cached_model import cache_shape, context_limit
from converters.steps.export_cached import export_cached
from converters.steps.genai_build import normalise_genai_folder
from converters.steps.onnx_session import open_session
from converters.steps.verify_generation import CachedLogits
from nearfar.bundle import Bundle
from nearfar.engines import load_engine
from nearfar.engines.cached_graph import read_config
from nearfar.errors import ConversionError
from nearfar.generation import GenerationOptions, Prompt
from tests.support.tiny_models import write_tiny_gguf, write_tiny_llama

pytest.importorskip("torch")
pytest.importorskip("onnxruntime_genai")


@pytest.fixture(scope="module")
def bundle(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = ConversionOptions(variants=("fp32", "onnx-fp32", "int4", "onnx-int4"))
    return convert_model(tiny_llama, tmp_path_factory.mktemp("bundles") / "tiny-llama", options)


def test_all_variants_are_whole_compared_and_timed(bundle: Bundle):
    bundle.verify()
    manifest = bundle.manifest
    assert (manifest.task, manifest.context_length_tokens) == ("text-generation", 512)
    assert [v.id for v in manifest.variants] == ["fp32", "onnx-fp32", "int4", "onnx-int4"]
    fp32, plain, *rounded = ({f.metric: f.value for f in v.quality} for v in manifest.variants)
    for exact in (fp32, plain):
        assert exact["logit_max_abs_error"] < 1e-3
    assert plain["greedy_token_agreement"] == plain["top1_agreement"] == 1
    for figures in rounded:
        assert 0.5 < figures["perplexity"] / fp32["perplexity"] < 2
        assert 0 <= figures["greedy_token_agreement"] <= 1
    for variant in manifest.variants:
        (figure,) = variant.latency
        assert figure.p50_ms > 0
        assert figure.ms_per_token
        assert figure.decode_tokens_per_s > 0
        # What the mean of the first tokens' times makes, beside their median and 99th percentile.
        assert figure.prefill_tokens_per_s >= figure.input_tokens / (figure.p99_ms * 1.5 / 1000)
        assert figure.rows_per_s is None
        assert figure.input_tokens == 64
    assert bundle.variant("int4").size_bytes < bundle.variant("fp32").size_bytes
    assert bundle.variant("onnx-int4").size_bytes < bundle.variant("onnx-fp32").size_bytes
    assert [v.precision for v in manifest.variants] == ["fp32", "fp32", "int4", "int4"]


def test_the_plain_graph_says_the_same_as_the_other(bundle: Bundle):
    engines = [load_engine(bundle, one) for one in ("fp32", "onnx-fp32")]
    for text in (*texts.PROMPTS[:3], "near and far " * 30):
        answers = [
            list(engine.generate(Prompt(text=text), GenerationOptions(max_new_tokens=24)))
            for engine in engines
        ]
        assert answers[0] == answers[1]
        assert answers[0][-1].usage.completion_tokens > 1


def test_the_plain_graph_has_plain_operators_and_telling_names(bundle: Bundle):
    variant = bundle.variant("onnx-fp32")
    model = onnx.load(bundle.variant_entry(variant))
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""}
    assert {"Attention", "RotaryEmbedding"}.isdisjoint(node.op_type for node in model.graph.node)
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total_sequence"],
        "position_ids": ["batch", "sequence"],
        "logits": ["batch", "sequence", 512],
        **{
            f"{side}.{layer}.{part}": ["batch", 2, axis, 16]
            for side, axis in (("past_key_values", "past_sequence"), ("present", "total_sequence"))
            for layer in range(2)
            for part in ("key", "value")
        },
    }
    assert str(Path(__file__).parent.parent).encode() not in model.SerializeToString()
    profile = {one.name: one for one in variant.tensorrt.profile}
    assert profile["input_ids"].largest == (4, 128)
    past, mask = profile["past_key_values.0.key"], profile["attention_mask"]
    assert (past.smallest, past.largest) == ((1, 2, 0, 16), (4, 2, 512 - 128, 16))
    assert (mask.smallest, mask.usual, mask.largest) == ((1, 1), (1, 256), (4, 512))


def test_rows_of_different_lengths_share_a_batch(bundle: Bundle):
    session = open_session(bundle.variant_entry(bundle.variant("onnx-fp32")))
    ids = np.random.default_rng(1).integers(3, 512, 9)
    past = {
        value.name: np.zeros((2, 2, 0, 16), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    feeds = {
        "input_ids": np.stack([ids, np.r_[0, 0, 0, ids[:6]]]),
        "attention_mask": np.array([[1] * 9, [0] * 3 + [1] * 6]),
        "position_ids": np.stack([np.arange(9), np.r_[0, 0, 0, np.arange(6)]]),
    }
    logits = session.run(["logits"], feeds | past)[0]
    np.testing.assert_allclose(logits[1, 3:], logits[0, :6], atol=1e-5)


def test_half_precision_is_typed_through_and_close(tiny_llama: Path, tmp_path: Path):
    for precision in ("fp16", "fp32"):
        export_cached(tiny_llama, tmp_path / precision, precision=precision)
    half, full = (CachedLogits(tmp_path / one) for one in ("fp16", "fp32"))
    ids = np.random.default_rng(0).integers(3, 512, 64)
    np.testing.assert_allclose(half(ids), full(ids), atol=0.02)
    model = onnx.load(tmp_path / "fp16" / "model.onnx")
    large = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) > 64]
    assert {tensor.data_type for tensor in large} == {onnx.TensorProto.FLOAT16}
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    assert types["past_key_values.1.value"] == onnx.TensorProto.FLOAT16
    # What it is judged by: CPUs would not round between operators.
    (tmp_path / "work").mkdir()
    shop = SimpleNamespace(work=tmp_path / "work")
    found = twins({"onnx-fp16": tmp_path / "fp16"}, shop, is_large=False)  # type: ignore[arg-type]
    assert read_config(found["onnx-fp16"]) == read_config(tmp_path / "fp16")
    rounded = CachedLogits(found["onnx-fp16"])(ids)
    np.testing.assert_allclose(rounded, full(ids), atol=0.02)
    assert not np.array_equal(rounded, half(ids))


def test_a_window_of_attention_bounds_the_context():
    transformers = pytest.importorskip("transformers")
    mistral = transformers.MistralConfig(sliding_window=1024, max_position_embeddings=4096)
    assert context_limit(mistral) == 1024
    assert context_limit(transformers.LlamaConfig(max_position_embeddings=4096)) == 4096
    qwen = transformers.Qwen2Config(use_sliding_window=False, max_position_embeddings=4096)
    assert context_limit(qwen) == 4096


def test_a_model_that_remembers_in_another_way_is_refused():
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ConversionError, match="keeps something else than keys and values"):
        cache_shape(transformers.MambaConfig())


@pytest.mark.skipif(
    not os.environ.get("NEARFAR_TENSORRT_PYTHON"), reason="NEARFAR_TENSORRT_PYTHON is not set"
)
def test_tensorrt_takes_the_plain_graph(bundle: Bundle, tiny_llama: Path, tmp_path: Path):
    from converters.tensorrt.check import check_graph

    variant = bundle.variant("onnx-fp32")
    export_cached(tiny_llama, tmp_path / "half", precision="fp16")
    for graph in (bundle.variant_entry(variant), tmp_path / "half" / "model.onnx"):
        verdict = check_graph(graph, profile=variant.tensorrt.profile, try_repair=False)
        assert verdict.accepted, verdict.findings


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
    assert sum(node.op_type == "AveragePool" for node in nodes) == 4
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


def test_a_plan_counts_what_each_kind_of_variant_needs(tiny_llama: Path):
    source = open_source(tiny_llama)

    def planned(*variants: str) -> dict[str, tuple[float, int]]:
        steps = plan(source, ConversionOptions(variants=variants)).steps
        return {one.title: (one.time_s, one.disk_bytes) for one in steps}

    both = planned("fp32", "int4", "onnx-fp32", "onnx-int4")
    assert "build fp32 and int4 for onnxruntime-genai" in both
    assert sum("find the layers where" in title for title in both) == 2

    def exported(*variants: str) -> tuple[float, int]:
        return planned(*variants)[f"build {' and '.join(variants)} for plain ONNX Runtime"]

    # Blocks need an export in full precision too, whether it is a variant or not.
    one, two = exported("onnx-int4"), exported("onnx-fp32", "onnx-fp16")
    assert exported("onnx-fp32")[0] < one[0] < two[0]
    assert one[1] > 0 == exported("onnx-fp32", "onnx-int4")[1]
