"""``report.html``: one file to look at, without script and without network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

from converters.libraries import load
from converters.report.contents import Report
from converters.report.evidence import LayerErrors, Tried
from converters.steps.sensitivity import Damage
from nearfar.bundle.manifest import QualityFigure
from nearfar.pages import house_style
from nearfar.pages.charts import (
    Bar,
    Point,
    bar_chart,
    histogram,
    logarithmic,
    scatter_chart,
)
from nearfar.units import format_bytes, format_ms

#: More rows are not read: the harmful ones come first.
_MAX_LAYERS = 24
#: Names of exported nodes begin alike; their ends tell them apart, and so many letters fit.
_LABEL = 34
_CHARTS = ("size", "latency", "quality", "by_size", "by_latency")
_METRICS = {
    "perplexity": "rise of the perplexity",
    "recall_at_10": "nearest texts lost",
    "top1_agreement": "answers that differ",
    "relative_error": "relative error of the outputs",
}


def render(report: Report) -> str:
    """The page."""
    jinja2 = load("jinja2")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(bytes=format_bytes, ms=format_ms, share=share, figure=_figure)
    template = environment.from_string(
        files("converters.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    safe: Callable[[str], Any] = load("markupsafe").Markup
    inside = [one for one in report.variants if one.outcome == "packed"]
    page: str = template.render(
        report=report,
        style=safe(house_style()),
        inside=inside,
        outside=[one for one in report.variants if one.outcome != "packed"],
        smallest=min(inside, key=lambda one: one.size_bytes, default=None),
        metric=next((_METRICS.get(one.metric, one.metric) for one in report.variants
                     if one.metric), ""),
        batches=_batches(report),
        per_token=any(one.latency and one.latency.ms_per_token for one in report.variants),
        charts={**dict.fromkeys(_CHARTS, ""),
                **{name: safe(chart) for name, chart in _charts(report)}},
        layers=[(one, safe(_layers(one)), max(0, len(one.errors) - _MAX_LAYERS))
                for one in report.layers],
        histograms=[
            (variant, [(one, safe(histogram(one.counts, (one.least, one.most),
                                            (one.low, one.high), one.tensor))) for one in found])
            for variant, found in report.histograms.items()
        ],
        speed=_speed,
        throughput=_throughput,
        better=_better,
    )  # fmt: skip
    return page


def share(value: float | None) -> str:
    """A share for people: ``0.12 %``, ``3.4 %``, ``87 %``; a dash for `None`."""
    if value is None:
        return "—"
    percent = 100 * value
    if percent and percent < 0.01:
        return "< 0.01 %"
    return f"{percent:.0f} %" if percent >= 10 or not percent else f"{percent:.2g} %"


def _charts(report: Report) -> Iterator[tuple[str, str]]:
    made = [one for one in report.variants if one.size_bytes]
    limits = report.gates
    size_limit = limits.size_limit_bytes(report.full_bytes)
    if made:
        yield "size", bar_chart(
            [_bar(one, one.size_bytes, f"{format_bytes(one.size_bytes)}"
                  + (f", {one.share:.2f}×" if one.share else "")) for one in made],
            "Size of every variant",
            limit=size_limit,
            limit_text=f"limit {format_bytes(size_limit)}" if size_limit else "",
        )  # fmt: skip
    timed = [one for one in made if one.latency_ms is not None]
    if timed:
        yield (
            "latency",
            bar_chart(
                [_bar(one, one.latency_ms or 0.0, _speed(one)) for one in timed],
                "Latency of every variant",
                limit=limits.max_latency_ms if not any(_is_text(one) for one in timed) else None,
                limit_text=f"limit {format_ms(limits.max_latency_ms)}",
            ),
        )
    judged = [one for one in made if one.lost is not None]
    if judged:
        yield (
            "quality",
            bar_chart(
                [_bar(one, one.lost or 0.0, share(one.lost)) for one in judged],
                "Share of quality that every variant loses",
                scale=math.sqrt,
                limit=limits.max_quality_drop,
                limit_text=f"limit {share(limits.max_quality_drop)}",
            ),
        )
    if len(judged) > 1:
        # Ticks are round in the unit that the sizes are told in.
        is_large = max(one.size_bytes for one in judged) > 2**20
        unit, name = (2**20, "MiB") if is_large else (2**10, "KiB")
        yield "by_size", scatter_chart(
            [_point(one, one.size_bytes / unit) for one in judged],
            "Quality that is lost against size",
            x_axis="size", y_axis="quality lost",
            x_text=lambda size: f"{size:.4g} {name}", y_text=share,
            limits=(size_limit / unit if size_limit else None, limits.max_quality_drop),
        )  # fmt: skip
    both = [one for one in judged if one.latency_ms is not None]
    if len(both) > 1:
        is_text = any(_is_text(one) for one in both)
        yield "by_latency", scatter_chart(
            [_point(one, one.latency_ms or 0.0) for one in both],
            "Quality that is lost against time",
            x_axis="time per token" if is_text else "time of a call (p50)",
            y_axis="quality lost", x_text=lambda time: f"{time:.3g} ms", y_text=share,
            limits=(None if is_text else limits.max_latency_ms, limits.max_quality_drop),
        )  # fmt: skip


def _bar(one: Tried, value: float, text: str) -> Bar:
    return Bar(label=one.id, value=value, text=text, kind=_kind(one),
               is_faint=one.outcome != "packed")  # fmt: skip


def _point(one: Tried, x: float) -> Point:
    return Point(label=one.id, x=x, y=one.lost or 0.0, kind=_kind(one), is_front=one.is_front)


def _kind(one: Tried) -> str:
    return {"packed": "edge", "refused": "error", "failed": "error"}.get(one.outcome, "cloud")


def _is_text(one: Tried) -> bool:
    return one.latency is not None and one.latency.ms_per_token is not None


def _speed(one: Tried) -> str:
    if one.latency is None:
        return "not measured"
    if one.latency.ms_per_token:
        rate = 1000 / one.latency.ms_per_token
        return f"{format_ms(one.latency.ms_per_token)} a token, {rate:.0f} tokens/s"
    return format_ms(one.latency.p50_ms)


def _throughput(one: Tried) -> str:
    """``1,234 rows/s``; of language models prompt and answer, ``812 / 48 tokens/s``."""
    found = one.latency
    if found is None:
        return "—"
    if found.prefill_tokens_per_s is not None and found.decode_tokens_per_s is not None:
        return f"{_rate(found.prefill_tokens_per_s)} / {_rate(found.decode_tokens_per_s)} tokens/s"
    return f"{_rate(found.rows_per_s)} rows/s" if found.rows_per_s is not None else "—"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _batches(report: Report) -> str:
    """How throughput was measured, where it was."""
    found = [one.latency for one in report.variants if one.latency is not None]
    if any(one.prefill_tokens_per_s is not None for one in found):
        tokens = max(one.input_tokens or 0 for one in found)
        return f"Throughput: reading a prompt of {tokens} tokens, and writing an answer."
    rows = sorted({one.batch_rows for one in found if one.batch_rows is not None})
    if not rows:
        return ""
    counts = " or ".join(f"{count} row{'s' if count > 1 else ''}" for count in rows)
    return f"Throughput: calls of {counts}."


def _layers(found: LayerErrors) -> str:
    shown = found.errors[:_MAX_LAYERS]
    low = max(1e-12, min((one.error for one in shown if one.error > 0), default=1e-12))
    is_inside = found.kind == "inside"

    def text(one: Damage) -> str:
        if is_inside and found.error:
            return f"{one.error:.2g} · {share(one.error / found.error)}"
        return f"{one.error:.2g}" + (" · kept" if one.node in found.kept else "")

    return bar_chart(
        [
            Bar(
                label=one.node if len(one.node) <= _LABEL else f"…{one.node[1 - _LABEL :]}",
                value=one.error,
                text=text(one),
                kind="edge" if one.node in found.kept else "denied",
            )
            for one in shown
        ],
        f"Error of the outputs by the error that single nodes of {found.variant_id} make"
        if is_inside
        else f"Error of the outputs when one node of {found.variant_id} alone is rounded",
        scale=logarithmic(low),
    )


def _figure(value: float) -> str:
    return f"{value:.5g}"


def _better(figure: QualityFigure) -> str:
    return "higher" if figure.higher_is_better else "lower"
