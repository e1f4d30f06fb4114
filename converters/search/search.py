"""The search itself: try, judge, take the best, put them into one bundle."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec

from converters.options import ConversionOptions
from converters.pipeline import check_options, with_golden, work_folder
from converters.plan import PlannedStep
from converters.recipe_file import Recipe as RecipeFile
from converters.recipe_file import changed_files, check_source, recipe_of, write_recipe
from converters.report.evidence import Evidence, Tried
from converters.report.files import files_beside
from converters.report.page import share
from converters.report.words import method_of
from converters.reporting import Reporter
from converters.search.candidates import can_be_mixed, chosen, mixed, planned
from converters.search.choice import choose, judged
from converters.search.trial import Bench, Tested
from converters.settings import Settings, Trial
from converters.sources.base import Source
from converters.sources.detect import open_source
from converters.steps.verify_embedding import may_mix
from nearfar.bundle import Bundle, BundleWriter
from nearfar.bundle.keys import SigningKey
from nearfar.bundle.manifest import Manifest, Placement, QualityFigure, Variant
from nearfar.bundle.writer import check_target
from nearfar.errors import ConfigError, ConversionError
from nearfar.units import format_bytes, format_ms

#: Taken where nobody states one: a search needs to know what is bad.
DEFAULT_QUALITY_DROP = 0.05
DEFAULT_COUNT = 3
#: What loses more than so many times the limit is not saved by a few nodes, and finding them takes
#: longer than all else: every node is rounded alone.
_WORTH_MIXING = 4.0


@dataclass(slots=True)
class _Found:
    """What the trials brought so far."""

    tested: dict[str, Tested] = field(default_factory=dict)
    failed: list[Tried] = field(default_factory=list)


def search_model(
    source_path: Path,
    bundle_path: Path,
    options: ConversionOptions,
    *,
    count: int = DEFAULT_COUNT,
    ways: Sequence[str] = (),
    reporter: Reporter | None = None,
    recipe: RecipeFile | None = None,
    save_recipe: Path | None = None,
) -> Bundle:
    """Try the ways to compress a model, and make a bundle of the best that hold the gates.

    With `options.trials` these are tried and no others, and all that hold the gates are taken: so a
    recipe repeats what a search found.

    Args:
        source_path, bundle_path, recipe, save_recipe: See `convert_model`.
        options: `variants` is not looked at.
        count: How many variants the bundle may have.
        ways: Ids of the only ones to try; all without any.
        reporter: Where progress goes, with the time that is left.

    Returns:
        The opened bundle; its report shows everything that was tried.

    Raises:
        InvalidInput, BundleError: See `convert_model`.
        ConfigError: A way does not exist, or slicing is wished.
        ConversionError: There is nothing to search, or no variant holds the gates.
    """
    reporter = reporter or Reporter()
    check_options(options)
    signing_key = SigningKey.load(options.sign) if options.sign is not None else None
    check_target(bundle_path.absolute(), replace=options.replace)
    if options.settings.slim.is_wished:
        raise ConfigError(
            "A search makes variants of the whole model only, and slicing is wished",
            field="slim",
            fix="Slice first, with --keep-work; then search with the folder slim in the kept work",
        )
    source = open_source(source_path, inputs=options.inputs, axes=options.axes,
                         allow_pickle=options.allow_pickle)  # fmt: skip
    for line in check_source(recipe, source) if recipe is not None else ():
        reporter.say(f"! {line}: the files may differ from the recipe's")
    options = with_defaults(options, reporter)
    trials = options.trials or chosen(source, ways)
    plan = planned(source, options, trials)
    with work_folder(bundle_path.absolute(), keep=options.keep_work) as work:
        bench = Bench(source, source_path, options, work)
        found = _try_all(bench, options, trials, _Clock(reporter, plan))
        if bench.hits:
            reporter.say(f"✓ {bench.hits} trials were taken from {options.cache}")
        full = found.tested[next(iter(found.tested))]
        evidence = _evidence(found)
        judged_ = judged(_rows(found), options.settings.gates, evidence.full_bytes, evidence.layers)
        # A recipe that is repeated states what is taken; a search takes the best.
        ids, picked, told = choose(judged_, max(count, len(options.trials)))
        for line in picked:
            reporter.say(f"✓ {line}")
        evidence.tried += [one for one in told if one.id not in ids]
        taken = tuple(found.tested[key].trial for key in ids)
        with BundleWriter(bundle_path, replace=options.replace) as writer:
            manifest = _assemble(full.bundle.manifest, found, ids, options, writer)
            if options.golden:
                manifest = with_golden(manifest, writer, options, reporter)
            done = replace(options, trials=taken)
            with reporter.step("hash and write the bundle") as step:
                bundle = writer.finish(
                    manifest,
                    signing_key=signing_key,
                    beside=partial(_beside, source, done, evidence, picked),
                )
                step.note(f"{bundle.manifest.name} {bundle.manifest.version}, "
                          f"{format_bytes(bundle.size_bytes())}")  # fmt: skip
    if recipe is not None and recipe.files:
        changed = changed_files(recipe, bundle)
        reporter.say(
            f"! other files than the recipe states: {', '.join(changed)}"
            if changed
            else "✓ the files are those that the recipe states, by their SHA-256"
        )
    if save_recipe is not None:
        write_recipe(recipe_of(source, done, bundle, save_recipe), save_recipe)
        reporter.say(f"✓ the recipe is in {save_recipe}")
    return bundle


def with_defaults(options: ConversionOptions, reporter: Reporter) -> ConversionOptions:
    """The options with a limit of quality, which a search cannot do without."""
    gates = options.settings.gates
    if gates.max_quality_drop is not None:
        return options
    reporter.say(
        f"No limit of quality is stated: at most {share(DEFAULT_QUALITY_DROP)} may be lost "
        "(--max-quality-drop)"
    )
    gates = msgspec.structs.replace(gates, max_quality_drop=DEFAULT_QUALITY_DROP)
    return replace(options, settings=msgspec.structs.replace(options.settings, gates=gates))


class _Clock:
    """Says how far the search is and how long the rest may take, from how long the first took."""

    def __init__(self, reporter: Reporter, plan: Sequence[PlannedStep]) -> None:
        self.reporter = reporter
        self._expected_s = [step.time_s for step in plan]
        self._done = 0
        self._spent_s = 0.0

    def more(self, like_s: float) -> None:
        """One more trial than was planned."""
        self._expected_s.append(like_s)

    def title(self, name: str) -> str:
        """``[2/7] int8-dynamic, about 40 s left``."""
        self._done += 1
        before = sum(self._expected_s[: self._done - 1])
        rest = sum(self._expected_s[self._done - 1 :])
        scale = self._spent_s / before if before else 1.0
        left = rest * scale
        text = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        return f"[{self._done}/{len(self._expected_s)}] {name}, about {text} left"

    def spend(self, seconds: float) -> None:
        """A trial took that long."""
        self._spent_s += seconds

    def last_s(self) -> float:
        """What the trial before was expected to take."""
        return self._expected_s[self._done - 1]


def _try_all(
    bench: Bench, options: ConversionOptions, trials: Iterable[Trial], clock: _Clock
) -> _Found:
    found = _Found()
    started_s = time.monotonic()
    with clock.reporter.step(clock.title("full precision")) as step:
        full = bench.full()
        found.tested[full.trial.id] = full
        step.note(_told(_row(full, None)))
    clock.spend(time.monotonic() - started_s)
    limit = options.settings.gates.max_quality_drop
    assert limit is not None
    perplexity = _perplexity(full)
    waiting = [one for one in trials if one.id != full.trial.id]
    is_search = not options.trials
    while waiting:
        trial = waiting.pop(0)
        started_s = time.monotonic()
        with clock.reporter.step(clock.title(trial.id)) as step:
            try:
                tested = bench.run(trial, limit=limit)
            except ConversionError as exc:
                found.failed.append(
                    Tried(id=trial.id, method=_method(trial), outcome="failed",
                          reason=exc.problem, hint=exc.fix or "")
                )  # fmt: skip
                step.note(f"cannot be made: {exc.problem}")
            else:
                found.tested[trial.id] = tested
                row = _row(tested, perplexity)
                step.note(_told(row))
                worth = limit < (row.lost or 0.0) <= _WORTH_MIXING * limit
                if is_search and can_be_mixed(trial) and worth:
                    # It is good but for a few nodes, perhaps.
                    waiting.append(mixed(trial))
                    clock.more(6 * clock.last_s())
        clock.spend(time.monotonic() - started_s)
    return found


def _rows(found: _Found) -> list[Tried]:
    full = next(iter(found.tested.values()))
    perplexity = _perplexity(full)
    return [*(_row(one, perplexity) for one in found.tested.values()), *found.failed]


def _row(tested: Tested, perplexity: float | None) -> Tried:
    """The variant of a trial as the report's row, under the trial's id."""
    variant = tested.trial.variant
    row = next(one for one in tested.report.variants if one.id == variant)
    lost = row.lost
    if perplexity is not None:
        own = next(f.value for f in row.quality if f.metric == "perplexity")
        lost = max(0.0, own / perplexity - 1.0)
    return msgspec.structs.replace(
        row, id=tested.trial.id, outcome="packed", lost=lost, method=_method(tested.trial)
    )


def _told(row: Tried) -> str:
    parts = [format_bytes(row.size_bytes), f"loses {share(row.lost)}"]
    if row.latency_ms is not None:
        parts.insert(1, format_ms(row.latency_ms))
    return ", ".join(parts)


def _method(trial: Trial) -> str:
    return method_of(trial.variant, Settings(int8=trial.int8, int4=trial.int4))


def _perplexity(full: Tested) -> float | None:
    values = {f.metric: f.value for one in full.report.variants for f in one.quality}
    return values.get("perplexity")


def _evidence(found: _Found) -> Evidence:
    """What the trials' reports hold, under the trials' ids."""
    full = next(iter(found.tested.values()))
    evidence = Evidence(full_bytes=full.report.full_bytes, perplexity=_perplexity(full))
    for key, tested in found.tested.items():
        evidence.layers += [
            msgspec.structs.replace(one, variant_id=key) for one in tested.report.layers
        ]
        for histograms in tested.report.histograms.values():
            evidence.histograms[key] = histograms
    return evidence


def _assemble(
    base: Manifest,
    found: _Found,
    ids: Sequence[str],
    options: ConversionOptions,
    writer: BundleWriter,
) -> Manifest:
    """Copy the variants that are taken under the ids of their trials."""
    root = next(iter(found.tested.values())).bundle
    golden = (base.golden.inputs, base.golden.outputs) if base.golden else ()
    for entry in (one for one in base.files if one.path not in golden):
        writer.add(root.path / entry.path, entry.path)
    variants = []
    smallest = min(ids, key=lambda key: found.tested[key].bundle.manifest.variants[0].size_bytes)
    for rank, key in enumerate(ids):
        bundle = found.tested[key].bundle
        old = bundle.manifest.variants[0]
        bundle.verify(old.id)
        for entry in old.files:
            writer.add(bundle.path / entry.path, _moved(entry.path, old.id, key))
        is_far = rank == 0 and key != smallest
        placement: tuple[Placement, ...] = ("cloud", "edge") if is_far else ("edge", "cloud")
        variants.append(
            msgspec.structs.replace(
                old, id=key, entry=_moved(old.entry, old.id, key), files=(), quality_rank=rank,
                placement=placement, quality=_references(old, ids),
            )
        )  # fmt: skip
    quality = [one.quality for one in variants if one.precision != "fp32"]
    return msgspec.structs.replace(
        base,
        name=options.name or base.name,
        version=options.version,
        files=(),
        golden=None,
        variants=tuple(variants),
        mixed_routes=base.task == "embedding" and may_mix(quality),
    )


def _references(variant: Variant, ids: Sequence[str]) -> tuple[QualityFigure, ...]:
    return tuple(
        msgspec.structs.replace(figure, reference=f"{figure.reference}, not in the bundle")
        if figure.reference == "fp32" and "fp32" not in ids
        else figure
        for figure in variant.quality
    )


def _moved(path: str, old: str, new: str) -> str:
    """A path under the folder of another variant id."""
    return new + path[len(old) :] if path == old or path.startswith(f"{old}/") else path


def _beside(
    source: Source,
    options: ConversionOptions,
    evidence: Evidence,
    picked: tuple[str, ...],
    manifest: Manifest,
) -> dict[str, bytes]:
    methods = {trial.id: _method(trial) for trial in options.trials}
    return files_beside(source, manifest, options, evidence, picked=picked, methods=methods)
