"""What people see of a conversion: report, model card, and why a variant was left out."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.report.contents import Report, report_in
from converters.report.evidence import Tried
from converters.report.page import render, share
from converters.report.pareto import mark_front
from converters.settings import Gates, Int8Settings, Settings
from converters.steps.measure import measure
from converters.steps.measure_process import batch_of
from nearfar.bundle import Bundle, open_bundle
from nearfar.bundle.extract import extract_variant
from nearfar.bundle.keys import SigningKey, trusted
from nearfar.bundle.manifest import LatencyFigure
from nearfar.errors import ConversionError, InvalidInput, SecurityError
from tests.support.browser import opened
from tests.support.tiny import tensor_model

WEIGHTS = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    onnx.save(tensor_model(WEIGHTS), tmp_path / "source" / "scores.onnx")
    return tmp_path / "source" / "scores.onnx"


def convert(model: Path, *, gates: Gates | None = None, **options: object) -> Bundle:
    options.setdefault("measure", False)
    options.setdefault("variants", ("int8", "fp32"))
    int8 = options.pop("int8", Int8Settings())
    settings = Settings(int8=int8, gates=gates or Gates())
    path = model.parent.parent / str(options.pop("to", "bundle"))
    return convert_model(model, path, ConversionOptions(settings=settings, **options))


def test_every_bundle_brings_its_report(model: Path):
    bundle = convert(model, description="Scores <of> things", license="MIT")
    report = report_in(bundle)
    assert {one.id: one.outcome for one in report.variants} == {"fp32": "packed", "int8": "packed"}
    assert report.variants[0].lost == 0.0
    assert report.variants[1].share == pytest.approx(
        bundle.manifest.variant("int8").size_bytes / report.full_bytes
    )
    page = (bundle.path / "report.html").read_text()
    assert "Scores &lt;of&gt; things" in page
    assert "INT8 weights in blocks of 128" in page
    assert "[settings.int8]" in page
    card = (bundle.path / "README.md").read_text()
    assert 'license: "MIT"' in card
    assert "Scores <of> things" in card
    bundle.verify()


def test_the_report_names_no_place_of_the_machine(model: Path, tmp_path: Path):
    np.savez(tmp_path / "rows.npz", x=np.ones((9, 64), np.float32))
    bundle = convert(model, samples=tmp_path / "rows.npz")
    for name in ("report.html", "report.json", "README.md"):
        assert str(tmp_path) not in (bundle.path / name).read_text()
    assert 'samples = "rows.npz"' in report_in(bundle).recipe


def test_the_report_is_signed_and_the_same_twice(model: Path, tmp_path: Path):
    key = SigningKey.generate()
    key.save(tmp_path / "key")
    first = convert(model, sign=tmp_path / "key")
    second = convert(model, sign=tmp_path / "key", to="again")
    for name in ("report.html", "report.json", "README.md", "signature.json"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()
    keys = trusted([tmp_path / "key.pub"])
    open_bundle(first.path, trusted_keys=keys).verify()
    (first.path / "report.html").write_text("<p>all is well</p>")
    with pytest.raises(Exception, match=r"report\.html") as error:
        open_bundle(first.path, trusted_keys=keys).verify()
    assert type(error.value).__name__ in ("BundleError", SecurityError.__name__)


def test_an_extracted_variant_keeps_the_card_and_not_the_report(model: Path, tmp_path: Path):
    small = extract_variant(convert(model), "int8", tmp_path / "small")
    assert (small.path / "README.md").is_file()
    assert not (small.path / "report.html").exists()
    small.verify()


def test_the_page_opens_without_script_and_network(model: Path, tmp_path: Path):
    bundle = convert(model, int8=Int8Settings(method="static"))
    page = bundle.path / "report.html"
    source = page.read_text()
    # Nothing that a browser would fetch or run.
    assert not re.search(r"<(script|link|img|iframe|object|embed)|\bon\w+=|@import|url\(", source)
    assert not re.search(r"(src|href)\s*=", source)
    document = opened(page, tmp_path / "profile")
    assert "<h1>scores 1.0.0</h1>" in document
    titles = set(re.findall(r'aria-label="([^"]+)"', document))
    assert {"Size of every variant", "Share of quality that every variant loses"} <= titles
    assert "Calibration" in document


def test_reports_are_readable_in_light_and_dark(model: Path, tmp_path: Path):
    page = convert(model).path / "report.html"
    pictures = []
    for is_dark in (False, True):
        picture = tmp_path / f"{is_dark}.png"
        opened(page, tmp_path / f"profile-{is_dark}", screenshot=picture, is_dark=is_dark)
        pictures.append(picture.read_bytes())
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    # An empty page has a few kilobytes.
    assert min(len(picture) for picture in pictures) > 20_000
    assert pictures[0] != pictures[1]


def test_sensitive_nodes_and_ranges_are_shown(model: Path):
    gates = Gates(max_quality_drop=0.0)
    report = report_in(convert(model, gates=gates, int8=Int8Settings(method="static")))
    (histogram, *_) = report.histograms["int8"]
    assert sum(histogram.counts) > 0
    assert histogram.low < histogram.high


def test_a_variant_that_is_too_large_is_left_out(model: Path):
    bundle = convert(model, gates=Gates(max_size_share=0.8))
    assert [one.id for one in bundle.manifest.variants] == ["int8"]
    (out,) = [one for one in report_in(bundle).variants if one.outcome != "packed"]
    assert (out.id, out.outcome) == ("fp32", "refused")
    assert "1.01x" in out.reason
    assert "--variants int8" in out.hint
    assert "fp32 has" in (bundle.path / "report.html").read_text()


def test_a_variant_that_is_too_slow_is_left_out(model: Path):
    with pytest.raises(ConversionError, match=r"takes .* the limit is 0\.00 ms"):
        convert(model, gates=Gates(max_latency_ms=1e-6), variants=("fp32",), measure=True)
    with pytest.raises(InvalidInput, match="no-measure"):
        convert(model, gates=Gates(max_latency_ms=5.0))


def test_the_throughput_of_batches_is_measured_and_shown(model: Path):
    bundle = convert(model, measure=True)
    for one in report_in(bundle).variants:
        assert one.latency is not None
        assert one.latency.batch_rows == 8
        assert one.latency.rows_per_s > 0
        assert one.latency.prefill_tokens_per_s is None
    page = (bundle.path / "report.html").read_text()
    assert "Throughput: calls of 8 rows." in page
    assert page.count(" rows/s</td>") == 2


@pytest.mark.parametrize(
    ("feeds", "shapes", "is_batch"),
    [
        ({"x": (1, 4)}, {"x": ["batch", 4]}, True),
        ({"x": (3, 4), "y": (3, 2)}, {"x": ["batch", 4], "y": [None, 2]}, True),
        ({"x": (1, 4)}, {"x": [1, 4]}, False),
        # A state has its rows in another place, and a rate has none.
        ({"x": (1, 4), "state": (2, 1, 8)}, {"x": ["n", 4], "state": [2, "n", 8]}, False),
        ({"x": (1, 4), "rate": ()}, {"x": ["n", 4], "rate": []}, False),
    ],
)
def test_batches_are_made_where_rows_are_free(feeds: dict, shapes: dict, *, is_batch: bool):
    made = batch_of({name: np.ones(shape) for name, shape in feeds.items()}, shapes)
    assert (made is not None) == is_batch
    if made is not None:
        assert {name: array.shape for name, array in made.items()} == {
            name: (8, *shape[1:]) for name, shape in feeds.items()
        }


def test_a_model_that_is_fixed_inside_is_measured_row_by_row(tmp_path: Path):
    graph = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        agraph (float[n, 4] x) => (float[m, 2, 2] y) <int64[3] shape = {1, 2, 2}> {
            y = Reshape(x, shape)
        }""")
    onnx.save(graph, tmp_path / "fixed.onnx")
    figure, _ = measure(
        "onnxruntime", tmp_path / "fixed.onnx", feeds={"x": np.ones((1, 4), np.float32)}
    )
    assert figure.batch_rows == 1
    assert figure.rows_per_s > 0


