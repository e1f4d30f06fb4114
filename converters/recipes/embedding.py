"""A sentence encoder becomes an ONNX Runtime bundle: ``int8`` (edge) and ``fp32`` (cloud)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from converters.cache import digest_of_arrays
from converters.own_texts import calibration_texts, judged_texts
from converters.recipe_file import fingerprint
from converters.recipes.base import Workshop, summary
from converters.recipes.fuse import fused
from converters.recipes.int8 import COMPRESSED, HALVES, make_half, make_int4, make_int8
from converters.recipes.layers import Blame, blame_layers, explained
from converters.recipes.slim import SLIM, Slimmed, sliced_model
from converters.recipes.tensorrt import IDS as TENSORRT_IDS
from converters.recipes.tensorrt import TensorrtVariants, joined
from converters.slim.corpus import encoder_corpus
from converters.sources.huggingface import HuggingFaceSource, load_huggingface
from converters.sources.onnx_file import io_specs
from converters.steps.export_encoder import (
    OUTPUT,
    Pooling,
    export_encoder,
    read_pooling,
    sentence_encoder,
)
from converters.steps.gate import UNFUSED, quality_drop
from converters.steps.optimise import slim
from converters.steps.reduce_embedding import Projection, fit, reduced_encoder, space_of
from converters.steps.tokenizer_file import write_tokenizer
from converters.steps.verify_embedding import EmbeddingCheck, check_short, may_mix
from converters.tensorrt.ranges import Bounds
from nearfar.bundle.manifest import (
    EngineName,
    LatencyFigure,
    Manifest,
    QualityFigure,
    TensorSpec,
    TextPreprocessing,
)

DEFAULT_VARIANTS = ("int8", "fp32")
#: Vectors of a sliced model are others than the whole one's, so they are not put side by side
#: unless somebody asks for it.
SLIM_VARIANTS = ("int8", SLIM)
_ENGINE: EngineName = "onnxruntime"
_TOKENIZER = "tokenizer.json"
_TOOLS = ("onnx", "onnxruntime", "onnxscript", "onnxslim", "torch", "transformers")


def build(source: HuggingFaceSource, name: str, shop: Workshop) -> Manifest:
    """Export, optimise, quantize, verify and measure a sentence encoder.

    Raises:
        ConversionError: A step refused or failed.
    """
    ids = shop.variant_ids(*variants_of(is_slim=shop.settings.slim.is_wished))
    pooling = read_pooling(source)
    with shop.reporter.step("read the tokenizer") as step:
        tokenizer = write_tokenizer(source.path, shop.writer.file(_TOKENIZER))
        step.note(f"{pooling.mode} pooling")

    @lru_cache(maxsize=1)
    def whole() -> Any:
        # Only where something is to be done with it: what is cached needs no model.
        with shop.reporter.step("load the source") as step:
            model = load_huggingface(source)
            step.note(type(model).__name__)
        return sentence_encoder(model, pooling)

    preprocessing = TextPreprocessing(
        tokenizer=_TOKENIZER, max_length_tokens=pooling.max_length_tokens, truncate=True
    )
    slimmed = _slimmed(shop, source, tokenizer, preprocessing, pooling)
    projection = None
    made_of: dict[str, object] = {"source": fingerprint(source)}
    if shop.settings.embedding.dimensions is not None:
        projection = _projection(shop, whole(), tokenizer, preprocessing)
        made_of["embedding"] = msgspec.to_builtins(shop.settings.embedding)

    def encoder() -> Any:
        return whole() if projection is None else reduced_encoder(whole(), projection, pooling)

    def narrow() -> Any:
        assert slimmed is not None
        found = sentence_encoder(load_huggingface(slimmed.source), pooling)
        return found if projection is None else reduced_encoder(found, projection, pooling)

    limit = pooling.max_length_tokens
    bounds = Bounds(most=limit)
    full = base = None
    if slimmed is None or "fp32" in ids:
        full = base = _full(shop, encoder, made_of, limit)
    if slimmed is not None:
        sliced = {**made_of, SLIM: fingerprint(slimmed.source)}
        base = _full(shop, narrow, sliced, limit, name=SLIM)
    assert base is not None
    count, limits = shop.settings.passages, shop.settings.gates
    passages = judged_texts(shop.options.samples, count)
    check = EmbeddingCheck(tokenizer, preprocessing, limits, passages)
    kept = shop.work / "source.npy"
    served = None if full is None else fused(shop, full, check.batches)
    parts = {**made_of, "passages": digest_of_arrays(check.batches)}
    with shop.reporter.step("run the source on real passages"):
        shop.cache.output(
            "source-vectors", parts, kept,
            lambda path: np.save(path, check.source_vectors(encoder())), tools=_TOOLS,
        )  # fmt: skip
        long = None if projection is None else check.source_vectors(whole())
    truth = np.load(kept)
    whole.cache_clear()

    reference = "fp32" if "fp32" in ids else source.label
    best, quality = truth, {}
    if served is not None:
        with shop.reporter.step(f"verify fp32 on {check.samples} passages") as step:
            best = check.vectors(served)
            quality["fp32"] = check.against_source(best, truth, source.label)
            if long is not None:
                quality["fp32"] += check.against_long(best, long, source.label)
            step.note(summary(quality["fp32"]))
    if long is not None:
        check_short(check.against_long(best, long, source.label), limits.max_quality_drop)
    far = None if long is None else (long, source.label)
    sliced_vectors = None
    if slimmed is None:
        assert full is not None
        shop.evidence.full_bytes = full.stat().st_size
    else:
        shop.evidence.full_bytes = 4 * slimmed.facts.parameters_before
        with shop.reporter.step(f"verify {SLIM} on {check.samples} passages") as step:
            sliced_vectors = check.vectors(base)
            check.against_source(sliced_vectors, check.source_vectors(narrow()), SLIM)
            quality[SLIM] = check.against_reference(sliced_vectors, best, reference)
            if far is not None:
                quality[SLIM] += check.against_long(sliced_vectors, *far)
            step.note(summary(quality[SLIM]))
        ids = shop.accept_slim(ids, quality[SLIM])
    compiled = TensorrtVariants(shop, base, ids, sample=check.example, bounds=bounds)
    ids = tuple(variant_id for variant_id in ids if variant_id not in compiled.ids)

    def truth_of(trial: EmbeddingCheck) -> np.ndarray:
        """What variants are held against, on other texts."""
        if full is not None:
            return trial.vectors(full)
        vectors = trial.source_vectors(encoder())
        whole.cache_clear()
        return vectors

    for one in [one for one in COMPRESSED if one in ids]:
        is_fused = one in HALVES and slimmed is None and served is not None
        made_from = served if is_fused and served is not None else base
        quality[one] = compress(
            shop, one, made_from, best, check, tokenizer, preprocessing, reference, long=far,
            truth_of=truth_of,
        )  # fmt: skip
        blame = blame_compressed(shop, one, made_from, tokenizer, preprocessing)
        if not shop.accept(one, quality[one], blame=blame):
            ids = tuple(variant_id for variant_id in ids if variant_id != one)
    if compiled.ids:
        trial_texts = calibration_texts(shop.options.samples, count)
        trial = EmbeddingCheck(tokenizer, preprocessing, limits, trial_texts)
        judge = _judge(trial, truth_of, as_written=True)
        elsewhere = compiled.make(trial.batches, judge)
        with shop.reporter.step(f"verify for TensorRT on {check.samples} passages") as step:
            judged = compiled.judged(
                elsewhere,
                lambda _, path: check.against_reference(
                    check.vectors(path, is_unfused=True), best, reference
                ),
            )
            quality.update(judged)
            step.note("; ".join(f"{one}: {summary(found)}" for one, found in judged.items()))
    if served is not None and "fp32" in ids:
        shop.writer.add(served, "fp32/model.onnx")
    if slimmed is not None and SLIM in ids:
        shop.writer.add(base, f"{SLIM}/model.onnx")

    entries = {variant_id: f"{variant_id}/model.onnx" for variant_id in ids}
    ids, latency = measured(shop, ids, quality, check) if ids else ((), {})
    variants = joined(
        shop,
        shop.variants(ids, engine=_ENGINE, entries=entries, quality=quality, latency=latency),
        compiled,
        quality,
        sample=check.example,
        bounds=bounds,
    )
    shop.check_any([variant.id for variant in variants])
    inputs, outputs = io_specs(base)
    made = tuple(variant.id for variant in variants)
    is_sliced = slimmed is not None and set(made) != {"fp32"}
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
        mixed_routes=_mixed(made, quality)
        if sliced_vectors is None or "fp32" in made
        else _mixed_sliced(shop, made, check, sliced_vectors),
        space=space_of(
            fingerprint(slimmed.source if slimmed is not None and is_sliced else source),
            pooling,
            projection,
        ),
        variants=variants,
    )


def variants_of(*, is_slim: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(variants that are made when nobody says, variants that can be made)."""
    possible = (*COMPRESSED, "fp32", *TENSORRT_IDS)
    return (SLIM_VARIANTS, (*possible, SLIM)) if is_slim else (DEFAULT_VARIANTS, possible)


