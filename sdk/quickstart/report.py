"""What the quickstart shows at the end: a table in the terminal and a page to look at."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nearfar.bundle.manifest import Manifest, Variant
from nearfar.pages import house_style
from nearfar.units import format_bytes, format_ms
from sdk.quickstart.charts import (
    egress_chart,
    latency_chart,
    path_diagram,
    route_class,
    token_chart,
)
from sdk.quickstart.situations import REQUESTS, SITUATIONS, Observation

_STYLES = {"edge": "green", "cloud": "blue", "both": "magenta", "denied": "yellow", "error": "red"}


def print_table(observations: Sequence[Observation], console: Console) -> None:
    """One row per request and situation: route and reason, latency, bytes that left the device.

    The reason stands under the situation, so that the table is readable in 80 columns.
    """
    table = Table(
        title="Where each request went, and why",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        expand=True,
    )
    table.add_column("request in situation\n[dim]reason[/]", ratio=1)
    table.add_column("route", no_wrap=True)
    table.add_column("latency\n[dim]first token[/]", justify="right", no_wrap=True)
    table.add_column("bytes\nsent", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for seen in observations:
        what = Text(f"{seen.request} ({seen.situation.key}) {seen.situation.title}\n")
        latency = Text(format_ms(seen.latency_ms))
        if seen.ttft_ms is not None:
            latency.append(f"\n{format_ms(seen.ttft_ms)}", style="dim")
        table.add_row(
            what.append(seen.reason, style="dim"),
            Text(seen.route, style=_STYLES[route_class(seen.route)]),
            latency,
            format_bytes(seen.bytes_sent),
            Text("✓", style="green") if seen.kept else Text("✗", style="red"),
            end_section=seen.situation.key == SITUATIONS[-1].key,
        )
    console.print(table)


def write_html(
    path: Path,
    observations: Sequence[Observation],
    manifests: Sequence[Manifest],
    *,
    passages: int,
    seconds: float,
) -> None:
    """Write the self-contained page; replaces `path`."""
    template = Template(files("sdk.quickstart").joinpath("report.html").read_text(encoding="utf-8"))
    personal = sum(o.bytes_sent for o in observations if o.situation.key == "b")
    answered = [o for o in observations if route_class(o.route) in ("edge", "cloud", "both")]
    page = template.substitute(
        style=house_style(),
        when=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        machine=escape(f"{platform.machine()} · Python {platform.python_version()}"),
        seconds=f"{seconds:.0f}",
        total=len(observations),
        on_device=sum(route_class(o.route) == "edge" for o in answered),
        in_cloud=sum(route_class(o.route) == "cloud" for o in answered),
        handed_over=sum(route_class(o.route) == "both" for o in answered),
        denied=sum(route_class(o.route) == "denied" for o in observations),
        personal_bytes=format_bytes(personal),
        kept=f"{sum(o.kept for o in observations)}/{len(observations)}",
        passages=passages,
        matrix=_matrix(observations),
        latency=latency_chart(observations),
        tokens=token_chart(observations),
        egress=egress_chart(observations),
        models=_models(manifests),
        rows=_rows(observations),
        versions=escape(" · ".join(_versions())),
    )
    path.write_text(page, encoding="utf-8")


def _matrix(observations: Sequence[Observation]) -> str:
    found = {(o.request, o.situation.key): o for o in observations}
    cells = ["<div></div>"]
    for situation in SITUATIONS:
        cells.append(f'<div class="head"><b>{situation.key}</b> {escape(situation.title)}</div>')
    for request in REQUESTS:
        cells.append(f'<div class="side">{request}</div>')
        cells += [_tile(found.get((request, situation.key))) for situation in SITUATIONS]
    return "\n".join(cells)


def _tile(seen: Observation | None) -> str:
    if seen is None:
        return '<div class="tile"></div>'
    mark = '<span class="ok">✓</span>' if seen.kept else '<span class="bad">✗</span>'
    sent = f"{format_bytes(seen.bytes_sent)} sent" if seen.bytes_sent else "nothing sent"
    return (
        f'<div class="tile {route_class(seen.route)}" tabindex="0">'
        f'<div class="top"><span class="route">{escape(seen.route)}</span>{mark}</div>'
        f"{path_diagram(seen)}"
        f'<div class="big">{format_ms(seen.latency_ms)}</div><div class="sent">{sent}</div>'
        f'<div class="more"><b>{escape(seen.asked)}</b><p>{escape(seen.answer)}</p>'
        f"<p class='why'>{escape(seen.reason)}</p></div></div>"
    )


def _models(manifests: Sequence[Manifest]) -> str:
    biggest = max((1, *(v.size_bytes for m in manifests for v in m.variants)))
    rows = []
    for manifest in manifests:
        for variant in manifest.variants:
            width = 100 * variant.size_bytes / biggest
            rows.append(
                f"<tr><td>{escape(manifest.name)}</td><td>{escape(variant.id)}</td>"
                f"<td>{escape(', '.join(variant.placement))}</td>"
                f'<td class="size"><span style="width:{max(width, 0.6):.1f}%"></span>'
                f"{format_bytes(variant.size_bytes)}</td>"
                f"<td>{escape(_quality(variant))}</td><td>{escape(_speed(variant))}</td></tr>"
            )
    return "\n".join(rows)


def _quality(variant: Variant) -> str:
    return " · ".join(f"{q.metric} {q.value:.4g}" for q in variant.quality) or "reference"


def _speed(variant: Variant) -> str:
    if not variant.latency:
        return "not measured"
    figure = variant.latency[0]
    if figure.ms_per_token:
        return f"{1000 / figure.ms_per_token:.0f} tokens/s, first token {format_ms(figure.p50_ms)}"
    return f"p50 {format_ms(figure.p50_ms)}"


def _rows(observations: Sequence[Observation]) -> str:
    return "\n".join(
        "<tr>"
        f"<td>{seen.request}</td><td>({seen.situation.key}) {escape(seen.situation.title)}</td>"
        f'<td><span class="chip {route_class(seen.route)}">{escape(seen.route)}</span>'
        f"<br><small>{escape(seen.variant)}</small></td>"
        f"<td>{escape(seen.reason)}</td><td>{escape(seen.answer)}</td>"
        f'<td class="num">{format_ms(seen.ttft_ms)}</td>'
        f'<td class="num">{format_ms(seen.latency_ms)}</td>'
        f'<td class="num">{format_bytes(seen.bytes_sent)}</td>'
        f"<td>{escape(seen.situation.promise)} {'✓' if seen.kept else '✗'}</td></tr>"
        for seen in observations
    )


def _versions() -> list[str]:
    found = []
    for package in ("nearfar", "onnxruntime", "onnxruntime-genai", "websockets", "cryptography"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found
