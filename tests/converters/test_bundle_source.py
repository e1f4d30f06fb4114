"""A bundle as a source, golden inputs of new bundles, limits as people write them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from converters.limits import with_limits
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.report.contents import report_in
from converters.settings import Gates, Int8Settings, Settings
from converters.steps.gate import UNFUSED, saturates
from nearfar.bundle import Bundle
from nearfar.bundle.extract import extract_variant
from nearfar.bundle.manifest import QualityFigure
from nearfar.engines.devices import cpu_kind, probe
from nearfar.engines.golden import check_golden
from nearfar.errors import ConfigError, ConversionError
from tests.support.tiny import CLASSIFIER_LABELS, HEAD_TAIL, classifier_model, tensor_model

WEIGHTS = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)


@pytest.fixture
def full(tmp_path: Path) -> Bundle:
    """A bundle with FP32 alone, signed by nobody, of version 2."""
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "scores.onnx"
    onnx.save(tensor_model(WEIGHTS), path)
    (path.parent / "labels.txt").write_text("\n".join(f"class {n}" for n in range(64)))
    return convert(path, tmp_path / "full", labels=path.parent / "labels.txt", version="2.0.0")


def convert(source: Path, target: Path, *, int8: Int8Settings | None = None, **more) -> Bundle:
    settings = Settings(int8=int8 or Int8Settings(), gates=more.pop("gates", Gates()))
    options = ConversionOptions(measure=False, settings=settings, **more)
    return convert_model(source, target, options)


def test_variants_are_added_to_what_is_there(full: Bundle, tmp_path: Path):
    bundle = convert(full.path, tmp_path / "both", variants=("int8",))
    bundle.verify()
    old, new = full.manifest, bundle.manifest
    assert [one.id for one in new.variants] == ["fp32", "int8"]
    assert new.variant("fp32").files == old.variants[0].files
    assert (new.name, new.version, new.labels, new.label_output) == (
        old.name, "2.0.0", old.labels, old.label_output,
    )  # fmt: skip
    assert new.lineage.source == old.lineage.source
    quality = {figure.metric: figure for figure in new.variant("int8").quality}
    assert quality["top1_agreement"].reference == "fp32"
    assert set(new.golden.relative_error) == {"fp32", "int8"}
    assert check_golden(bundle, "int8").is_good
    assert {one.id for one in report_in(bundle).variants} == {"fp32", "int8"}


def test_a_bundle_may_be_replaced_by_its_larger_self(full: Bundle):
    bundle = convert(full.path, full.path, variants=("int8",), replace=True)
    bundle.verify()
    assert len(bundle.manifest.variants) == 2


def test_a_variant_that_is_there_is_made_anew(full: Bundle, tmp_path: Path):
    both = convert(full.path, tmp_path / "both", variants=("int8",))
    again = convert(
        both.path, tmp_path / "again", variants=("int8",), int8=Int8Settings(block_size=32)
    )
    assert len(again.manifest.variants) == 2
    sizes = [b.manifest.variant("int8").size_bytes for b in (both, again)]
    assert sizes[1] != sizes[0]


def test_what_cannot_be_added_is_refused(full: Bundle, tmp_path: Path):
    with pytest.raises(ConversionError, match="not said what shall be added"):
        convert(full.path, tmp_path / "x")
    with pytest.raises(ConversionError, match="'int2' cannot be made"):
        convert(full.path, tmp_path / "x", variants=("int2",))
    both = convert(full.path, tmp_path / "both", variants=("int8",))
    small = extract_variant(both, "int8", tmp_path / "small")
    with pytest.raises(ConversionError, match="no FP32 variant"):
        convert(small.path, tmp_path / "x", variants=("int8",))
    assert not (tmp_path / "x").exists()


def test_preprocessing_and_labels_come_along(tmp_path: Path):
    (tmp_path / "source").mkdir()
    onnx.save(classifier_model(), tmp_path / "source" / "m.onnx")
    stated = msgspec.json.encode(HEAD_TAIL).decode()
    (tmp_path / "labels.txt").write_text("\n".join(CLASSIFIER_LABELS))
    bundle = convert(
        tmp_path / "source" / "m.onnx", tmp_path / "b", preprocessing=stated,
        labels=tmp_path / "labels.txt",
    )  # fmt: skip
    golden = bundle.manifest.golden
    with np.load(bundle.path / golden.inputs) as stored:
        rows = [stored[name] for name in stored.files]
    # Made-up bytes as the preprocessing makes them, not random numbers.
    assert all(row.dtype == np.int32 for row in rows)
    assert bytes(rows[0][0, :8].astype(np.uint8)) == b'{"name":'


def test_samples_of_a_person_do_not_get_into_the_bundle(full: Bundle, tmp_path: Path):
    rows = np.full((9, 64), 0.123456, np.float32)
    np.savez(tmp_path / "rows.npz", x=rows)
    bundle = convert(full.path, tmp_path / "b", variants=("int8",), samples=tmp_path / "rows.npz")
    with np.load(bundle.path / bundle.manifest.golden.inputs) as stored:
        assert all(not np.isclose(stored[name], 0.123456).any() for name in stored.files)


def test_golden_inputs_can_be_left_out(full: Bundle, tmp_path: Path):
    bundle = convert(full.path, tmp_path / "b", variants=("int8",), golden=False)
    assert bundle.manifest.golden is None
    assert not (bundle.path / "golden").exists()


def figures(here: float, model: float) -> tuple[QualityFigure, ...]:
    return tuple(
        QualityFigure(metric=metric, value=value, higher_is_better=True, samples=9, reference="x")
        for metric, value in (("top1_agreement", here), ("top1_agreement" + UNFUSED, model))
    )


def test_saturation_is_what_only_the_kernels_lose():
    assert saturates(figures(0.114, 0.995))
    assert not saturates(figures(0.990, 0.995))
    assert not saturates(figures(0.60, 0.62))  # the model itself is bad
    assert not saturates(figures(0.114, 0.995)[:1])


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_rounded_activations_are_judged_twice_and_marked(full: Bundle, tmp_path: Path, method):
    bundle = convert(
        full.path, tmp_path / "b", variants=("int8",), int8=Int8Settings(method=method)
    )
    int8 = bundle.manifest.variant("int8")
    assert {"top1_agreement", "top1_agreement" + UNFUSED} <= {one.metric for one in int8.quality}
    assert int8.saturation == {cpu_kind(probe()): False}
    assert bundle.manifest.variant("fp32").saturation == {}


def test_a_variant_that_saturates_here_is_marked_and_kept_for_others(
    full: Bundle, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("converters.recipes.base.saturates", lambda found: True)
    int8 = Int8Settings(method="static")
    bundle = convert(full.path, tmp_path / "b", variants=("int8",), int8=int8)
    assert bundle.manifest.variant("int8").saturation == {cpu_kind(probe()): True}
    # What this CPU makes of it is no reference for others.
    assert set(bundle.manifest.golden.relative_error) == {"fp32"}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("20MiB", (20 << 20, None)),
        ("1.5 MB", (1_500_000, None)),
        ("4", (4 << 20, None)),
        ("0.3x", (None, 0.3)),
        ("0.25×", (None, 0.25)),
    ],
)
def test_sizes_as_people_write_them(stated: str, expected):
    gates = with_limits(Gates(max_size_bytes=1, max_size_share=0.9), size=stated)
    assert (gates.max_size_bytes, gates.max_size_share) == expected


@pytest.mark.parametrize(
    ("option", "stated"),
    [("size", "big"), ("size", "-3MiB"), ("size", "0x"), ("size", "3 parsecs"), ("size", "nan"),
     ("latency", "soon"), ("latency", "0"), ("quality", "2"), ("quality", "some")],
)  # fmt: skip
def test_limits_that_cannot_be_read_are_named(option: str, stated: str):
    with pytest.raises(ConfigError, match="Write it as"):
        with_limits(Gates(), **{option: stated})


def test_limits_of_time_and_quality():
    gates = with_limits(Gates(), latency="5ms", quality="1%")
    assert (gates.max_latency_ms, gates.max_quality_drop) == (5.0, 0.01)
    assert Gates(max_size_share=0.5, max_size_bytes=30).size_limit_bytes(100) == 30
    assert Gates(max_size_share=0.5).size_limit_bytes(0) is None