def _slimmed(
    shop: Workshop,
    source: HuggingFaceSource,
    tokenizer: Path,
    preprocessing: TextPreprocessing,
    pooling: Pooling,
) -> Slimmed | None:
    """The sliced model, where one is wished."""
    settings = shop.settings.slim
    if not settings.is_wished:
        return None
    return sliced_model(
        shop,
        source,
        source,
        lambda trained: encoder_corpus(tokenizer, preprocessing, trained, settings),
        pooling=pooling,
    )


def _projection(
    shop: Workshop, encoder: Any, tokenizer: Path, preprocessing: TextPreprocessing
) -> Projection:
    """How vectors become shorter, found on texts that nothing is judged on."""
    settings = shop.settings.embedding
    with shop.reporter.step(f"shorten vectors to {settings.dimensions} numbers") as step:
        passages = calibration_texts(shop.options.samples, settings.passages)
        check = EmbeddingCheck(tokenizer, preprocessing, shop.settings.gates, passages)
        found = fit(settings, check.source_vectors(encoder))
        step.note(f"{settings.method} keeps {found.kept:.1%} of their squared length")
    return found


def compress(
    shop: Workshop,
    variant_id: str,
    full: Path,
    best: np.ndarray,
    check: EmbeddingCheck,
    tokenizer: Path,
    preprocessing: TextPreprocessing,
    reference: str,
    *,
    long: tuple[np.ndarray, str] | None = None,
    truth_of: Callable[[EmbeddingCheck], np.ndarray] | None = None,
) -> tuple[QualityFigure, ...]:
    """Make ``int8/model.onnx``, or another of `COMPRESSED`, and compare it.

    Args:
        shop: Where and how.
        variant_id: Which.
        full: FP32 model.
        best: Its vectors of the passages of `check`.
        check: What the variant is judged on.
        tokenizer, preprocessing: How texts become inputs.
        reference: What `best` is called.
        long: Whole vectors of the source, and its name, where these are shorter.
        truth_of: What a search is held against; `None` is `full`.

    Raises:
        ConversionError: It cannot be made, or is not the same model.
    """
    count = shop.settings.passages
    path = shop.writer.file(f"{variant_id}/model.onnx")
    if variant_id in HALVES:
        make_half(shop, full, path, variant_id)
    else:
        trial = EmbeddingCheck(
            tokenizer,
            preprocessing,
            shop.settings.gates,
            calibration_texts(shop.options.samples, count),
        )
        make = make_int4 if variant_id == "int4" else make_int8
        make(
            shop,
            full,
            path,
            calibration=trial.batches,
            judge=_judge(trial, truth_of or (lambda one: one.vectors(full))),
        )
    has_kernels = variant_id == "int8" and shop.settings.int8.method != "weights"
    with shop.reporter.step(f"verify {variant_id} on {check.samples} passages") as step:
        # The model is judged on the graph as it is written, where a CPU's kernels may saturate.
        blame = blame_compressed(shop, variant_id, full, tokenizer, preprocessing)
        with explained(variant_id, blame):
            found = check.against_reference(
                check.vectors(path), best, reference, is_gated=not has_kernels
            )
        if has_kernels:
            vectors = check.vectors(path, is_unfused=True)
            found += check.against_reference(vectors, best, reference, suffix=UNFUSED)
        if long is not None:
            found += check.against_long(check.vectors(path), *long)
        step.note(summary(found))
    return found


