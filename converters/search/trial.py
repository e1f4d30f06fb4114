"""One way to compress a model, tried: converted, verified, measured, and kept in the cache."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from converters.cache import StepCache, digest_of_path
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.recipe_file import fingerprint, read_recipe
from converters.report.contents import Report, decode_report, report_of
from converters.report.evidence import Evidence
from converters.search.candidates import FULL, is_text
from converters.settings import Gates, Settings, Trial
from converters.sources.base import Source
from converters.sources.bundle import BundleSource
from converters.sources.torch_module import TorchSource
from nearfar.bundle import Bundle, open_bundle
from nearfar.bundle.extract import extract_variant
from nearfar.engines.devices import probe
from nearfar.errors import ConversionError

_TOOLS = ("onnx", "onnxruntime", "onnxruntime-genai", "onnxslim", "torch", "transformers", "numpy")
_BUNDLE, _RECIPE, _REPORT = "bundle", "recipe.toml", "report.json"


@dataclass(frozen=True, slots=True)
class Tested:
    """What came out of a trial.

    Attributes:
        trial: The way, with the nodes that were found to need full precision.
        bundle: A bundle with that variant alone, under the id of its precision.
        report: Of its conversion.
    """

    trial: Trial
    bundle: Bundle
    report: Report


class Bench:
    """Where trials of one model are made.

    Args:
        source: The model.
        source_path: As it was given.
        options: What the person chose.
        work: Folder for everything.
    """

    def __init__(
        self, source: Source, source_path: Path, options: ConversionOptions, work: Path
    ) -> None:
        self._source = source
        self._path = source_path
        self._work = work
        self._cache = StepCache(options.cache)
        if options.samples is None and isinstance(source, TorchSource):
            options = replace(options, samples=_example_rows(source, work / "examples.npz"))
        self._options = replace(
            options, replace=False, sign=None, golden=False, keep_work=False, trials=()
        )
        self._base: Bundle | None = None

    @property
    def hits(self) -> int:
        """How many trials were taken from the cache."""
        return self._cache.hits

    def full(self) -> Tested:
        """The model in full precision; all trials are held against it."""
        if isinstance(self._source, BundleSource):
            return self._taken(self._source)
        tested = self.run(Trial(id=FULL, variant=FULL), limit=None)
        self._base = tested.bundle
        return tested

    def _taken(self, source: BundleSource) -> Tested:
        """The full precision of a bundle: it was made, verified and measured before."""
        bundle = extract_variant(source.bundle, source.full.id, self._work / "trials" / FULL)
        self._base = bundle
        evidence = Evidence(full_bytes=bundle.manifest.variants[0].size_bytes)
        report = report_of(bundle.manifest, evidence, Gates(), recipe="", methods={})
        return Tested(Trial(id=source.full.id, variant=source.full.id), bundle, report)

    def run(self, trial: Trial, *, limit: float | None) -> Tested:
        """Try one way.

        Args:
            trial: The way.
            limit: Share of quality that `is_mixed` may lose.

        Raises:
            ConversionError: The variant cannot be made, or is not the same model.
        """
        settings = self._settings(trial, limit)
        options = self._options
        parts = {
            "source": fingerprint(self._source),
            "label": self._source.label,
            "trial": msgspec.to_builtins(trial),
            "settings": msgspec.to_builtins(settings),
            "machine": probe().machine if options.measure else "",
            "measure": options.measure,
            "task": options.task,
            "labels": options.labels if not isinstance(options.labels, Path)
            else digest_of_path(options.labels),
            "preprocessing": _stated(options.preprocessing),
            "samples": digest_of_path(options.samples) if options.samples else "",
        }  # fmt: skip
        place = self._work / "trials" / trial.id
        place.parent.mkdir(parents=True, exist_ok=True)
        self._cache.output(
            "trial", parts, place, lambda path: self._make(trial, settings, path), tools=_TOOLS
        )
        found = read_recipe(place / _RECIPE).settings.int8.keep
        return Tested(
            trial=msgspec.structs.replace(
                trial, int8=msgspec.structs.replace(trial.int8, keep=found), is_mixed=False
            ),
            bundle=open_bundle(place / _BUNDLE),
            report=decode_report((place / _REPORT).read_bytes()),
        )

    def _settings(self, trial: Trial, limit: float | None) -> Settings:
        settings = self._options.settings
        gates = msgspec.structs.replace(
            settings.gates,
            max_quality_drop=limit if trial.is_mixed else None,
            max_size_bytes=None,
            max_size_share=None,
            max_latency_ms=None,
        )
        return msgspec.structs.replace(settings, int8=trial.int8, int4=trial.int4, gates=gates)

    def _make(self, trial: Trial, settings: Settings, place: Path) -> None:
        place.mkdir(parents=True)
        options = replace(self._options, settings=settings, variants=(trial.variant,))
        source = self._path
        if trial.variant != FULL and is_text(self._source):
            options = replace(options, variants=(trial.variant, FULL))
        elif trial.variant != FULL:
            # Exported and optimised once: the others are made of that.
            assert self._base is not None
            source = self._base.path
            options = replace(options, labels=None, preprocessing=None, inputs=None, axes=None)
        whole = place.parent / f"{place.name}-whole"
        bundle = convert_model(source, whole, options, save_recipe=place / _RECIPE)
        (place / _REPORT).write_bytes((bundle.path / _REPORT).read_bytes())
        if bundle.manifest.variant(trial.variant) is None:
            raise ConversionError(
                next((one.reason for one in decode_report((place / _REPORT).read_bytes()).variants
                      if one.outcome == "refused"), f"{trial.id} was left out"),
                fix="Let it lose more, or leave it out",
            )  # fmt: skip
        extract_variant(bundle, trial.variant, place / _BUNDLE)
        shutil.rmtree(whole, ignore_errors=True)


def _stated(preprocessing: str | None) -> str:
    if preprocessing is None or preprocessing.lstrip().startswith("{"):
        return preprocessing or ""
    return digest_of_path(Path(preprocessing))


def _example_rows(source: TorchSource, path: Path) -> Path | None:
    """The module's example inputs as samples, where their rows can be told apart."""
    arrays = {name: tensor.numpy() for name, tensor in source.inputs.items()}
    if not all((name, 0) in source.axes for name in arrays):
        return None
    np.savez(path, **arrays)
    return path
