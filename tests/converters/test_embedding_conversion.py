"""Sentence encoders become bundles that give the source's vectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest

from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.settings import Gates, Int8Settings, Settings
from converters.steps.verify_embedding import may_mix
from nearfar.bundle import Bundle
from nearfar.bundle.manifest import QualityFigure
from nearfar.errors import InvalidInput
from nearfar.processing.text import TextEncoder
from tests.support.tiny_models import write_tiny_bert

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def bundle(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return convert_model(tiny_bert, tmp_path_factory.mktemp("bundles") / "tiny-bert")


def vectors(bundle: Bundle, variant_id: str, texts: list[str]) -> np.ndarray:
    spec = bundle.manifest.preprocessing
    feeds = TextEncoder(bundle.shared_file(spec.tokenizer), spec)(texts)
    session = onnxruntime.InferenceSession(str(bundle.variant_entry(bundle.variant(variant_id))))
    wanted = {argument.name for argument in session.get_inputs()}
    return session.run(None, {name: feeds[name] for name in feeds if name in wanted})[0]


def test_the_manifest_says_what_a_runtime_needs(bundle: Bundle):
    manifest = bundle.manifest
    bundle.verify()
    assert (manifest.task, manifest.embedding_output) == ("embedding", "embedding")
    assert [(s.name, s.datatype, s.shape) for s in manifest.outputs] == [
        ("embedding", "FP32", (-1, 64))
    ]
    assert {s.name for s in manifest.inputs} == {"input_ids", "attention_mask", "token_type_ids"}
    assert all((s.datatype, s.shape) == ("INT64", (-1, -1)) for s in manifest.inputs)
    assert manifest.preprocessing.max_length_tokens == 64
    assert manifest.license == "Apache-2.0"
    assert [v.id for v in manifest.variants] == ["fp32", "int8"]


def test_every_variant_is_compared_and_timed(bundle: Bundle):
    for variant in bundle.manifest.variants:
        values = {figure.metric: figure.value for figure in variant.quality}
        assert values["cosine_min"] > 0.99
        assert all(figure.samples >= 64 for figure in variant.quality)
        assert variant.latency[0].p50_ms > 0
    assert bundle.variant("int8").quality[0].reference == "fp32"


def test_vectors_are_the_mean_of_the_tokens_that_are_not_padding(bundle: Bundle, tiny_bert: Path):
    import torch
    import transformers

    texts = ["near", "a much longer text that makes the first one be padded"]
    got = vectors(bundle, "fp32", texts)
    model = transformers.AutoModel.from_pretrained(str(tiny_bert)).eval()
    spec = bundle.manifest.preprocessing
    encoder = TextEncoder(bundle.shared_file(spec.tokenizer), spec)
    for row, text in enumerate(texts):
        feeds = {name: torch.from_numpy(array) for name, array in encoder([text]).items()}
        with torch.no_grad():
            hidden = model(**feeds).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).numpy()
        np.testing.assert_allclose(got[row], expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, rtol=1e-5)
    with pytest.raises(InvalidInput, match="Text 1 has no tokens"):  # its tokenizer adds none
        vectors(bundle, "fp32", ["near", ""])


def test_text_of_any_length_is_cut_not_refused(bundle: Bundle):
    long = vectors(bundle, "int8", ["word " * 1000])
    assert long.shape == (1, 64)


@pytest.mark.parametrize(("kind", "pooling"), [("DistilBert", "cls")])
def test_other_encoders_and_poolings(tmp_path: Path, kind: str, pooling: str):
    folder = write_tiny_bert(tmp_path / "model", kind=kind, pooling=pooling)
    options = ConversionOptions(variants=("fp32",), measure=False, name="other")
    bundle = convert_model(folder, tmp_path / "bundle", options)
    assert bundle.manifest.mixed_routes  # one variant cannot disagree with itself
    assert {s.name for s in bundle.manifest.inputs} == {"input_ids", "attention_mask"}
    first = vectors(bundle, "fp32", ["hello world"])
    padded = vectors(bundle, "fp32", ["hello world", "hello world and a good deal more"])[:1]
    np.testing.assert_allclose(first, padded, atol=1e-5)


@pytest.mark.parametrize(
    ("recall", "cosine", "allowed"), [(0.99, 0.999, True), (0.9, 0.999, False), (0.99, 0.9, False)]
)
def test_routes_are_mixed_only_when_measured_agreement_allows(recall, cosine, allowed):
    def figure(metric: str, value: float) -> QualityFigure:
        return QualityFigure(
            metric=metric, value=value, higher_is_better=True, samples=64, reference="fp32"
        )

    best = [figure("cosine_min", 1.0)]
    small = [figure("cosine_min", cosine), figure("recall_at_10_mixed", recall)]
    assert may_mix([best, small]) is allowed


def test_the_gate_counts_lost_neighbours_and_leaves_a_poor_variant_out(tiny_bert: Path, tmp_path):
    plain = Int8Settings(method="dynamic", per_channel=False, max_kept=0)
    settings = Settings(int8=plain, passages=64, gates=Gates(max_quality_drop=0.0))
    options = ConversionOptions(measure=False, settings=settings)
    refused = convert_model(tiny_bert, tmp_path / "refused", options)
    assert [variant.id for variant in refused.manifest.variants] == ["fp32"]
    kept = msgspec.structs.replace(settings, gates=Gates(max_quality_drop=0.9))
    bundle = convert_model(tiny_bert, tmp_path / "kept", replace(options, settings=kept))
    (recall,) = [f for f in bundle.variant("int8").quality if f.metric == "recall_at_10"]
    assert 0.1 <= recall.value < 1.0
    assert recall.samples == 64


def test_a_sentence_encoder_gets_four_and_sixteen_bits(bundle: Bundle, tmp_path: Path):
    wished = ("int4", "bf16")
    options = ConversionOptions(variants=wished, measure=False, settings=Settings(passages=64))
    added = convert_model(bundle.path, tmp_path / "added", options)
    ids = [variant.id for variant in added.manifest.variants]
    assert ids == ["fp32", "bf16", "int8", "int4"]
    found = {figure.metric: figure.value for figure in added.variant("int4").quality}
    assert 0.9 < found["cosine_mean"] < 1
    (first,) = vectors(added, "int4", ["hello world"])
    (exact,) = vectors(added, "fp32", ["hello world"])
    assert first @ exact > 0.9
    (half,) = vectors(added, "bf16", ["hello world"])
    assert half @ exact > 0.999
    assert added.variant("int4").size_bytes < added.variant("fp32").size_bytes / 2
