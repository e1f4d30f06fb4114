"""A bundle becomes a larger bundle: what it has stays, and variants of its FP32 one are added."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec

from converters.own_texts import judged_texts
from converters.recipes import embedding, onnx_model
from converters.recipes.base import Workshop
from converters.recipes.int8 import COMPRESSED
from converters.sources.bundle import BundleSource
from converters.sources.onnx_file import OnnxSource, open_onnx
from converters.steps.verify_embedding import EmbeddingCheck, may_mix
from nearfar.bundle.manifest import Manifest, TextPreprocessing, Variant
from nearfar.errors import ConversionError

#: What can be made of an FP32 variant.
POSSIBLE = COMPRESSED
#: Of `ConversionOptions`: nobody said otherwise, so the bundle keeps its own.
_UNSTATED_VERSION = "1.0.0"
_ORDER = ("fp32", "fp16", "bf16", "int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class FullVariant(OnnxSource):
    """The FP32 variant of a bundle.

    Attributes:
        variant_id: How figures call it.
    """

    variant_id: str

    @property
    def label(self) -> str:
        return self.variant_id


def build(source: BundleSource, name: str, shop: Workshop) -> Manifest:
    """Copy what is there, and make, verify and measure what is wished.

    Raises:
        ConversionError: Nothing is wished, or what cannot be made; a step refused or failed.
        BundleError: A file of the bundle is not what its manifest says.
    """
    old = source.bundle.manifest
    if not shop.options.variants:
        raise ConversionError(
            f"It is not said what shall be added to {source.path}",
            fix=f"Name it with --variants; possible are: {', '.join(POSSIBLE)}",
        )
    wished = shop.variant_ids((), POSSIBLE)
    stay = tuple(variant for variant in old.variants if variant.id not in wished)
    with shop.reporter.step(f"take {', '.join(one.id for one in stay)} over") as step:
        source.bundle.verify()
        golden = {old.golden.inputs, old.golden.outputs} if old.golden else set()
        entries = [entry for entry in old.files if entry.path not in golden]
        for entry in [*entries, *(entry for variant in stay for entry in variant.files)]:
            shop.writer.add(source.path / entry.path, entry.path)
        step.note(f"{source.bundle.size_bytes() / 2**20:.1f} MiB checked")
    made = (
        _embedding(source, shop, wished)
        if old.task == "embedding"
        else _tensors(source, name, shop, wished)
    )
    return _merged(source, name, shop, stay, made)


def _tensors(
    source: BundleSource, name: str, shop: Workshop, wished: tuple[str, ...]
) -> tuple[Variant, ...]:
    old = source.bundle.manifest
    folder = shop.work / "bundle"
    root = source.full.entry.rpartition("/")[0]
    for entry in source.full.files:
        target = folder / entry.path[len(root) + 1 :]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / entry.path, target)
    opened = open_onnx(folder / Path(source.full.entry).name)
    values = {field.name: getattr(opened, field.name) for field in fields(OnnxSource)}
    # As the bundle says it: a graph alone does not know which output has the scores.
    meaning = onnx_model.Meaning(
        task=old.task,
        labels=old.labels,
        label_output=old.label_output,
        preprocessing=old.preprocessing,
        multi_label=old.multi_label,
    )
    full = FullVariant(**{**values, "variant_id": source.full.id})
    return onnx_model.build(full, name, shop, meaning=meaning).variants


def _embedding(
    source: BundleSource, shop: Workshop, wished: tuple[str, ...]
) -> tuple[Variant, ...]:
    spec = source.bundle.manifest.preprocessing
    assert isinstance(spec, TextPreprocessing)
    full = source.path / source.full.entry
    tokenizer = source.path / spec.tokenizer
    shop.evidence.full_bytes = full.stat().st_size
    passages = judged_texts(shop.options.samples, shop.settings.passages)
    check = EmbeddingCheck(tokenizer, spec, shop.settings.gates, passages)
    with shop.reporter.step(f"run {source.full.id} on {check.samples} passages"):
        best = check.vectors(full)
    quality, ids = {}, []
    for one in wished:
        quality[one] = embedding.compress(
            shop, one, full, best, check, tokenizer, spec, source.full.id
        )
        blame = embedding.blame_compressed(shop, one, full, tokenizer, spec)
        if shop.accept(one, quality[one], blame=blame):
            ids.append(one)
    shop.check_any(ids)
    kept, latency = embedding.measured(shop, tuple(ids), quality, check)
    return shop.variants(
        kept,
        engine="onnxruntime",
        entries={one: f"{one}/model.onnx" for one in kept},
        quality=quality,
        latency=latency,
    )


def _merged(
    source: BundleSource,
    name: str,
    shop: Workshop,
    stay: tuple[Variant, ...],
    made: tuple[Variant, ...],
) -> Manifest:
    old = source.bundle.manifest
    placed = [msgspec.structs.replace(one, placement=("edge", "cloud")) for one in made]
    ranked = sorted([*stay, *placed], key=_rank)
    variants = tuple(
        msgspec.structs.replace(one, quality_rank=rank) for rank, one in enumerate(ranked)
    )
    tools = shop.lineage(source, "onnx", "onnxruntime").tools
    lineage = msgspec.structs.replace(old.lineage, tools={**old.lineage.tools, **tools})
    options = shop.options
    stated = options.version
    return msgspec.structs.replace(
        old,
        name=name,
        version=stated if stated != _UNSTATED_VERSION else old.version,
        description=options.description or old.description,
        license=options.license or old.license,
        lineage=lineage,
        files=(),
        golden=None,
        variants=variants,
        mixed_routes=old.mixed_routes and may_mix([one.quality for one in made]),
    )


def _rank(variant: Variant) -> tuple[int, int]:
    """Full precision first; what nearfar does not know by its precision keeps its place."""
    known = variant.precision in _ORDER
    return (_ORDER.index(variant.precision) if known else len(_ORDER), variant.quality_rank)
