"""`nearfar bundle`: look into a bundle, and check it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from nearfar.bundle import Bundle, Manifest, Variant

app = typer.Typer(
    help="Look into a model bundle, or check that it is whole.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

BundlePath = Annotated[Path, typer.Argument(help="The bundle's folder.", show_default=False)]


@app.command()
def inspect(
    path: BundlePath,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest as JSON, for programs.")
    ] = False,
) -> None:
    """Show what a bundle holds: variants, sizes, quality, speed, origin. Hashes nothing."""
    from rich.console import Console

    from nearfar.bundle import open_bundle
    from nearfar.bundle.manifest import encode_manifest

    bundle = open_bundle(path)
    if as_json:
        sys.stdout.write(encode_manifest(bundle.manifest).decode())
        return
    console = Console(highlight=False)
    console.print(_facts_table(bundle))
    console.print()
    console.print(_variants_table(bundle.manifest))
    console.print()
    console.print(_quality_table(bundle.manifest))


@app.command()
def verify(path: BundlePath) -> None:
    """Check every file's SHA-256, and that nothing unlisted is there. Exit status 1 if not."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from nearfar.bundle import open_bundle
    from nearfar.units import format_bytes

    bundle = open_bundle(path)
    total = bundle.size_bytes()
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"verifying {bundle.manifest.name}", total=total)
        bundle.verify(progress=lambda count: bar.advance(task, count))
    manifest = bundle.manifest
    count = len(manifest.files) + sum(len(variant.files) for variant in manifest.variants)
    typer.echo(
        f"{manifest.name} {manifest.version}: {count} files, {format_bytes(total)}, all good"
    )


def _facts_table(bundle: Bundle) -> Table:
    from rich.table import Table

    from nearfar.units import format_bytes

    manifest = bundle.manifest
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column()
    facts.add_row("model", _text(f"{manifest.name} {manifest.version}", style="bold"))
    facts.add_row("task", manifest.task)
    for label, value in (
        ("about", manifest.description),
        ("licence", manifest.license),
        ("source", manifest.lineage.source),
        ("tools", ", ".join(f"{k} {v}" for k, v in sorted(manifest.lineage.tools.items()))),
        ("inputs", ", ".join(_tensor(s.name, s.datatype, s.shape) for s in manifest.inputs)),
        ("outputs", ", ".join(_tensor(s.name, s.datatype, s.shape) for s in manifest.outputs)),
        ("labels", str(len(manifest.labels)) if manifest.labels else ""),
        (
            "context",
            f"{manifest.context_length_tokens} tokens" if manifest.context_length_tokens else "",
        ),
    ):
        if value:
            facts.add_row(label, _text(value))
    facts.add_row("size", format_bytes(bundle.size_bytes()))
    return facts


def _tensor(name: str, datatype: str, shape: tuple[int, ...]) -> str:
    return f"{name} {datatype}[{', '.join('?' if size == -1 else str(size) for size in shape)}]"


def _variants_table(manifest: Manifest) -> Table:
    from rich.table import Table

    from nearfar.units import format_bytes, format_ms

    table = Table(title="variants", title_justify="left", title_style="bold", box=None)
    for column in ("", "size", "meant for", "engine", "p50", "p99", "per token"):
        table.add_column(
            column, justify="left" if column in ("", "meant for", "engine") else "right"
        )
    for variant in _best_first(manifest):
        row = (
            _text(variant.id, style="bold"),
            format_bytes(variant.size_bytes),
            " > ".join(variant.placement),
            variant.engine,
        )
        for figure in variant.latency[:1] or (None,):
            table.add_row(
                *row,
                format_ms(figure.p50_ms if figure else None),
                format_ms(figure.p99_ms if figure else None),
                format_ms(figure.ms_per_token if figure else None),
            )
        for figure in variant.latency[1:]:
            table.add_row(
                "", "", "", _text(figure.execution_provider, style="dim"),
                format_ms(figure.p50_ms), format_ms(figure.p99_ms), format_ms(figure.ms_per_token),
            )  # fmt: skip
    machines = {figure.machine for variant in manifest.variants for figure in variant.latency}
    if machines:
        table.caption = _text("speed measured on " + "; ".join(sorted(machines)))
        table.caption_justify = "left"
    return table


def _quality_table(manifest: Manifest) -> Table:
    from rich.table import Table

    table = Table(title="quality", title_justify="left", title_style="bold", box=None)
    for column in ("", "metric", "value", "better", "compared with", "samples"):
        table.add_column(column, justify="right" if column in ("value", "samples") else "left")
    for variant in _best_first(manifest):
        name = variant.id
        for figure in variant.quality:
            table.add_row(
                _text(name, style="bold"),
                _text(figure.metric),
                f"{figure.value:.5g}",
                "higher" if figure.higher_is_better else "lower",
                _text(figure.reference),
                str(figure.samples),
            )
            name = ""
        if not variant.quality:
            table.add_row(_text(name, style="bold"), "not measured")
    return table


def _text(foreign: str, style: str = "") -> Text:
    """Text of a manifest, which may come from anyone: no markup, no terminal control codes."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() else "\ufffd" for c in foreign), style=style)


def _best_first(manifest: Manifest) -> list[Variant]:
    return sorted(manifest.variants, key=lambda variant: variant.quality_rank)
