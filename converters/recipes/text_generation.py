"""A language model becomes a bundle: ``int4`` (edge) and ``fp32`` (cloud) for onnxruntime-genai.

Where it is wished also as a plain ONNX graph with a KV cache; see `cached_text`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs, to_builtins

from converters.awq.calibrate import round_scaled
from converters.recipe_file import fingerprint
from converters.recipes import cached_text
from converters.recipes.awq import Calibrator, calibrator, make_scaled, versions_of, with_modelopt
from converters.recipes.base import Workshop, summary
from converters.recipes.layers import Blame, blame_layers
from converters.recipes.slim import SLIM, Slimmed, sliced_model
from converters.reporting import Step
from converters.settings import Int4Settings
from converters.slim.corpus import generator_corpus
from converters.sources.base import Source
from converters.sources.gguf import GgufSource
from converters.sources.huggingface import open_huggingface, read_json
from converters.steps.apart import give_back, run_apart, run_apart_telling
from converters.steps.carry_gguf import can_carry, carry_blocks
from converters.steps.genai_build import CONFIG, PRECISIONS, build_genai
from converters.steps.gptq import carry_codes, choose_codes
from converters.steps.prepare_model import prepare_model, prepare_sliced
from converters.steps.verify_generation import (
    SlicedTruth,
    SourceLogits,
    first_call,
    verify_generation,
    windows,
)
from nearfar.bundle.manifest import EngineName, Manifest
from nearfar.errors import ConfigError, ConversionError
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
    ids = shop.variant_ids(*variants_of(is_slim=shop.settings.slim.is_wished))
    int4 = resolved(source, shop.settings.int4, is_sliced=shop.settings.slim.is_wished)
    versions = versions_of(ids, int4)
    is_cached = bool(versions) and shop.cache.has(
        "build-genai", _parts(source, "int4", int4, versions), tools=_TOOLS
    )
    awq = calibrator(versions, shop, is_cached=is_cached)
    folder = shop.work / "hf"
    with shop.reporter.step("load the source, and run it on real text") as step:
        model = prepare_model(source, folder)
        shop.evidence.full_bytes = 4 * model.parameters
        step.note(f"{model.kind}, {model.parameters / 1e6:.0f} M parameters")
    token_windows = windows(folder / "tokenizer.json", model.vocabulary_size)
    truth = model.truth(source.label)
    slimmed = _slimmed(shop, source, folder, token_windows)
    sliced = None if slimmed is None else _sliced_truth(shop, slimmed, token_windows)

    targets = {variant_id: shop.writer.folder / variant_id for variant_id in ids}
    for is_plain, library in ((False, "onnxruntime-genai"), (True, "plain ONNX Runtime")):
        own = {one: path for one, path in targets.items() if (one in cached_text.IDS) == is_plain}
        if not own:
            continue
        with shop.reporter.step(f"build {' and '.join(own)} for {library}") as step:
            if is_plain:
                said = cached_text.make_cached(source, folder, own, shop, is_large=model.is_large)
            else:
                said = _build(
                    source, folder, own, shop, int4, slimmed, awq, step, is_large=model.is_large
                )
            sizes = (f"{key} {format_bytes(_size(path))}" for key, path in own.items())
            step.note(", ".join(sizes) + said)
        give_back()
    judged = targets | cached_text.twins(targets, shop, is_large=model.is_large)
    quality = _verify(shop, judged, token_windows, truth, sliced, is_large=model.is_large)
    first, best = ids[0], next(f.value for f in quality[ids[0]] if f.metric == "perplexity")
    if sliced is not None and first != "fp32":
        first, best = "", sliced.whole_perplexity
    if SLIM in ids:
        ids = shop.accept_slim(ids, quality[SLIM], reference_perplexity=best)
    # Layers are compared with those of the graph that a variant was made of, where it is there.
    made_of = targets.get(SLIM) if sliced is not None else targets[first]
    ids = tuple(
        variant_id
        for variant_id in ids
        if variant_id in (first, SLIM)
        or shop.accept(
            variant_id,
            quality[variant_id],
            reference_perplexity=best,
            blame=_blame(shop, variant_id, made_of, judged[variant_id], token_windows),
        )
    )
    shop.check_any(ids)
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
        lineage=with_modelopt(shop.lineage(source, *tools), awq),
        context_length_tokens=context_length,
        variants=cached_text.finished(variants, shop, context_length),
    )


def variants_of(*, is_slim: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(variants that are made when nobody says, variants that can be made)."""
    return DEFAULT_VARIANTS, (*PRECISIONS, SLIM) if is_slim else POSSIBLE


def _slimmed(
    shop: Workshop, source: Source, folder: Path, token_windows: np.ndarray
) -> Slimmed | None:
    """The sliced model, where one is wished, made of the folder with the whole one's weights."""
    settings = shop.settings.slim
    if not settings.is_wished:
        return None
    tokenizer = folder / "tokenizer.json"
    return sliced_model(
        shop,
        open_huggingface(folder),
        source,
        lambda trained: generator_corpus(tokenizer, trained, settings),
        windows=token_windows,
    )


