"""``report.json``: the figures of a conversion, for programs. The page is made of nothing else."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

import msgspec

from converters.report.evidence import ActivationHistogram, Evidence, LayerErrors, Tried
from converters.report.pareto import mark_front
from converters.settings import Gates
from converters.steps.gate import quality_drop
from nearfar.bundle import Bundle
from nearfar.bundle.manifest import Manifest, Variant
from nearfar.errors import ConversionError

#: Of ``report.json``.
FORMAT = 1


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. The same conversion gives the same report: it holds no times and no paths.

    Attributes:
        format: Of this file.
        name, version, task, description, license: As in the manifest.
        source, source_sha256: Where the model came from.
        machine: What speed was measured on.
        full_bytes: Size of the model's weights in 32 bits; 0 when that is not known.
        gates: The limits that held.
        variants: Those in the bundle, best first, then those that are not.
        layers: Errors per layer, where they were measured.
        histograms: Variant id to the ranges of its activations.
        picked: Why these variants are in the bundle, where a search chose them.
        recipe: The recipe as TOML.
        tools: Package to version.
        changed: What was done to the model itself, in words.
    """

    format: int = FORMAT
    name: str
    version: str
    task: str
    description: str = ""
    license: str = ""
    source: str = ""
    source_sha256: str = ""
    machine: str = ""
    full_bytes: int = 0
    gates: Gates = Gates()
    variants: tuple[Tried, ...] = ()
    layers: tuple[LayerErrors, ...] = ()
    histograms: dict[str, tuple[ActivationHistogram, ...]] = {}
    picked: tuple[str, ...] = ()
    recipe: str = ""
    tools: dict[str, str] = {}
    changed: str = ""


def report_of(
    manifest: Manifest,
    evidence: Evidence,
    gates: Gates,
    *,
    recipe: str,
    methods: Mapping[str, str],
    picked: Sequence[str] = (),
) -> Report:
    """Put a report together.

    Args:
        manifest: Complete, with the files' sizes.
        evidence: What was found on the way.
        gates: The limits.
        recipe: The recipe, as TOML.
        methods: Variant id to how it was made, in words.
        picked: See `Report`.
    """
    inside = [
        tried_of(variant, evidence, method=methods.get(variant.id, ""))
        for variant in sorted(manifest.variants, key=lambda one: one.quality_rank)
    ]
    machines = {figure.machine for one in manifest.variants for figure in one.latency}
    return Report(
        name=manifest.name,
        version=manifest.version,
        task=manifest.task,
        description=manifest.description,
        license=manifest.license,
        source=manifest.lineage.source,
        source_sha256=manifest.lineage.source_sha256,
        machine="; ".join(sorted(machines)),
        full_bytes=evidence.full_bytes,
        gates=gates,
        variants=mark_front([*inside, *evidence.tried]),
        layers=tuple(evidence.layers),
        histograms=dict(evidence.histograms),
        picked=tuple(picked),
        recipe=recipe,
        tools={"python": platform.python_version(), **manifest.lineage.tools},
        changed=evidence.changed,
    )


def tried_of(variant: Variant, evidence: Evidence, *, method: str = "") -> Tried:
    """A variant with its files, as a row of the report."""
    drop = quality_drop(variant.quality, reference_perplexity=evidence.perplexity)
    # The best one is what the others are measured by.
    lost = max(0.0, drop[1]) if drop else 0.0 if variant.quality_rank == 0 else None
    return Tried(
        id=variant.id,
        method=method or variant.precision.upper(),
        size_bytes=variant.size_bytes,
        share=variant.size_bytes / evidence.full_bytes if evidence.full_bytes else 0.0,
        metric=drop[0] if drop else "",
        lost=lost,
        quality=variant.quality,
        latency=variant.latency[0] if variant.latency else None,
        memory_bytes=variant.requirements.memory_bytes,
    )


def encode_report(report: Report) -> bytes:
    """Deterministic, indented JSON, as written to disk."""
    return msgspec.json.format(msgspec.json.encode(report, order="sorted"), indent=2) + b"\n"


def decode_report(data: bytes) -> Report:
    """Read ``report.json``. Raises `msgspec.DecodeError`."""
    return msgspec.json.decode(data, type=Report)


def report_in(bundle: Bundle) -> Report:
    """The report of a bundle.

    Raises:
        ConversionError: It has none.
    """
    try:
        return decode_report((bundle.path / "report.json").read_bytes())
    except (OSError, msgspec.DecodeError) as exc:
        raise ConversionError(
            f"{bundle.path} has no readable report.json", fix="Convert the model again"
        ) from exc
