"""A language model becomes an onnxruntime-genai bundle: ``int4`` (edge) and ``fp32`` (cloud)."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import structs, to_builtins

from converters.recipe_file import fingerprint
from converters.recipes.base import Workshop, summary
from converters.settings import Int4Settings
from converters.sources.base import Source
from converters.sources.gguf import GgufSource, load_gguf
from converters.sources.huggingface import (
    HuggingFaceSource,
    load_huggingface,
    load_tokenizer,
    read_json,
)
from converters.steps.carry_gguf import can_carry, carry_blocks
from converters.steps.genai_build import PRECISIONS, build_genai
from converters.steps.verify_generation import (
    SourceLogits,
    source_logits,
    verify_generation,
    windows,
)
from nearfar.bundle.manifest import EngineName, LatencyFigure, Manifest
from nearfar.errors import ConversionError
from nearfar.units import format_bytes

DEFAULT_VARIANTS = ("int4", "fp32")
_ENGINE: EngineName = "onnxruntime-genai"
_TOOLS = ("onnxruntime", "onnxruntime-genai", "torch", "transformers", "gguf")
#: What the model builder does to matrices that are not carried over; the last one, which is also
#: the embedding, has 8 bits then, as it has in most GGUF files.
_BASE = "k_quant_last"
#: A prompt of usual length for timing the first token.
_TIMED_PROMPT_TOKENS = 64


def build(source: Source, name: str, shop: Workshop) -> Manifest:
    """Export, quantize, verify and measure a language model.

    Raises:
        ConversionError: A step refused or failed.
    """
    ids = shop.variant_ids(DEFAULT_VARIANTS, PRECISIONS)
    with shop.reporter.step("load the source") as step:
        model, tokenizer = _load(source)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        step.note(f"{type(model).__name__}, {parameters / 1e6:.0f} M parameters")
    folder = shop.work / "hf"
    with shop.reporter.step("write safetensors"):
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    with shop.reporter.step("run the source on real text"):
        token_windows = windows(folder / "tokenizer.json", int(model.config.vocab_size))
        truth = source_logits(model, token_windows, source.label)
    # The builder's processes need the memory.
    del model, tokenizer
    gc.collect()

    targets = {variant_id: shop.writer.folder / variant_id for variant_id in ids}
    with shop.reporter.step(f"build {' and '.join(ids)} for onnxruntime-genai") as step:
        said = _build(source, folder, targets, shop)
        sizes = (f"{key} {format_bytes(_size(path))}" for key, path in targets.items())
        step.note(", ".join(sizes) + said)
    quality = _verify(shop, targets, token_windows, truth)
    best = next(f.value for f in quality[ids[0]] if f.metric == "perplexity")
    ids = tuple(
        variant_id
        for variant_id in ids
        if variant_id == ids[0]
        or shop.accept(variant_id, quality[variant_id], reference_perplexity=best)
    )
    latency: dict[str, tuple[LatencyFigure, int]] = {}
    if shop.options.measure:
        prompt = token_windows.ravel()[:_TIMED_PROMPT_TOKENS].tolist()
        for variant_id in ids:
            latency[variant_id] = shop.measure(
                variant_id, _ENGINE, variant_id, prompt_tokens=prompt
            )
    return Manifest(
        name=name,
        version=shop.options.version,
        task="text-generation",
        description=shop.options.description,
        license=shop.options.license or source.license,
        lineage=shop.lineage(source, *_TOOLS),
        context_length_tokens=_context_length(targets[ids[0]]),
        variants=shop.variants(
            ids,
            engine=_ENGINE,
            entries={variant_id: variant_id for variant_id in ids},
            quality=quality,
            latency=latency,
        ),
    )


def _load(source: Source) -> tuple[Any, Any]:
    if isinstance(source, GgufSource):
        return load_gguf(source)
    assert isinstance(source, HuggingFaceSource)
    return load_huggingface(source), load_tokenizer(source.path)


def _build(source: Source, folder: Path, targets: dict[str, Path], shop: Workshop) -> str:
    """Build what was not built before, side by side; see `build_genai`.

    Returns:
        What there is to say about it.
    """
    int4 = _resolved(source, shop.settings.int4)
    said: list[str] = []

    def parts(precision: str) -> dict[str, object]:
        settings = to_builtins(int4) if precision == "int4" else ""
        return {"source": fingerprint(source), "precision": precision, "int4": settings}

    def built(wished: dict[str, Path]) -> None:
        algorithm = _BASE if int4.algorithm == "carry" else int4.algorithm
        build_genai(folder, wished, shop.work, algorithm)
        if "int4" in wished and int4.algorithm == "carry":
            assert isinstance(source, GgufSource)
            done = carry_blocks(
                wished["int4"], source, folder,
                minima=int4.exact_minima, digits=int4.minima_digits,
            )  # fmt: skip
            said.append(
                f"{done.nodes} of {done.nodes + done.left} matrices have the file's own blocks"
            )

    missing = {
        precision: target
        for precision, target in targets.items()
        if not shop.cache.has("build-genai", parts(precision), tools=_TOOLS)
    }
    if missing:
        built(missing)

    def make(precision: str, target: Path) -> None:
        if precision not in missing:  # an entry that turned out to be damaged
            built({precision: target})

    for precision, target in targets.items():
        shop.cache.output(
            "build-genai",
            parts(precision),
            target,
            partial(make, precision),
            tools=_TOOLS,
        )
    return "".join(f"; {line}" for line in said)


def _resolved(source: Source, int4: Int4Settings) -> Int4Settings:
    """The settings with ``auto`` decided.

    Raises:
        ConversionError: Blocks shall be carried over, and the source has none.
    """
    has_blocks = isinstance(source, GgufSource) and can_carry(source)
    if int4.algorithm == "carry" and not has_blocks:
        raise ConversionError(
            f"{source.path} has no blocks of 4 bits that could be carried over (Q4_0, Q4_1)",
            fix="Use another algorithm (int4.algorithm), such as k_quant_mixed",
        )
    if int4.algorithm != "auto":
        return int4
    return structs.replace(int4, algorithm="carry" if has_blocks else "k_quant_mixed")


def _verify(
    shop: Workshop, targets: dict[str, Path], token_windows: Any, truth: SourceLogits
) -> dict[str, Any]:
    with shop.reporter.step(f"verify on {token_windows.size} tokens of English text") as step:
        quality = verify_generation(targets, token_windows, truth, shop.settings.gates)
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
