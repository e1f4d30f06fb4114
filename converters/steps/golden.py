"""Golden inputs of a new bundle, and what its variants make of them.

The inputs are nearfar's own sentences, bytes and sounds, or seeded random numbers: never the
samples that a person gave for verification, since a bundle goes to places where these may not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from msgspec import json, structs

from converters import texts
from converters.libraries import quiet
from converters.steps.raw_samples import feeds_of, made_up
from converters.steps.verify_stream import recordings, windows_of
from converters.steps.verify_tensors import synthetic_samples
from nearfar.bundle.manifest import (
    AudioPreprocessing,
    Golden,
    HeadTailPreprocessing,
    ImagePreprocessing,
    Manifest,
    StreamPreprocessing,
    TextPreprocessing,
)
from nearfar.bundle.writer import BundleWriter
from nearfar.engines.devices import probe
from nearfar.engines.golden import (
    ANSWERS,
    INPUTS,
    MAX_GOLDEN_BYTES,
    OUTPUTS,
    PROMPTS,
    Case,
    relative_error,
    run_cases,
    run_prompts,
    to_npz,
)
from nearfar.engines.selection import why_not
from nearfar.errors import ConversionError, EngineError, InvalidInput

CASES = 4
#: Of one array in an archive, with the outputs of a case.
_NPZ_BYTES = 16 << 10
_CPU = "CPUExecutionProvider"
_BYTES = (
    b'{"name": "nearfar", "route": "edge", "bytes": [1, 2, 3], "sealed": true}\n' * 8,
    b"import sys\n\n\ndef main() -> None:\n    print(sys.argv)\n" * 12,
    b"<!doctype html>\n<html><body><h1>near</h1><p>far</p></body></html>\n" * 10,
    b"id,name,score\n1,near,0.5\n2,far,0.25\n" * 20,
)


def add_golden(writer: BundleWriter, manifest: Manifest, seed: int) -> tuple[Manifest, str]:
    """Run every variant on golden inputs and put both into the bundle.

    Returns:
        The manifest with `golden`, or as it was where that is not possible, and why.

    Raises:
        ConversionError: A variant does not run in the engine that will serve it.
    """
    with quiet():
        return _added(writer, manifest, seed)


def _added(writer: BundleWriter, manifest: Manifest, seed: int) -> tuple[Manifest, str]:
    draft = writer.draft(manifest)
    ranked = sorted(manifest.variants, key=lambda variant: variant.quality_rank)
    # What this machine runs badly, or not at all, is no reference for others.
    ranked = [variant for variant in ranked if why_not(variant, probe()) is None]
    if not ranked or any(one.requirements.execution_provider != _CPU for one in ranked):
        return manifest, "no variant runs on this machine's CPU"
    best = ranked[0].id
    try:
        if manifest.task == "text-generation":
            prompts = list(texts.PROMPTS[:CASES])
            answers = {variant.id: run_prompts(draft, variant.id, prompts) for variant in ranked}
            writer.file(PROMPTS).write_bytes(json.encode(prompts))
            writer.file(ANSWERS).write_bytes(json.encode(answers, order="sorted"))
            golden = Golden(inputs=PROMPTS, outputs=ANSWERS, reference=best)
            return structs.replace(manifest, golden=golden), f"{len(prompts)} prompts"
        try:
            cases = _cases(manifest, writer, seed, draft.variant_entry(ranked[0]))
        except ConversionError as exc:  # a type of input that random numbers do not make
            return manifest, exc.problem
        try:
            truth = run_cases(draft, best, cases)
        except InvalidInput:
            if manifest.preprocessing is not None:
                raise
            return manifest, "the model refuses random inputs"
        if not all(_is_finite(array) for outputs in truth for array in outputs.values()):
            return manifest, "random inputs make NaN or infinity of this model"
        inputs, outputs = to_npz(cases), to_npz(truth)
        if len(inputs) + len(outputs) > MAX_GOLDEN_BYTES:
            return manifest, "they would be larger than golden data may be"
        # Six digits: two runs of a kernel with threads may differ in the last ones.
        errors = {
            variant.id: float(f"{relative_error(run_cases(draft, variant.id, cases), truth):.6g}")
            for variant in ranked
        }
    except EngineError as exc:
        raise ConversionError(
            f"The new bundle does not run: {exc.problem}",
            fix="Check the versions of the engines; --no-golden skips this step",
        ) from exc
    writer.file(INPUTS).write_bytes(inputs)
    writer.file(OUTPUTS).write_bytes(outputs)
    golden = Golden(inputs=INPUTS, outputs=OUTPUTS, reference=best, relative_error=errors)
    return structs.replace(manifest, golden=golden), f"{len(cases)} inputs"


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _cases(manifest: Manifest, writer: BundleWriter, seed: int, best: Path) -> list[Case]:
    spec = manifest.preprocessing
    rows = max(1, manifest.inputs[0].shape[0]) if manifest.inputs[0].shape else 1
    if isinstance(spec, TextPreprocessing):
        from nearfar.processing.text import TextEncoder

        encode = TextEncoder(writer.folder / spec.tokenizer, spec)
        found = [encode([text] * rows) for text in texts.PROMPTS[:CASES]]
    elif isinstance(spec, HeadTailPreprocessing):
        from nearfar.processing.head_tail import features

        name = manifest.inputs[0].name
        data = [one * (1 + spec.min_bytes // len(one)) for one in _BYTES[:CASES]]
        found = [{name: np.repeat(features(one, spec)[None, :], rows, axis=0)} for one in data]
    elif isinstance(spec, StreamPreprocessing):
        heard, _ = recordings(None, spec, seed)
        windows = windows_of(best, manifest.inputs, heard, spec)
        step = max(1, len(windows) // CASES)
        return windows[step // 2 :: step][:CASES]
    elif isinstance(spec, (ImagePreprocessing, AudioPreprocessing)):
        found = [feeds_of(data, spec) for data in made_up(spec, seed, CASES)]
        # Fewer of large images: golden data has a limit.
        size = sum(array.nbytes for array in found[0].values())
        return found[: max(1, MAX_GOLDEN_BYTES // (size + _NPZ_BYTES))]
    else:
        return synthetic_samples(manifest.inputs, seed)[:CASES]
    wanted = {one.name for one in manifest.inputs}
    return [{name: case[name] for name in case if name in wanted} for case in found]
