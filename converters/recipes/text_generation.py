"""A language model becomes a bundle: ``int4`` (edge) and ``fp32`` (cloud) for onnxruntime-genai.

Where it is wished also as a plain ONNX graph with a KV cache; see `cached_text`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from msgspec import structs, to_builtins

from converters.recipe_file import fingerprint
from converters.recipes import cached_text
from converters.recipes.base import Workshop, summary
from converters.recipes.layers import Blame, blame_layers
from converters.settings import Int4Settings
from converters.sources.base import Source
from converters.sources.gguf import GgufSource
from converters.sources.huggingface import read_json
from converters.steps.apart import give_back, run_apart
from converters.steps.carry_gguf import can_carry, carry_blocks
from converters.steps.genai_build import CONFIG, PRECISIONS, build_genai
from converters.steps.prepare_model import prepare_model
from converters.steps.verify_generation import (
    SourceLogits,
    first_call,
    verify_generation,
    windows,
)
from nearfar.bundle.manifest import EngineName, Manifest
from nearfar.errors import ConversionError
from nearfar.units import format_bytes

DEFAULT_VARIANTS = ("int4", "fp32")
POSSIBLE = (*PRECISIONS, *cached_text.IDS)
_ENGINE: EngineName = "onnxruntime-genai"
_TOOLS = ("onnxruntime", "onnxruntime-genai", "torch", "transformers", "gguf")
#: A prompt of usual length for timing the first token.
_TIMED_PROMPT_TOKENS = 64
#: Of a text that layers are compared on: the reference is run on it some forty times.
_COMPARED_TOKENS = 64


def build(source: Source, name: str, shop: Workshop) -> Manifest:
    """Export, quantize, verify and measure a language model.

    Raises:
        ConversionError: A step refused or failed.
    """
    ids = shop.variant_ids(DEFAULT_VARIANTS, POSSIBLE)
    folder = shop.work / "hf"
    with shop.reporter.step("load the source, and run it on real text") as step:
        model = prepare_model(source, folder)
        shop.evidence.full_bytes = 4 * model.parameters
        step.note(f"{model.kind}, {model.parameters / 1e6:.0f} M parameters")
    token_windows = windows(folder / "tokenizer.json", model.vocabulary_size)
    truth = model.truth(source.label)

    targets = {variant_id: shop.writer.folder / variant_id for variant_id in ids}
    for is_plain, library in ((False, "onnxruntime-genai"), (True, "plain ONNX Runtime")):
        own = {one: path for one, path in targets.items() if (one in cached_text.IDS) == is_plain}
        if not own:
            continue
        with shop.reporter.step(f"build {' and '.join(own)} for {library}") as step:
            if is_plain:
                said = cached_text.make_cached(source, folder, own, shop, is_large=model.is_large)
            else:
                said = _build(source, folder, own, shop)
            sizes = (f"{key} {format_bytes(_size(path))}" for key, path in own.items())
            step.note(", ".join(sizes) + said)
        give_back()
    quality = _verify(shop, targets, token_windows, truth, is_large=model.is_large)
    best = next(f.value for f in quality[ids[0]] if f.metric == "perplexity")
    ids = tuple(
        variant_id
        for variant_id in ids
        if variant_id == ids[0]
        or shop.accept(
            variant_id,
            quality[variant_id],
            reference_perplexity=best,
            blame=_blame(shop, variant_id, targets[ids[0]], targets[variant_id], token_windows),
        )
    )
    prompt = token_windows.ravel()[:_TIMED_PROMPT_TOKENS].tolist()
    engines = {one: cached_text.ENGINE if one in cached_text.IDS else _ENGINE for one in ids}
    folders = {variant_id: variant_id for variant_id in ids}
    ids, latency = shop.measured(ids, engines, folders, quality, prompt_tokens=prompt)
    context_length = _context_length(targets[ids[0]])
    variants = shop.variants(
        ids,
        engine=engines,
        entries=cached_text.entries_of(ids),
        quality=quality,
        latency=latency,
    )
    tools = dict.fromkeys(
        tool for one in ids for tool in (cached_text.TOOLS if one in cached_text.IDS else _TOOLS)
    )
    return Manifest(
        name=name,
        version=shop.options.version,
        task="text-generation",
        description=shop.options.description,
        license=shop.options.license or source.license,
        lineage=shop.lineage(source, *tools),
        context_length_tokens=context_length,
        variants=cached_text.finished(variants, shop, context_length),
    )


def _build(source: Source, folder: Path, targets: dict[str, Path], shop: Workshop) -> str:
    """Build what was not built before; see `build_genai` and `carry_blocks`.

    Returns:
        What there is to say about it.
    """
    int4 = _resolved(source, shop.settings.int4)
    said: list[str] = []

    def parts(precision: str) -> dict[str, object]:
        settings = to_builtins(int4) if precision == "int4" else ""
        return {"source": fingerprint(source), "precision": precision, "int4": settings}

    def is_carried(precision: str) -> bool:
        return precision == "int4" and int4.algorithm == "carry"

    built = {
        precision: target
        for precision, target in targets.items()
        if not is_carried(precision)
        and not shop.cache.has("build-genai", parts(precision), tools=_TOOLS)
    }
    if built:
        build_genai(folder, built, shop.work, int4.algorithm)

    def output(precision: str, target: Path) -> None:
        make = partial(carry if is_carried(precision) else build, precision)
        shop.cache.output("build-genai", parts(precision), target, make, tools=_TOOLS)

    def build(precision: str, target: Path) -> None:
        if built.get(precision) != target:  # an entry that turned out to be damaged, or `full`
            build_genai(folder, {precision: target}, shop.work, int4.algorithm)

    def carry(_: str, target: Path) -> None:
        assert isinstance(source, GgufSource)
        full = targets.get("fp32")
        if full is None:
            full = shop.work / "full"
            output("fp32", full)
        done = carry_blocks(full, target, source, folder, int4)
        said.append(f"{done.carried} of {done.carried + done.rounded} matrices have the file's own "
                    "blocks")  # fmt: skip

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


def _blame(shop: Workshop, variant_id: str, best: Path, folder: Path, token_windows: Any) -> Blame:
    def feeds() -> list[dict[str, Any]]:
        return [first_call(best, window[:_COMPARED_TOKENS]) for window in token_windows[-2:]]

    return partial(
        blame_layers, shop, variant_id, best / "model.onnx", folder / "model.onnx", feeds
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _context_length(folder: Path) -> int:
    if not (folder / CONFIG).is_file():
        return cached_text.context_length(folder)
    length = read_json(folder / CONFIG).get("model", {}).get("context_length")
    if not isinstance(length, int) or length < 1:
        raise ConversionError(
            "The model does not say how long its context is",
            fix="Set max_position_embeddings in its config.json",
        )
    return length
