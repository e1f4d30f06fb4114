"""The quickstart's table and page, on made-up observations."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from nearfar.bundle.manifest import FileEntry, LatencyFigure, Manifest, QualityFigure, Variant
from sdk.quickstart.report import print_table, write_html
from sdk.quickstart.situations import REQUESTS, SITUATIONS, Observation

ROUTES = {"a": "cloud", "b": "edge", "c": "cloud", "d": "cloud → edge", "e": "denied"}


def observations() -> list[Observation]:
    made = []
    for request in REQUESTS:
        for situation in SITUATIONS:
            route = ROUTES[situation.key]
            chat = request == "chat" and route != "denied"
            made.append(
                Observation(
                    request=request,
                    situation=situation,
                    asked="Is 1 < 2?",
                    route=route,
                    reason=f"reason {request} {situation.key} <b>",
                    ttft_ms=80.0 if chat else None,
                    latency_ms=420.0,
                    deadline_ms=900.0 if situation.key == "c" else None,
                    bytes_sent=0 if route in ("edge", "denied") else 1234,
                    chunk_times_ms=[80.0 + 20 * n for n in range(12)] if chat else [],
                    handover_at=6 if chat and situation.key == "d" else None,
                    answer="Yes & no",
                    kept=True,
                    variant="int4",
                )
            )
    return made


MANIFEST = Manifest(
    name="assistant",
    version="1.0.0",
    task="text-generation",
    variants=(
        Variant(
            id="int4", engine="onnxruntime-genai", precision="int4", entry="int4",
            files=(FileEntry(path="int4/model.onnx", size_bytes=86_000_000, sha256="0" * 64),),
            quality=(QualityFigure(metric="perplexity", value=21.5, higher_is_better=False,
                                   samples=1024, reference="source"),),
            latency=(LatencyFigure(machine="test", execution_provider="CPUExecutionProvider",
                                   p50_ms=90, p99_ms=120, calls=9, ms_per_token=18),),
        ),
    ),
)  # fmt: skip


class _Checker(HTMLParser):
    """Collects what would make a page depend on something else, and checks nesting."""

    VOID = ("meta", "br", "circle", "path", "rect", "line", "link", "img", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "link", "iframe", "img"):
            self.outside.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and "//" in v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        while self.open and self.open[-1] in ("td", "tr", "th", "p") and self.open[-1] != tag:
            self.open.pop()
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_html(path, observations(), [MANIFEST], passages=40, seconds=12)
    return path.read_text(encoding="utf-8")


def test_page_is_self_contained_and_well_formed(page):
    checker = _Checker()
    checker.feed(page)
    assert checker.outside == []
    assert not re.search(r"url\((?!#)", page)
    assert "$" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)


def test_page_holds_every_request_with_route_reason_and_escaped_text(page):
    for request in REQUESTS:
        for situation in SITUATIONS:
            assert f"reason {request} {situation.key} &lt;b&gt;" in page
    assert "Yes &amp; no" in page
    assert "<b>Is 1 &lt; 2?</b>" in page
    assert "15/15" in page
    assert "perplexity 21.5" in page


def test_page_marks_the_handover_and_the_deadline(page):
    assert "cloud killed here" in page
    assert page.count('class="deadline"') == 3


def test_table_has_a_row_for_each_request():
    out = io.StringIO()
    print_table(observations(), Console(file=out, width=220))
    text = out.getvalue()
    assert text.count("cloud → edge") == 3
    assert text.count("✓") == 15
