"""The real models, converted: what their figures say, and what they answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nearfar.bundle import BundleStore
from nearfar.engines import load_engine
from nearfar.engines.base import SessionOptions
from nearfar.generation import ChatMessage, GenerationOptions, Prompt
from nearfar.processing import head_tail
from nearfar.processing.text import TextEncoder

pytestmark = pytest.mark.models


def figures(bundle, variant_id: str) -> dict[str, float]:
    return {figure.metric: figure.value for figure in bundle.variant(variant_id).quality}


@pytest.mark.parametrize("name", ["assistant", "minilm", "file-type"])
def test_every_file_has_its_hash_and_every_variant_its_figures(bundles_dir: Path, name: str):
    bundle = BundleStore(bundles_dir).open(name)
    bundle.verify()
    assert bundle.manifest.license == "Apache-2.0"
    assert bundle.manifest.lineage.source
    for variant in bundle.manifest.variants:
        assert variant.quality
        assert variant.latency[0].p50_ms > 0
        assert variant.requirements.memory_bytes > 0


def test_four_bits_cost_little_and_the_export_nothing(bundles_dir: Path):
    bundle = BundleStore(bundles_dir).open("assistant")
    fp32, int4 = figures(bundle, "fp32"), figures(bundle, "int4")
    assert fp32["logit_max_abs_error"] < 0.01
    assert int4["perplexity"] < 1.25 * fp32["perplexity"]
    assert int4["top1_agreement"] > 0.7
    sizes = {v.id: v.size_bytes for v in bundle.manifest.variants}
    assert sizes["int4"] < sizes["fp32"] / 4


@pytest.mark.parametrize("variant_id", ["int4", "fp32"])
def test_the_assistant_knows_the_capital_of_germany(bundles_dir: Path, variant_id: str):
    engine = load_engine(BundleStore(bundles_dir).open("assistant"), variant_id, SessionOptions())
    question = ChatMessage(role="user", content="What is the capital of Germany?")
    chunks = engine.generate(Prompt(messages=(question,)), GenerationOptions(max_new_tokens=24))
    assert "Berlin" in "".join(chunk.text for chunk in chunks)
    engine.close()


@pytest.mark.parametrize("variant_id", ["int8", "fp32"])
def test_sentences_that_mean_the_same_are_near(bundles_dir: Path, variant_id: str):
    bundle = BundleStore(bundles_dir).open("minilm")
    spec = bundle.manifest.preprocessing
    encode = TextEncoder(bundle.shared_file(spec.tokenizer), spec)
    engine = load_engine(bundle, variant_id, SessionOptions())
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose."]
    vectors = engine.infer(encode(texts))["embedding"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-4)
    cosines = vectors @ vectors[0]
    assert cosines[1] > 0.5 > 0.3 > cosines[2]
    engine.close()


def test_embeddings_keep_their_neighbours_in_eight_bits(bundles_dir: Path):
    bundle = BundleStore(bundles_dir).open("minilm")
    assert figures(bundle, "fp32")["cosine_min"] > 0.99999
    int8 = figures(bundle, "int8")
    assert int8["cosine_mean"] > 0.998  # 0.9995 and 0.9990, by version of ONNX Runtime
    assert int8["recall_at_10"] > 0.93
    assert bundle.manifest.mixed_routes == (
        int8["recall_at_10_mixed"] >= 0.95 and int8["cosine_min"] >= 0.995
    )


def test_file_types_are_told(bundles_dir: Path, tmp_path: Path):
    bundle = BundleStore(bundles_dir).open("file-type")
    manifest = bundle.manifest
    assert len(manifest.labels) == 214
    engine = load_engine(bundle, manifest.variants[0].id, SessionOptions())
    for data, expected in (
        (Path(__file__).read_bytes(), "python"),
        (
            b"<!doctype html><html><head><title>x</title></head><body><p>hello</p></body></html>",
            "html",
        ),
        (Path("/bin/sh").read_bytes(), "elf"),
    ):
        row = head_tail.features(data, manifest.preprocessing)
        scores = engine.infer({manifest.inputs[0].name: row[None, :]})[manifest.label_output]
        assert manifest.labels[int(scores[0].argmax())] == expected
    engine.close()