def blame_compressed(
    shop: Workshop,
    variant_id: str,
    full: Path,
    tokenizer: Path,
    preprocessing: TextPreprocessing,
) -> Blame:
    """Finds the layers where a variant errs, on single texts that it is not judged on."""

    def feeds() -> list[dict[str, np.ndarray]]:
        passages = calibration_texts(shop.options.samples, shop.settings.passages)
        check = EmbeddingCheck(tokenizer, preprocessing, shop.settings.gates, passages)
        return [{name: rows[:1] for name, rows in batch.items()} for batch in check.batches]

    path = shop.writer.file(f"{variant_id}/model.onnx")
    return partial(blame_layers, shop, variant_id, full, path, feeds)


def measured(
    shop: Workshop,
    ids: tuple[str, ...],
    quality: dict[str, tuple[QualityFigure, ...]],
    check: EmbeddingCheck,
) -> tuple[tuple[str, ...], dict[str, tuple[LatencyFigure, int]]]:
    """See `Workshop.measured`; the input is one text of middling length."""
    entries = {variant_id: f"{variant_id}/model.onnx" for variant_id in ids}
    tokens = int(check.example["input_ids"].size)
    return shop.measured(ids, _ENGINE, entries, quality, feeds=check.example, input_tokens=tokens)


def _full(
    shop: Workshop,
    encoder: Callable[[], Any],
    made_of: dict[str, object],
    max_length_tokens: int,
    *,
    name: str = "fp32",
) -> Path:
    """The model in full precision, exported and optimised."""
    exported, full = shop.work / f"exported-{name}.onnx", shop.work / f"{name}.onnx"
    with shop.reporter.step("export to ONNX" if name == "fp32" else f"export {name} to ONNX"):
        shop.cache.output(
            "export-encoder", made_of, exported,
            lambda path: export_encoder(encoder(), path, max_length_tokens=max_length_tokens),
            tools=_TOOLS,
        )  # fmt: skip
    with shop.reporter.step("optimise the graph") as step:
        if not shop.cache.output(
            "optimise-encoder", made_of, full, lambda path: slim(exported, path), tools=_TOOLS
        ):
            step.note("left as it is")
            return exported
    return full


