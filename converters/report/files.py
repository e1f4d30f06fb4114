"""The files for people that lie in every bundle: the report, its figures, the model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec import structs

from converters.options import ConversionOptions
from converters.recipe_file import Recipe, recipe_of, to_toml
from converters.report.card import model_card
from converters.report.contents import encode_report, report_of
from converters.report.evidence import Evidence
from converters.report.page import render
from converters.report.words import method_of
from converters.sources.base import Source
from nearfar.bundle import Bundle
from nearfar.bundle.manifest import Manifest

_LICENCES = ("LICENSE", "NOTICE")
#: Licences are a few kilobytes; this is not one.
_MAX_LICENCE_BYTES = 1 << 20


def files_beside(
    source: Source,
    manifest: Manifest,
    options: ConversionOptions,
    evidence: Evidence,
    *,
    picked: Sequence[str] = (),
    methods: dict[str, str] | None = None,
    recipe: Recipe | None = None,
) -> dict[str, bytes]:
    """All of them, by name.

    Args:
        source: What was converted.
        manifest: Complete.
        options: With the settings that were found on the way.
        evidence: What the manifest does not say.
        picked: Why these variants, where a search chose them.
        methods: Variant id to how it was made; those that are not named are told by the settings.
        recipe: To show; `None` takes that of this conversion.
    """
    told = {one.id: method_of(one.precision, options.settings) for one in manifest.variants}
    report = report_of(
        manifest,
        evidence,
        options.settings.gates,
        recipe=to_toml(_shown(recipe or _recipe(source, manifest, options))),
        methods={**told, **(methods or {})},
        picked=picked,
    )
    return {
        **_licences(source),
        "report.json": encode_report(report),
        "report.html": render(report).encode(),
        "README.md": model_card(report, manifest).encode(),
    }


def _recipe(source: Source, manifest: Manifest, options: ConversionOptions) -> Recipe:
    # The folder is only for paths, which are taken out below.
    return recipe_of(source, options, Bundle(Path("/"), manifest), Path("/recipe.toml"))


def _shown(recipe: Recipe) -> Recipe:
    """Without hashes, which the manifest has, and without paths, which are nobody's business."""
    steps = recipe.convert
    inputs = steps.inputs if ":" in steps.inputs else Path(steps.inputs).name
    return structs.replace(
        recipe,
        files={},
        convert=structs.replace(steps, samples=Path(steps.samples).name, inputs=inputs),
    )


def _licences(source: Source) -> dict[str, bytes]:
    """Licence texts of a model that is a folder of its own; beside one file they may be others'."""
    found = {}
    for name in _LICENCES if source.path.is_dir() else ():
        file = source.path / name
        is_file = file.is_file() and not file.is_symlink()
        if is_file and file.stat().st_size <= _MAX_LICENCE_BYTES:
            found[name] = file.read_bytes()
    return found