def _sliced_truth(shop: Workshop, slimmed: Slimmed, token_windows: np.ndarray) -> SlicedTruth:
    path = shop.work / f"{SLIM}-logits.npy"
    with shop.reporter.step("run the sliced model on real text"):
        prepare_sliced(slimmed.source, token_windows, path)
    perplexity = slimmed.facts.whole_perplexity
    assert perplexity is not None
    logits = SourceLogits(name="the sliced model", logits=np.load(path, mmap_mode="r"))
    return SlicedTruth(logits=logits, whole_perplexity=perplexity)


def _parts(
    source: Source,
    precision: str,
    int4: Int4Settings,
    versions: dict[str, str],
    sliced_digest: str = "",
) -> dict[str, object]:
    """What a folder of the model builder depends on."""
    parts: dict[str, object] = {"source": fingerprint(source), "precision": precision, "int4": ""}
    if precision == "int4":
        parts["int4"] = to_builtins(int4)
        if versions:
            parts["apart"] = versions
    if sliced_digest and precision != "fp32":
        parts[SLIM] = sliced_digest
    return parts


def _build(
    source: Source,
    folder: Path,
    targets: dict[str, Path],
    shop: Workshop,
    int4: Int4Settings,
    slimmed: Slimmed | None,
    awq: Calibrator | None,
    step: Step,
    *,
    is_large: bool,
) -> str:
    """Build what was not built before; see `build_genai` and `carry_blocks`.

    Returns:
        What there is to say about it.
    """
    said: list[str] = []
    sliced_digest = "" if slimmed is None else fingerprint(slimmed.source)

    def is_sliced(variant: str) -> bool:
        return slimmed is not None and variant != "fp32"

    def parts(precision: str) -> dict[str, object]:
        versions = awq.versions if awq else {}
        return _parts(source, precision, int4, versions, sliced_digest)

    def build_all(variants: dict[str, Path]) -> None:
        for sliced in (False, True):
            chosen = {
                "fp32" if variant == SLIM else variant: target
                for variant, target in variants.items()
                if is_sliced(variant) == sliced
            }
            if chosen:
                made_of = slimmed.source.path if slimmed is not None and sliced else folder
                build_genai(made_of, chosen, shop.work, int4.algorithm)

    def is_ours(precision: str) -> bool:
        return precision == "int4" and int4.algorithm in ("carry", "awq", "gptq")

    built = {
        precision: target
        for precision, target in targets.items()
        if not is_ours(precision)
        and not shop.cache.has("build-genai", parts(precision), tools=_TOOLS)
    }
    build_all(built)

    def output(precision: str, target: Path) -> None:
        ours = {"carry": carry, "awq": scale, "gptq": choose}
        make = partial(ours[int4.algorithm] if is_ours(precision) else build, precision)
        shop.cache.output("build-genai", parts(precision), target, make, tools=_TOOLS)

    def build(precision: str, target: Path) -> None:
        if built.get(precision) != target:  # an entry that turned out to be damaged, or `full`
            build_all({precision: target})

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
        else:
            said.append(make_scaled(awq, folder, target, int4, shop, step))

    def choose(_: str, target: Path) -> None:
        codes = shop.work / "codes.npz"
        if is_large:
            run_apart_telling(step.tell, choose_codes, folder, codes, int4.gptq)
        else:
            choose_codes(step.tell, folder, codes, int4.gptq)
        done = carry_codes(plain(), target, codes, int4)
        codes.unlink()
        said.append(f"codes of {done.carried} of {done.carried + done.rounded} matrices chosen")

    # Full precision comes first: blocks are carried into its graph.
    for precision, target in targets.items():
        output(precision, target)
    return "".join(f"; {line}" for line in said)


def resolved(source: Source, int4: Int4Settings, *, is_sliced: bool) -> Int4Settings:
    """The settings with ``auto`` decided.

    Raises:
        ConversionError: Blocks shall be carried over, and the source has none.
        ConfigError: They shall be carried into a sliced model, or AWQ shall scale one.
    """
    if is_sliced and int4.algorithm == "carry":
        raise ConfigError(
            "Blocks of a GGUF file cannot be carried into a sliced model, whose weights are others",
            field="int4.algorithm",
            fix="Use another algorithm, such as k_quant_mixed",
        )
    if is_sliced and int4.algorithm in ("awq", "gptq"):
        raise ConfigError(
            f"{int4.algorithm.upper()} does not look at texts with a sliced model",
            field="int4.algorithm",
            fix="Use another algorithm, such as k_quant_mixed, or do not slice (slim)",
        )
    has_blocks = not is_sliced and isinstance(source, GgufSource) and can_carry(source)
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
    sliced: SlicedTruth | None,
    *,
    is_large: bool,
) -> dict[str, Any]:
    with shop.reporter.step(f"verify on {token_windows.size} tokens of English text") as step:
        arguments = (targets, token_windows, truth, shop.settings.gates)
        quality = (
            run_apart(verify_generation, *arguments, sliced=sliced)
            if is_large
            else verify_generation(*arguments, sliced=sliced)
        )
        step.note("; ".join(f"{key}: {summary(found)}" for key, found in quality.items()))
    return quality


def _blame(
    shop: Workshop, variant_id: str, best: Path | None, folder: Path, token_windows: Any
) -> Blame | None:
    if best is None:
        return None

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