def _judge(
    check: EmbeddingCheck,
    truth_of: Callable[[EmbeddingCheck], np.ndarray],
    *,
    as_written: bool = False,
) -> Callable[[Path], float]:
    """Share of neighbours that a file loses; the reference runs once, and only if it is asked."""

    @lru_cache(maxsize=1)
    def best() -> np.ndarray:
        return truth_of(check)

    def drop(path: Path) -> float:
        found = quality_drop(
            check.against_reference(check.vectors(path, is_unfused=as_written), best(), "fp32")
        )
        assert found is not None
        return found[1]

    return drop


def _mixed(ids: tuple[str, ...], quality: dict[str, tuple[QualityFigure, ...]]) -> bool:
    return len(ids) == 1 or may_mix([quality[variant_id] for variant_id in ids])


def _mixed_sliced(
    shop: Workshop, ids: tuple[str, ...], check: EmbeddingCheck, sliced: np.ndarray
) -> bool:
    """Whether variants of a sliced model agree with each other; the whole one is not there."""
    others = [one for one in ids if one != SLIM] if len(ids) > 1 else []
    return may_mix([
        check.against_reference(
            check.vectors(shop.writer.folder / one / "model.onnx"), sliced, SLIM, is_gated=False
        )
        for one in others
    ])  # fmt: skip


def _with_width(spec: TensorSpec, width: int) -> TensorSpec:
    # Quantizing can lose the static width; it is known from having run the model.
    return TensorSpec(name=spec.name, datatype=spec.datatype, shape=(-1, width))