def tried(name: str, size: int, lost: float | None, p50: float | None = None) -> Tried:
    latency = p50 and LatencyFigure(
        machine="m", execution_provider="CPUExecutionProvider", p50_ms=p50, p99_ms=p50, calls=1
    )
    return Tried(id=name, size_bytes=size, lost=lost, latency=latency or None)


@pytest.mark.parametrize(
    ("rows", "front"),
    [
        ([("a", 10, 0.0, 5.0), ("b", 5, 0.1, 5.0), ("c", 6, 0.1, 5.0)], "ab"),
        ([("a", 10, 0.0, 5.0), ("b", 10, 0.0, 5.0)], "ab"),
        ([("a", 10, 0.0, 5.0), ("b", 12, 0.1, 4.0), ("c", 12, 0.1, 6.0)], "ab"),
        ([("a", 10, 0.0, 5.0), ("b", 12, 0.1, None)], "a"),
        ([("a", 10, 0.0, 5.0), ("b", 2, None, 1.0), ("c", 0, 0.0, 1.0)], "a"),
    ],
)
def test_the_front_is_what_nothing_else_beats(rows: list, front: str):
    marked = mark_front([tried(*row) for row in rows])
    assert "".join(one.id for one in marked if one.is_front) == front


def test_foreign_text_is_only_text(tmp_path: Path):
    evil = "<script>alert(1)</script>\"'"
    row = Tried(id=evil, method=evil, size_bytes=5, lost=0.5, reason=evil, outcome="refused")
    page = render(Report(name=evil, version="1", task="tensor", source=evil, recipe=evil,
                         variants=(row, tried("b", 3, 0.1, 2.0)), picked=(evil,)))  # fmt: skip
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_shares_are_written_for_people():
    assert [share(value) for value in (None, 0.0, 2e-5, 0.0123, 0.5)] == [
        "—", "0 %", "< 0.01 %", "1.2 %", "50 %",
    ]  # fmt: skip
