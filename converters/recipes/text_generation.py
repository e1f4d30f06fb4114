"""A language model becomes an onnxruntime-genai bundle: ``int4`` (edge) and ``fp32`` (cloud)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import structs, to_builtins

from converters.awq.calibrate import calibrate, round_scaled
from converters.awq.environment import Interpreter, ready, stated_versions
from converters.recipe_file import fingerprint
from converters.recipes.base import Workshop, summary
from converters.reporting import Step
from converters.settings import Int4Settings
from converters.sources.base import Source
from converters.sources.gguf import GgufSource
from converters.sources.huggingface import read_json
from converters.steps.apart import give_back, run_apart
from converters.steps.carry_gguf import can_carry, carry_blocks
from converters.steps.genai_build import PRECISIONS, build_genai
from converters.steps.prepare_model import prepare_model
from converters.steps.verify_generation import (
    SourceLogits,
    verify_generation,
    windows,
)
from nearfar.bundle.manifest import EngineName, Lineage, Manifest
from nearfar.errors import ConversionError
from nearfar.units import format_bytes

DEFAULT_VARIANTS = ("int4", "fp32")
_ENGINE: EngineName = "onnxruntime-genai"
_TOOLS = ("onnxruntime", "onnxruntime-genai", "torch", "transformers", "gguf")
#: A prompt of usual length for timing the first token.
_TIMED_PROMPT_TOKENS = 64


def build(source: Source, name: str, shop: Workshop) -> Manifest:
    """Export, quantize, verify and measure a language model.

    Raises:
        ConversionError: A step refused or failed.
    """
    ids = shop.variant_ids(DEFAULT_VARIANTS, PRECISIONS)
    awq = _calibrator(source, ids, shop)
    folder = shop.work / "hf"
    with shop.reporter.step("load the source, and run it on real text") as step:
        model = prepare_model(source, folder)
        shop.evidence.full_bytes = 4 * model.parameters
        step.note(f"{model.kind}, {model.parameters / 1e6:.0f} M parameters")
    token_windows = windows(folder / "tokenizer.json", model.vocabulary_size)
    truth = model.truth(source.label)

    targets = {variant_id: shop.writer.folder / variant_id for variant_id in ids}
    with shop.reporter.step(f"build {' and '.join(ids)} for onnxruntime-genai") as step:
        said = _build(source, folder, targets, shop, awq, step)
        sizes = (f"{key} {format_bytes(_size(path))}" for key, path in targets.items())
        step.note(", ".join(sizes) + said)
    give_back()
    quality = _verify(shop, targets, token_windows, truth, is_large=model.is_large)
    best = next(f.value for f in quality[ids[0]] if f.metric == "perplexity")
    ids = tuple(
        variant_id
        for variant_id in ids
        if variant_id == ids[0]
        or shop.accept(variant_id, quality[variant_id], reference_perplexity=best)
    )
    prompt = token_windows.ravel()[:_TIMED_PROMPT_TOKENS].tolist()
    entries = {variant_id: variant_id for variant_id in ids}
    ids, latency = shop.measured(ids, _ENGINE, entries, quality, prompt_tokens=prompt)
    return Manifest(
        name=name,
        version=shop.options.version,
        task="text-generation",
        description=shop.options.description,
        license=shop.options.license or source.license,
        lineage=_lineage(source, shop, awq),
        context_length_tokens=_context_length(targets[ids[0]]),
        variants=shop.variants(
            ids,
            engine=_ENGINE,
            entries=entries,
            quality=quality,
            latency=latency,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Calibrator:
    """What finds AWQ's scales.

    Attributes:
        versions: Of the packages in its environment.
        interpreter: `None` where the result is in the cache.
    """

    versions: dict[str, str]
    interpreter: Interpreter | None


def _calibrator(source: Source, ids: tuple[str, ...], shop: Workshop) -> _Calibrator | None:
    """AWQ's environment, before minutes of work; `None` where it is not used.

    Raises:
        ConversionError: It is not there and cannot be made.
    """
    int4 = shop.settings.int4
    if "int4" not in ids or int4.algorithm != "awq" or int4.awq.scales == "none":
        return None
    versions = stated_versions()
    if shop.cache.has("build-genai", _parts(source, "int4", int4, versions), tools=_TOOLS):
        return _Calibrator(versions, None)
    return _Calibrator(versions, ready(shop.options.cache, shop.reporter))


def _lineage(source: Source, shop: Workshop, awq: _Calibrator | None) -> Lineage:
    lineage = shop.lineage(source, *_TOOLS)
    if awq is None:
        return lineage
    # Its torch and transformers are other ones; modelopt's version stands for them.
    modelopt = {"nvidia-modelopt": awq.versions["nvidia-modelopt"]}
    return structs.replace(lineage, tools={**lineage.tools, **modelopt})


def _parts(
    source: Source, precision: str, int4: Int4Settings, versions: dict[str, str]
) -> dict[str, object]:
    """What a folder of the model builder depends on."""
    settings = to_builtins(int4) if precision == "int4" else ""
    apart = versions if precision == "int4" else {}
    return {"source": fingerprint(source), "precision": precision, "int4": settings,
            "apart": apart}  # fmt: skip


def _build(
    source: Source,
    folder: Path,
    targets: dict[str, Path],
    shop: Workshop,
    awq: _Calibrator | None,
    step: Step,
) -> str:
    """Build what was not built before; see `build_genai` and `carry_blocks`.

    Returns:
        What there is to say about it.
    """
    int4 = _resolved(source, shop.settings.int4)
    said: list[str] = []

    def parts(precision: str) -> dict[str, object]:
        return _parts(source, precision, int4, awq.versions if awq else {})

    def is_ours(precision: str) -> bool:
        return precision == "int4" and int4.algorithm in ("carry", "awq")

    built = {
        precision: target
        for precision, target in targets.items()
        if not is_ours(precision)
        and not shop.cache.has("build-genai", parts(precision), tools=_TOOLS)
    }
    if built:
        build_genai(folder, built, shop.work, int4.algorithm)

    def output(precision: str, target: Path) -> None:
        ours = scale if int4.algorithm == "awq" else carry
        make = partial(ours if is_ours(precision) else build, precision)
        shop.cache.output("build-genai", parts(precision), target, make, tools=_TOOLS)

    def build(precision: str, target: Path) -> None:
        if built.get(precision) != target:  # an entry that turned out to be damaged, or `full`
            build_genai(folder, {precision: target}, shop.work, int4.algorithm)

    def plain() -> Path:
        full = targets.get("fp32")
        if full is None:
            full = shop.work / "full"
            output("fp32", full)
        return full

    def carry(_: str, target: Path) -> None:
        assert isinstance(source, GgufSource)
        done = carry_blocks(plain(), target, source, folder, int4)
        said.append(f"{done.carried} of {done.carried + done.rounded} matrices have the file's own "
                    "blocks")  # fmt: skip

    def scale(_: str, target: Path) -> None:
        if awq is None:  # no scales
            round_scaled(plain(), target, int4)
            return
        full = shop.work / "scaled"
        interpreter = awq.interpreter or ready(shop.options.cache, shop.reporter)
        model = shop.work / "scaled-hf"
        limit = shop.settings.gates.max_logit_error
        done = calibrate(folder, model, interpreter, int4, max_error=limit, step=step)
        step.tell("build")
        build_genai(model, {"fp32": full}, shop.work, int4.algorithm)
        shutil.rmtree(model)
        rounded = round_scaled(full, target, int4)
        shutil.rmtree(full)
        said.append(
            f"{rounded.carried} matrices in 4 bits, AWQ scaled {done.scaled} of "
            f"{done.scaled + done.unscaled}, logits differ by {done.max_error:.2g} before rounding"
        )

    # Full precision comes first: blocks are carried into its graph.
    for precision, target in targets.items():
        output(precision, target)
    return "".join(f"; {line}" for line in said)


def _resolved(source: Source, int4: Int4Settings) -> Int4Settings:
    """The settings with ``auto`` decided.

    Raises:
        ConversionError: Blocks shall be carried over, and the source has none.
    """
    has_blocks = isinstance(source, GgufSource) and can_carry(source)
    if int4.algorithm == "carry" and not has_blocks:
        raise ConversionError(
            f"{source.path} has no blocks of 4 bits that could be carried over (Q4_0, Q4_1, Q4_K)",
            fix="Use another algorithm (int4.algorithm), such as k_quant_mixed",
        )
    if int4.algorithm != "auto":
        return int4
    return structs.replace(int4, algorithm="carry" if has_blocks else "k_quant_mixed")


def _verify(
    shop: Workshop,
    targets: dict[str, Path],
    token_windows: Any,
    truth: SourceLogits,
    *,
    is_large: bool,
) -> dict[str, Any]:
    with shop.reporter.step(f"verify on {token_windows.size} tokens of English text") as step:
        arguments = (targets, token_windows, truth, shop.settings.gates)
        quality = (
            run_apart(verify_generation, *arguments) if is_large else verify_generation(*arguments)
        )
        step.note("; ".join(f"{key}: {summary(found)}" for key, found in quality.items()))
    return quality


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _context_length(folder: Path) -> int:
    length = read_json(folder / "genai_config.json").get("model", {}).get("context_length")
    if not isinstance(length, int) or length < 1:
        raise ConversionError(
            "The model does not say how long its context is",
            fix="Set max_position_embeddings in its config.json",
        )
    return length
