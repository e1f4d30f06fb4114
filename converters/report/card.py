"""The model card of a bundle (``README.md``): what it is, whose it is, how it was made."""

from __future__ import annotations

from converters.report.contents import Report
from converters.report.page import share
from nearfar.bundle.manifest import HeadTailPreprocessing, Manifest, TextPreprocessing
from nearfar.units import format_bytes, format_ms


def model_card(report: Report, manifest: Manifest) -> str:
    """Markdown, with a head in the form that model hubs read (YAML)."""
    task = {"embedding": "feature-extraction", "tensor": "other"}.get(report.task, report.task)
    head = ["---", f"license: {_yaml(report.license or 'unknown')}", f"pipeline_tag: {_yaml(task)}",
            "library_name: nearfar", "---", ""]  # fmt: skip
    lines = [*head, f"# {report.name} {report.version}", ""]
    if report.description:
        lines += [report.description, ""]
    lines += [
        f"A nearfar bundle for {report.task}. `report.html` shows size, speed and quality; "
        "`nearfar bundle verify` checks the files and runs the golden inputs.",
        "",
        "## Variants",
        "",
        "| Variant | Made by | Size | Speed | Quality lost |",
        "|---|---|---|---|---|",
    ]
    for one in report.variants:
        if one.outcome == "packed":
            lines.append(
                f"| `{one.id}` | {_cell(one.method)} | {format_bytes(one.size_bytes)} | "
                f"{format_ms(one.latency_ms)} | {share(one.lost)} |"
            )
    lines += ["", "## In and out", "", f"- In: {_input(manifest)}"]
    if manifest.labels:
        lines.append(f"- Out: scores of {len(manifest.labels)} classes")
    elif manifest.outputs:
        lines.append(
            "- Out: " + ", ".join(f"`{one.name}` {one.datatype}" for one in manifest.outputs)
        )
    lines += [
        "",
        "## Licence and origin",
        "",
        f"- Licence: {report.license or 'not stated by the source; ask its maker'}",
        f"- Made of: {_cell(report.source) or 'not stated'}",
    ]
    if report.source_sha256:
        lines.append(f"- SHA-256 of the source: `{report.source_sha256}`")
    if report.changed:
        lines.append(f"- Changed: {_cell(report.changed)}")
    tools = ", ".join(f"{name} {version}" for name, version in sorted(report.tools.items()))
    lines.append(f"- Made with: {tools}")
    lines += [
        "",
        "## Limits",
        "",
        "Quality was compared with the source, not with the world: what the source gets wrong, the "
        "variants get wrong too. " + _measured(report),
        "",
    ]
    return "\n".join(lines)


def _measured(report: Report) -> str:
    if not report.machine:
        return "Speed was not measured."
    return f"Speed holds for {_cell(report.machine)}; other machines differ."


def _input(manifest: Manifest) -> str:
    spec = manifest.preprocessing
    if isinstance(spec, TextPreprocessing):
        return f"text, at most {spec.max_length_tokens} tokens"
    if isinstance(spec, HeadTailPreprocessing):
        return (
            f"any bytes; the first {spec.head_bytes} and the last {spec.tail_bytes} are looked at"
        )
    if manifest.task == "text-generation":
        return f"text; prompt and answer have {manifest.context_length_tokens} tokens at most"
    return ", ".join(f"`{one.name}` {one.datatype} {list(one.shape)}" for one in manifest.inputs)


def _cell(text: str) -> str:
    """Foreign text in Markdown: one line, no table borders, no tags."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown.replace("|", "/").replace("<", "&lt;")


def _yaml(text: str) -> str:
    return '"' + "".join(c for c in text if c.isprintable() and c not in '"\\') + '"'
