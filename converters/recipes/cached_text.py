"""Language models as plain ONNX graphs with their KV cache as inputs and outputs: ``onnx-…``.

For devices that onnxruntime-genai has no package for, and for TensorRT, which takes ``onnx-fp32``
and ``onnx-fp16`` as they are written. ``onnx-int8`` and ``onnx-int4`` hold weights as blocks, in
operators of ONNX Runtime.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from msgspec import structs, to_builtins

from converters.recipe_file import fingerprint
from converters.recipes.base import Workshop
from converters.recipes.tensorrt import with_check
from converters.settings import Int4Settings
from converters.sources.base import Source
from converters.sources.gguf import GgufSource
from converters.steps.apart import run_apart
from converters.steps.carry_gguf import can_carry, carry_blocks
from converters.steps.export_cached import AXES, export_cached
from converters.steps.rounding_twin import write_twin
from converters.tensorrt.ranges import Three, load_model, profile_of
from nearfar.bundle.manifest import EngineName, ShapeRange, TensorrtPlan, Variant
from nearfar.engines.cached_graph import GRAPH, read_config

PREFIX = "onnx-"
IDS = ("onnx-fp32", "onnx-fp16", "onnx-int8", "onnx-int4")
ENGINE: EngineName = "onnxruntime"
TOOLS = ("onnx", "onnxruntime", "onnxscript", "torch", "transformers", "gguf")
#: The full-precision graph, that the others are made of.
_FULL = "onnx-fp32"
#: Rounded only where GPUs compute it.
_HALF = "onnx-fp16"
#: TensorRT's profile, where the recipe states none: tuned for one token after some hundred, and
#: good for pieces of a prompt, and for caches up to `_MOST_PAST`, or what the context leaves.
_ROWS: Three = (1, 1, 4)
_NEW: Three = (1, 1, 128)
_PAST: Three = (0, 255, 1920)


def make_cached(
    source: Source, folder: Path, targets: Mapping[str, Path], shop: Workshop, *, is_large: bool
) -> str:
    """Write the wished ``onnx-…`` variants.

    Args:
        source: What is converted; the blocks of a GGUF file are carried into ``onnx-int4``.
        folder: The same as a Hugging Face folder in FP32.
        targets: Id to the folder to write.
        shop: Where and how.
        is_large: Whether steps run in processes of their own.

    Returns:
        What there is to say about it.

    Raises:
        ConversionError: The model cannot be exported.
    """
    said: list[str] = []
    full = targets.get(_FULL, shop.work / _FULL)

    def output(variant_id: str, target: Path) -> None:
        int4 = shop.settings.int4 if variant_id == "onnx-int4" else Int4Settings()
        shop.cache.output(
            "export-cached",
            {"source": fingerprint(source), "id": variant_id, "int4": to_builtins(int4)},
            target,
            lambda path: make(variant_id, path),
            tools=TOOLS,
        )

    def make(variant_id: str, target: Path) -> None:
        precision = variant_id.removeprefix(PREFIX)
        if precision in ("fp32", "fp16"):
            if is_large:
                run_apart(export_cached, folder, target, precision=precision)
            else:
                export_cached(folder, target, precision=precision)
            return
        if not full.is_dir():
            output(_FULL, full)
        int4 = shop.settings.int4
        is_carried = precision == "int4" and int4.algorithm in ("auto", "carry")
        own = source if is_carried and isinstance(source, GgufSource) else None
        done = carry_blocks(
            full, target, own if own is not None and can_carry(own) else None, folder, int4,
            kind="Q4_1" if precision == "int4" else "Q8_0",
        )  # fmt: skip
        if done.carried:
            said.append(
                f"; {variant_id}: {done.carried} of {done.carried + done.rounded} matrices have "
                "the file's own blocks"
            )

    # Full precision comes first: the blocks go into its graph.
    for variant_id in sorted(targets, key=IDS.index):
        output(variant_id, targets[variant_id])
    return "".join(said)


def twins(targets: Mapping[str, Path], shop: Workshop, *, is_large: bool) -> dict[str, Path]:
    """Folders that variants are judged by which ONNX Runtime would not round as they are written.

    Args:
        targets: Id to folder.
        shop: Where and how.
        is_large: Whether steps run in processes of their own.
    """
    if _HALF not in targets:
        return {}
    folder = shop.work / f"{_HALF}-twin"
    graph = targets[_HALF] / GRAPH
    folder.mkdir()
    for file in targets[_HALF].iterdir():
        if not file.name.startswith(GRAPH):
            shutil.copyfile(file, folder / file.name)
    if is_large:
        run_apart(write_twin, graph, folder / GRAPH)
    else:
        write_twin(graph, folder / GRAPH)
    return {_HALF: folder}


def finished(
    variants: tuple[Variant, ...], shop: Workshop, context_tokens: int
) -> tuple[Variant, ...]:
    """With TensorRT's ranges of sizes, and its word where it was asked."""
    found = []
    for variant in variants:
        if variant.id in IDS:
            path = shop.writer.folder.joinpath(*variant.entry.split("/"))
            profile = cached_profile(path, shop.settings.tensorrt.axes, context_tokens)
            needs = variant.requirements
            if variant.id == _HALF:
                # On CPUs ONNX Runtime widens it to 32 bits: as much memory, and slower.
                needs = structs.replace(needs, execution_provider="CUDAExecutionProvider")
            variant = structs.replace(
                variant, requirements=needs, tensorrt=TensorrtPlan(profile=profile)
            )
            if shop.settings.tensorrt.check:
                variant = with_check(shop, variant, profile=profile)
        found.append(variant)
    return tuple(found)


def cached_profile(
    path: Path, stated: Mapping[str, Three], context_tokens: int
) -> tuple[ShapeRange, ...]:
    """Sizes that TensorRT engines of a graph cover: prompts in pieces, and token after token.

    Args:
        path: The graph.
        stated: Sizes by axis, as recipes state them; those that are not stated get defaults. The
            mask is as long as the past and what is new together, unless that is stated too.
        context_tokens: No more than these are ever in a cache.
    """
    rows, new, past, total = AXES
    axes: dict[str, Three] = {rows: _ROWS, new: _NEW}
    room = max(1, context_tokens - _NEW[2])
    axes[past] = (0, min(_PAST[1], room), min(_PAST[2], room))
    axes |= stated
    low, usual, high = (one + other for one, other in zip(axes[new], axes[past], strict=True))
    axes.setdefault(total, (low, usual, high))
    return profile_of(load_model(path, with_data=False), axes)


def entries_of(ids: tuple[str, ...]) -> dict[str, str]:
    """Id to what the engine opens; for onnxruntime-genai that is a folder."""
    return {one: f"{one}/{GRAPH}" if one in IDS else one for one in ids}


def context_length(folder: Path) -> int:
    """Prompt and answer together, as `export_cached` found out."""
    return read_config(folder).context_length_tokens
