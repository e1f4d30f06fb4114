"""What `nearfar bundle inspect` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from nearfar.bundle.bundle import Bundle, read_signature
from nearfar.bundle.diff import Difference
from nearfar.bundle.manifest import Manifest, Variant
from nearfar.bundle.signature import key_ids
from nearfar.units import format_bytes, format_ms


def facts_table(bundle: Bundle) -> Table:
    """What the bundle is, where it comes from, who signed it."""
    manifest = bundle.manifest
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column()
    facts.add_row("model", text(f"{manifest.name} {manifest.version}", style="bold"))
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
        ("golden", "inputs and outputs (nearfar bundle verify)" if manifest.golden else ""),
        ("8 bits", _saturation(manifest)),
        ("report", "report.html" if (bundle.path / "report.html").is_file() else ""),
    ):
        if value:
            facts.add_row(label, text(value))
    facts.add_row("size", format_bytes(bundle.size_bytes()))
    facts.add_row("signature", text(signature_line(bundle)))
    return facts


def _saturation(manifest: Manifest) -> str:
    """On which CPUs 8-bit kernels were tried, and where they saturate."""
    told = [
        f"{variant.id} {'saturates' if found else 'is good'} on {kind}"
        for variant in manifest.variants
        for kind, found in sorted(variant.saturation.items())
    ]
    return ", ".join(told)


def signature_line(bundle: Bundle) -> str:
    """Who signed, and whether that was checked.

    Raises:
        SecurityError: `signature.json` is not a signature.
    """
    if bundle.signed is not None:
        return f"good, by the trusted key {bundle.signed.key_id[:16]}"
    data = read_signature(bundle.path)
    if data is None:
        return "unsigned"
    claimed = ", ".join(key_id[:16] or "no id" for key_id in key_ids(data)) or "nobody"
    return f"not checked; claims to be by {claimed} (nearfar bundle verify --key PUBLIC_KEY)"


def _tensor(name: str, datatype: str, shape: tuple[int, ...]) -> str:
    return f"{name} {datatype}[{', '.join('?' if size == -1 else str(size) for size in shape)}]"


def variants_table(manifest: Manifest) -> Table:
    """One row a variant: size, engine, speed."""
    table = Table(title="variants", title_justify="left", title_style="bold", box=None)
    for column in ("", "size", "meant for", "engine", "p50", "p99", "per token"):
        table.add_column(
            column, justify="left" if column in ("", "meant for", "engine") else "right"
        )
    for variant in _best_first(manifest):
        row = (
            text(variant.id, style="bold"),
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
                "", "", "", text(figure.execution_provider, style="dim"),
                format_ms(figure.p50_ms), format_ms(figure.p99_ms), format_ms(figure.ms_per_token),
            )  # fmt: skip
    machines = {figure.machine for variant in manifest.variants for figure in variant.latency}
    if machines:
        table.caption = text("speed measured on " + "; ".join(sorted(machines)))
        table.caption_justify = "left"
    return table


def quality_table(manifest: Manifest) -> Table:
    """One row a figure."""
    table = Table(title="quality", title_justify="left", title_style="bold", box=None)
    for column in ("", "metric", "value", "better", "compared with", "samples"):
        table.add_column(column, justify="right" if column in ("value", "samples") else "left")
    for variant in _best_first(manifest):
        name = variant.id
        for figure in variant.quality:
            table.add_row(
                text(name, style="bold"),
                text(figure.metric),
                f"{figure.value:.5g}",
                "higher" if figure.higher_is_better else "lower",
                text(figure.reference),
                str(figure.samples),
            )
            name = ""
        if not variant.quality:
            table.add_row(text(name, style="bold"), "not measured")
    return table


def differences_table(found: Sequence[Difference]) -> Table:
    """One row a field; numbers with how much more or less they are."""
    table = Table(box=None)
    for column in ("field", "A", "B", "change"):
        table.add_column(column, justify="right" if column == "change" else "left")
    for one in found:
        table.add_row(
            text(one.field, style="bold"), _shown(one.before), _shown(one.after), _change(one)
        )
    return table


def _shown(value: object) -> Text:
    if value is None:
        return Text("–", style="dim")
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    # The beginning of a hash tells that it is another one; --json has it whole.
    return text(shown if len(shown) <= 40 else shown[:16] + "…")


def _change(one: Difference) -> str:
    before, after = one.before, one.after
    if isinstance(before, (bool, str)) or isinstance(after, (bool, str)):
        return ""
    if not before or after is None:
        return ""
    return f"{after / before - 1:+.1%}"


def text(foreign: str, style: str = "") -> Text:
    """Text of a manifest, which may come from anyone: no markup, no terminal control codes."""
    return Text("".join(c if c.isprintable() else "\ufffd" for c in foreign), style=style)


def _best_first(manifest: Manifest) -> list[Variant]:
    return sorted(manifest.variants, key=lambda variant: variant.quality_rank)
