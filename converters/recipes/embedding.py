"""A sentence encoder becomes an ONNX Runtime bundle: ``int8`` (edge) and ``fp32`` (cloud)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from converters import texts
from converters.recipes.base import Workshop, summary
from converters.recipes.int8 import make_int8
from converters.recipes.tensorrt import IDS as TENSORRT_IDS
from converters.recipes.tensorrt import TensorrtVariants, joined
from converters.sources.huggingface import HuggingFaceSource, load_huggingface, load_tokenizer
from converters.sources.onnx_file import io_specs
from converters.steps.export_encoder import (
    OUTPUT,
    export_encoder,
    read_pooling,
    sentence_encoder,
)
from converters.steps.gate import UNFUSED, quality_drop
from converters.steps.optimise import slim
from converters.steps.verify_embedding import EmbeddingCheck, may_mix
from nearfar.bundle.manifest import (
    EngineName,
    LatencyFigure,
    Manifest,
    QualityFigure,
    TensorSpec,
    TextPreprocessing,
)

DEFAULT_VARIANTS = ("int8", "fp32")
_ENGINE: EngineName = "onnxruntime"
_TOKENIZER = "tokenizer.json"
_TOOLS = ("onnx", "onnxruntime", "onnxscript", "onnxslim", "torch", "transformers")


def build(source: HuggingFaceSource, name: str, shop: Workshop) -> Manifest:
    """Export, optimise, quantize, verify and measure a sentence encoder.

    Raises:
        ConversionError: A step refused or failed.
    """
    ids = shop.variant_ids(DEFAULT_VARIANTS, ("int8", "fp32", *TENSORRT_IDS))
    pooling = read_pooling(source)
    with shop.reporter.step("load the source") as step:
        model = load_huggingface(source)
        tokenizer = _write_tokenizer(source, shop.writer.file(_TOKENIZER))
        step.note(f"{type(model).__name__}, {pooling.mode} pooling")
    encoder = sentence_encoder(model, pooling)
    preprocessing = TextPreprocessing(
        tokenizer=_TOKENIZER, max_length_tokens=pooling.max_length_tokens, truncate=True
    )
    exported = shop.work / "exported.onnx"
    with shop.reporter.step("export to ONNX"):
        export_encoder(encoder, exported, max_length_tokens=pooling.max_length_tokens)
    full = shop.work / "fp32.onnx"
    with shop.reporter.step("optimise the graph") as step:
        if not slim(exported, full):
            step.note("left as it is")
            full = exported
    count, limits = shop.settings.passages, shop.settings.gates
    check = EmbeddingCheck(tokenizer, preprocessing, limits, texts.passages(count))
    with shop.reporter.step("run the source on real passages"):
        truth = check.source_vectors(encoder)
    del encoder, model

    with shop.reporter.step(f"verify fp32 on {check.samples} passages") as step:
        best = check.vectors(full)
        quality = {"fp32": check.against_source(best, truth, source.label)}
        step.note(summary(quality["fp32"]))
    limit = pooling.max_length_tokens
    compiled = TensorrtVariants(shop, full, ids, sample=check.example, limit=limit)
    ids = tuple(variant_id for variant_id in ids if variant_id not in compiled.ids)
    if "int8" in ids:
        path = shop.writer.file("int8/model.onnx")
        trial = EmbeddingCheck(tokenizer, preprocessing, limits, texts.calibration_passages(count))
        make_int8(shop, full, path, calibration=trial.batches, judge=_judge(trial, full))
        with shop.reporter.step(f"verify int8 on {check.samples} passages") as step:
            reference = "fp32" if "fp32" in ids else source.label
            found = check.against_reference(check.vectors(path), best, reference)
            if shop.settings.int8.method == "static":
                vectors = check.vectors(path, is_unfused=True)
                found += check.against_reference(vectors, best, reference, suffix=UNFUSED)
            quality["int8"] = found
            step.note(summary(found))
        if not shop.accept("int8", quality["int8"]):
            ids = tuple(variant_id for variant_id in ids if variant_id != "int8")
    if compiled.ids:
        trial = EmbeddingCheck(tokenizer, preprocessing, limits, texts.calibration_passages(count))
        judge = _judge(trial, full, as_written=True)
        elsewhere = compiled.make(trial.batches, judge)
        reference = "fp32" if "fp32" in ids else source.label
        with shop.reporter.step(f"verify for TensorRT on {check.samples} passages") as step:
            judged = compiled.judged(
                elsewhere,
                lambda _, path: check.against_reference(
                    check.vectors(path, is_unfused=True), best, reference
                ),
            )
            quality.update(judged)
            step.note("; ".join(f"{one}: {summary(found)}" for one, found in judged.items()))
    if "fp32" in ids:
        shop.writer.add(full, "fp32/model.onnx")

    entries = {variant_id: f"{variant_id}/model.onnx" for variant_id in ids}
    latency: dict[str, tuple[LatencyFigure, int]] = {}
    if shop.options.measure:
        tokens = int(check.example["input_ids"].size)
        for variant_id in ids:
            latency[variant_id] = shop.measure(
                variant_id, _ENGINE, entries[variant_id], feeds=check.example, input_tokens=tokens
            )
    variants = joined(
        shop,
        shop.variants(ids, engine=_ENGINE, entries=entries, quality=quality, latency=latency),
        compiled,
        quality,
        sample=check.example,
        limit=limit,
    )
    shop.check_any([variant.id for variant in variants])
    inputs, outputs = io_specs(full)
    return Manifest(
        name=name,
        version=shop.options.version,
        task="embedding",
        description=shop.options.description,
        license=shop.options.license or source.license,
        lineage=shop.lineage(source, *_TOOLS),
        inputs=inputs,
        outputs=tuple(_with_width(spec, best.shape[1]) for spec in outputs),
        preprocessing=preprocessing,
        embedding_output=OUTPUT,
        mixed_routes=_mixed(tuple(variant.id for variant in variants), quality),
        variants=variants,
    )


def _judge(
    check: EmbeddingCheck, full: Path, *, as_written: bool = False
) -> Callable[[Path], float]:
    """Share of neighbours that a file loses; the reference runs once, and only if it is asked."""

    @lru_cache(maxsize=1)
    def best() -> np.ndarray:
        return check.vectors(full)

    def drop(path: Path) -> float:
        found = quality_drop(
            check.against_reference(check.vectors(path, is_unfused=as_written), best(), "fp32")
        )
        assert found is not None
        return found[1]

    return drop


def _mixed(ids: tuple[str, ...], quality: dict[str, tuple[QualityFigure, ...]]) -> bool:
    return len(ids) == 1 or may_mix([quality[variant_id] for variant_id in ids])


def _with_width(spec: TensorSpec, width: int) -> TensorSpec:
    # Quantizing can lose the static width; it is known from having run the model.
    return TensorSpec(name=spec.name, datatype=spec.datatype, shape=(-1, width))


def _write_tokenizer(source: HuggingFaceSource, target: Path) -> Path:
    """``tokenizer.json`` without its own lengths: the manifest says where texts are cut."""
    tokenizer = load_tokenizer(source.path).backend_tokenizer
    padding = tokenizer.padding or {}
    tokenizer.no_truncation()
    tokenizer.no_padding()
    kept = {key: padding[key] for key in ("pad_id", "pad_token", "pad_type_id") if key in padding}
    if kept:
        tokenizer.enable_padding(**kept)
    tokenizer.save(str(target), pretty=False)
    return target
