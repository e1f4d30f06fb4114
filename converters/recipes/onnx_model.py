"""An ONNX file becomes an ONNX Runtime bundle: a classifier with labels, or plain tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from msgspec import to_builtins

from converters.cache import digest_of_arrays, digest_of_path
from converters.own_texts import read_texts
from converters.recipe_file import fingerprint
from converters.recipes.base import Workshop, summary
from converters.recipes.fuse import fused
from converters.recipes.int8 import COMPRESSED, HALVES, make_half, make_int4, make_int8
from converters.recipes.layers import Blame, blame_layers, explained
from converters.recipes.tensorrt import IDS as TENSORRT_IDS
from converters.recipes.tensorrt import TensorrtVariants, joined
from converters.sources.huggingface import read_json
from converters.sources.onnx_file import OnnxSource
from converters.steps.gate import quality_drop
from converters.steps.optimise import slim
from converters.steps.raw_samples import raw_samples
from converters.steps.verify_stream import (
    known_stream,
    recordings,
    split_windows,
    stream_agreement,
    windows_of,
)
from converters.steps.verify_tensors import (
    LABELS,
    Feeds,
    file_samples,
    stored_samples,
    synthetic_samples,
    verify_tensors,
)
from converters.tensorrt.ranges import bounds_of
from nearfar.bundle.checks import stream_problems
from nearfar.bundle.manifest import (
    AudioPreprocessing,
    EngineName,
    HeadTailPreprocessing,
    ImagePreprocessing,
    Manifest,
    Preprocessing,
    QualityFigure,
    StreamPreprocessing,
    Task,
    TensorSpec,
    TextPreprocessing,
)
from nearfar.errors import ConversionError

_ENGINE: EngineName = "onnxruntime"
_TOOLS = ("onnx", "onnxruntime", "onnxslim")
#: How magika's published models describe their input and output, beside the model.
_MAGIKA_CONFIG = "config.min.json"
_SYNTHETIC = "synthetic inputs (real ones: --samples)"
#: An optimised graph may name more shapes than its source, and be a little larger.
_MAX_GROWTH = 1.1
#: Fewer samples are all used for both, calibration and verification.
_LEAST_TO_SPLIT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What goes into a model and what its outputs mean."""

    task: Task
    labels: tuple[str, ...] = ()
    label_output: str | None = None
    preprocessing: Preprocessing | None = None
    multi_label: bool = False


def build(
    source: OnnxSource,
    name: str,
    shop: Workshop,
    *,
    examples: Sequence[Feeds] = (),
    tools: Sequence[str] = (),
    pruned: OnnxSource | None = None,
    meaning: Meaning | None = None,
    default: Sequence[str] = (),
    narrow_id: str = "pruned",
) -> Manifest:
    """Optimise, quantize if wished, verify and measure an ONNX model.

    Args:
        source: The model.
        name: The bundle's.
        shop: Where and how.
        examples: Inputs to verify with where no samples were given.
        tools: Packages that made the model, for the lineage.
        pruned: The model made narrower: what the variants `narrow_id` and ``int8`` are made of.
            All are compared with `source`.
        meaning: What goes in and comes out, where the source says so; `None` finds it out.
        default: Variants that are made when nobody says; none: those of `variants_of`.
        narrow_id: Id of the narrower model in full precision.

    Raises:
        ConversionError: A step refused or failed.
    """
    own = source.precision
    shop.evidence.full_bytes = source.full_bytes
    usual, possible = variants_of(own, narrow=narrow_id if pruned is not None else "")
    ids = shop.variant_ids(default or usual, possible)
    meaning = meaning or _meaning(source, shop)
    samples, kind = _samples(source, meaning, shop, examples)
    first = _bare(source, samples[:1])[0]
    full = _optimised(source, samples, shop)
    narrow = _optimised(pruned, samples, shop) if pruned is not None else None
    base = (narrow or pruned.path) if pruned is not None else (full or source.path)
    shapes = {key: array.shape for key, array in first.items()}
    bounds = bounds_of(meaning.preprocessing, shapes)
    compiled = TensorrtVariants(shop, base, ids, sample=first, bounds=bounds)
    ids = tuple(i for i in ids if i not in compiled.ids)
    entries = {variant_id: f"{variant_id}/model.onnx" for variant_id in ids}
    paths = {variant_id: shop.writer.file(entry) for variant_id, entry in entries.items()}
    is_plain = own == "fp32" and not source.external_files
    served = fused(shop, full or source.path, _bare(source, samples)) if is_plain else full
    if own in ids:
        if served is None:
            _copy(source, paths[own])
        else:
            shutil.copyfile(served, paths[own])
    if narrow_id in ids and pruned is not None:
        shutil.copyfile(narrow or pruned.path, paths[narrow_id])
    for half in HALVES:
        if half in ids and own == "fp32":
            whole = served if pruned is None and served is not None else base
            make_half(shop, whole, paths[half], half)
    calibration = samples
    makers = {"int8": make_int8, "int4": make_int4}
    rounded = [one for one in makers if one in ids and one != own]
    if rounded or "trt-int8" in compiled.ids:
        int8 = shop.settings.int8
        is_static = int8.method == "static" or "trt-int8" in compiled.ids
        is_static = is_static or int8.smooth is not None
        samples, calibration = _split(source, samples, kind, meaning, shop, is_static=is_static)
    calibration = _bare(source, calibration)
    for one in rounded:
        makers[one](
            shop,
            base,
            paths[one],
            calibration=calibration,
            judge=partial(_drop, source, calibration, meaning),
        )
    judge = partial(_drop, source, compiled.meant(calibration), meaning, as_written=True)
    elsewhere = compiled.make(calibration, judge)
    quality: dict[str, tuple[QualityFigure, ...]]
    blames: dict[str, Blame] = {
        one: partial(blame_layers, shop, one, base, paths[one], lambda: calibration)
        for one in ids
        if one not in (own, narrow_id)
    }
    with shop.reporter.step(f"verify on {len(samples)} {kind}") as step:
        quality = {}
        for one, path in paths.items():
            with explained(one, blames[one]) if one in blames else nullcontext():
                quality[one] = _verified(source, samples, meaning, shop, one, path)
        meant = compiled.meant(samples)
        quality |= compiled.judged(
            elsewhere, lambda one, path: _verified(source, meant, meaning, shop, one, path)
        )
        step.note("; ".join(f"{key}: {summary(found)}" for key, found in quality.items()))
    ids = tuple(i for i in ids if i == own or shop.accept(i, quality[i], blame=blames.get(i)))
    if ids:
        ids, latency = shop.measured(ids, _ENGINE, entries, quality, feeds=first)
    else:
        latency = {}
    variants = joined(
        shop,
        shop.variants(ids, engine=_ENGINE, entries=entries, quality=quality, latency=latency),
        compiled,
        quality,
        sample=first,
        bounds=bounds,
    )
    shop.check_any([variant.id for variant in variants])
    return Manifest(
        name=name,
        version=shop.options.version,
        task=meaning.task,
        description=shop.options.description,
        license=shop.options.license or source.license,
        lineage=shop.lineage(source, *_TOOLS, *tools),
        inputs=source.inputs,
        outputs=source.outputs,
        preprocessing=meaning.preprocessing,
        labels=meaning.labels,
        label_output=meaning.label_output,
        multi_label=meaning.multi_label,
        variants=variants,
    )


def variants_of(own: str, *, narrow: str = "") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(variants that are made when nobody says, variants that can be made) of a precision.

    Args:
        own: The source's precision.
        narrow: Id of a narrower model that others are made of; "" without one.
    """
    if narrow:
        return (narrow, own), (own, narrow, *COMPRESSED, *TENSORRT_IDS)
    return (own,), (own, *COMPRESSED, *TENSORRT_IDS) if own == "fp32" else (own,)


def _meaning(source: OnnxSource, shop: Workshop) -> Meaning:
    options = shop.options
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    magika = source.path.parent / _MAGIKA_CONFIG
    if magika.is_file():
        labels, preprocessing = _read_magika(magika)
    else:
        preprocessing = known_stream(source)
    labels = stated_labels(shop) or labels
    if options.preprocessing is not None:
        preprocessing = _read_preprocessing(options.preprocessing, source, shop)
    task = options.task or ("classification" if labels else "tensor")
    if task not in ("classification", "tensor"):
        raise ConversionError(
            f"An ONNX file cannot be converted for the task {task!r}",
            fix="Convert the model's Hugging Face folder, or use --task tensor",
        )
    if isinstance(preprocessing, HeadTailPreprocessing):
        _check_head_tail(source, preprocessing)
    if isinstance(preprocessing, StreamPreprocessing):
        _check_stream(source, preprocessing)
    if task == "tensor":
        return Meaning(task=task, preprocessing=preprocessing)
    output = source.outputs[0]
    width = output.shape[-1] if output.shape else 1
    if labels and width not in (-1, len(labels)):
        raise ConversionError(
            f"There are {len(labels)} labels, but output {output.name!r} has {width} scores",
            fix="Give one label for each score, in the model's order",
        )
    return Meaning(task=task, labels=labels, label_output=output.name, preprocessing=preprocessing)


def _read_magika(path: Path) -> tuple[tuple[str, ...], HeadTailPreprocessing]:
    config = read_json(path)
    if config.get("mid_size") or config.get("use_inputs_at_offsets"):
        raise ConversionError(
            f"{path} asks for more than the ends of a file (mid_size, use_inputs_at_offsets)",
            fix="Use a model of magika's standard_v3 series",
        )
    try:
        spec = HeadTailPreprocessing(
            head_bytes=int(config["beg_size"]),
            tail_bytes=int(config["end_size"]),
            block_bytes=int(config["block_size"]),
            padding_value=int(config["padding_token"]),
            min_bytes=int(config.get("min_file_size_for_dl", 0)),
        )
        labels = tuple(str(label) for label in config["target_labels_space"])
    except (KeyError, TypeError, ValueError) as exc:
        raise ConversionError(
            f"{path} does not describe a magika model ({exc!r})",
            fix="Remove the file, and give --labels and --preprocessing instead",
        ) from exc
    return labels, spec


def stated_labels(shop: Workshop) -> tuple[str, ...]:
    """Class names that a person gave; empty where nobody did.

    Raises:
        ConversionError: The file is no list of labels.
    """
    stated = shop.options.labels
    return _read_labels(stated) if isinstance(stated, Path) else stated or ()


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8")
        stored = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as exc:
        raise ConversionError(
            f"Labels cannot be read from {path} ({exc})",
            fix="Give a UTF-8 text file with one label a line, or a JSON list",
        ) from exc
    if not isinstance(stored, list) or not all(isinstance(label, str) for label in stored):
        raise ConversionError(f"{path} is not a list of labels", fix="Give a JSON list of strings")
    labels = tuple(label.strip() for label in stored if label.strip())
    if not labels:
        raise ConversionError(f"{path} holds no labels", fix="Give one label a line")
    return labels


def _read_preprocessing(stated: str, source: OnnxSource, shop: Workshop) -> Preprocessing:
    text = stated
    if not stated.lstrip().startswith("{"):
        try:
            text = Path(stated).read_text(encoding="utf-8")
        except (OSError, ValueError) as exc:
            raise ConversionError(
                f"--preprocessing is neither JSON nor a readable file: {stated!r} ({exc})",
                fix="See `nearfar convert --help` for an example",
            ) from exc
    try:
        spec: Preprocessing = msgspec.json.decode(text, type=Preprocessing)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConversionError(
            f"--preprocessing does not fit: {exc}", fix="See docs/reference/bundle.md"
        ) from exc
    if isinstance(spec, TextPreprocessing):
        tokenizer = source.path.parent / spec.tokenizer
        if not tokenizer.is_file():
            raise ConversionError(
                f"--preprocessing names {spec.tokenizer!r}, which is not beside the model",
                fix="Copy tokenizer.json into the model's folder",
            )
        shop.writer.add(tokenizer, spec.tokenizer)
    return spec


def _check_head_tail(source: OnnxSource, spec: HeadTailPreprocessing) -> None:
    width = spec.head_bytes + spec.tail_bytes
    tensor = source.inputs[0]
    fits = len(source.inputs) == 1 and len(tensor.shape) == 2 and tensor.shape[1] in (-1, width)
    if not fits or tensor.datatype != "INT32":
        raise ConversionError(
            f"Head-tail preprocessing gives INT32 rows of {width}; the model takes "
            f"{', '.join(f'{s.name} {s.datatype}{list(s.shape)}' for s in source.inputs)}",
            fix="Correct head_bytes and tail_bytes, or use another preprocessing",
        )


def _check_stream(source: OnnxSource, spec: StreamPreprocessing) -> None:
    inputs, outputs = ([tensor.name for tensor in ends] for ends in (source.inputs, source.outputs))
    for field, problem in stream_problems(spec, inputs, outputs):
        raise ConversionError(
            f"The stream does not fit the model: {field} {problem}",
            fix="Correct --preprocessing; see docs/reference/bundle.md",
        )


def _split(
    source: OnnxSource,
    samples: list[Feeds],
    kind: str,
    meaning: Meaning,
    shop: Workshop,
    *,
    is_static: bool,
) -> tuple[list[Feeds], list[Feeds]]:
    """Inputs to verify with, and others to calibrate and search with where that is needed."""
    settings = shop.settings
    if not is_static and settings.gates.max_quality_drop is None:
        return samples, samples
    if isinstance(meaning.preprocessing, StreamPreprocessing):
        return split_windows(samples, meaning.preprocessing)
    if kind == _SYNTHETIC:
        return samples, synthetic_samples(source.inputs, settings.seed + 1)
    if len(samples) < _LEAST_TO_SPLIT:
        return samples, samples
    others = [feeds for number, feeds in enumerate(samples) if number % 4]
    return others, samples[::4]


def _bare(source: OnnxSource, samples: Sequence[Feeds]) -> list[Feeds]:
    """Inputs alone, without the right classes: nothing is compressed by these."""
    wanted = {tensor.name for tensor in source.inputs}
    return [{name: feeds[name] for name in feeds if name in wanted} for feeds in samples]


def _drop(
    source: OnnxSource,
    samples: Sequence[Feeds],
    meaning: Meaning,
    path: Path,
    *,
    as_written: bool = False,
) -> float:
    """Share of quality that a file loses, as it runs here or as it is written."""
    figures = verify_tensors(
        source.path, {"trial": path}, samples,
        source_name="source", label_output=meaning.label_output, min_top1_agreement=0.0,
        as_written=as_written, multi_label=meaning.multi_label,
    )["trial"]  # fmt: skip
    if isinstance(meaning.preprocessing, StreamPreprocessing):
        figures += stream_agreement(source.path, path, samples, meaning.preprocessing, "source")
    found = quality_drop(figures)
    return found[1] if found is not None else 1.0


def _samples(
    source: OnnxSource, meaning: Meaning, shop: Workshop, examples: Sequence[Feeds]
) -> tuple[list[Feeds], str]:
    if isinstance(meaning.preprocessing, StreamPreprocessing):
        heard, kind = recordings(shop.options.samples, meaning.preprocessing, shop.settings.seed)
        return windows_of(source.path, source.inputs, heard, meaning.preprocessing), kind
    spec = meaning.preprocessing
    stated = shop.options.samples
    if isinstance(spec, (ImagePreprocessing, AudioPreprocessing)) and (
        stated is None or stated.suffix != ".npz"
    ):
        return raw_samples(stated, spec, meaning.labels, shop.settings.seed)
    if isinstance(spec, TextPreprocessing) and stated is not None and stated.suffix != ".npz":
        return _own_samples(shop.writer.folder / spec.tokenizer, spec, stated, meaning), "texts"
    if shop.options.samples is not None:
        return stored_samples(shop.options.samples, source.inputs), "samples"
    if examples:
        return list(examples), "examples"
    if isinstance(spec, HeadTailPreprocessing):
        batch = max(1, source.inputs[0].shape[0])
        return file_samples(source.inputs[0].name, spec, batch=batch), "real files"
    if isinstance(spec, TextPreprocessing):
        return _text_samples(shop.writer.folder / spec.tokenizer, spec), "real passages"
    return synthetic_samples(source.inputs, shop.settings.seed), _SYNTHETIC


def _own_samples(
    tokenizer: Path, spec: TextPreprocessing, path: Path, meaning: Meaning
) -> list[Feeds]:
    """A person's texts, with their right classes where all have one."""
    from nearfar.processing.text import TextEncoder

    encode = TextEncoder(tokenizer, spec)
    own = read_texts(path, meaning.labels)
    known = [one.label for one in own if one.label is not None]
    feeds = [encode([one.text]) for one in own]
    if len(known) == len(own):
        for feed, label in zip(feeds, known):  # noqa: B905
            feed[LABELS] = np.array([label])
    return feeds


def _text_samples(tokenizer: Path, spec: TextPreprocessing) -> list[Feeds]:
    from converters import texts
    from nearfar.processing.text import TextEncoder

    encode = TextEncoder(tokenizer, spec)
    return [encode([passage]) for passage in texts.passages(64)]


def _optimised(source: OnnxSource, samples: list[Feeds], shop: Workshop) -> Path | None:
    """A smaller graph that computes the same, or `None` to take the source's own files."""
    if source.external_files:
        return None  # two gigabytes and more: nothing to gain from rewriting them
    target = shop.work / f"optimised-{source.path.stem}.onnx"
    limit = shop.settings.gates.max_optimise_error

    def optimise(path: Path) -> bool:
        if not slim(source.path, path):
            return False
        # Weights that branches of the graph share are stored once for each afterwards (silero-vad).
        if path.stat().st_size > _MAX_GROWTH * source.path.stat().st_size:
            return False
        try:
            figures = verify_tensors(
                source.path, {"optimised": path}, samples[:8],
                source_name="source", label_output=None, min_top1_agreement=0.0,
            )["optimised"]  # fmt: skip
        except ConversionError:
            return False
        return bool(figures) and figures[0].value <= limit and _same_io(source, path)

    with shop.reporter.step("optimise the graph") as step:
        parts = {
            "source": fingerprint(source),
            "samples": digest_of_arrays(samples[:8]),
            "limit": limit,
        }
        if not shop.cache.output("optimise", parts, target, optimise, tools=_TOOLS):
            step.note("left as it is")
            return None
    return target


def _verified(
    source: OnnxSource,
    samples: list[Feeds],
    meaning: Meaning,
    shop: Workshop,
    variant_id: str,
    path: Path,
) -> tuple[QualityFigure, ...]:
    gate = shop.settings.gates.min_top1_agreement
    is_unfused = variant_id == "int8" and shop.settings.int8.method != "weights"
    spec = meaning.preprocessing
    stream = spec if isinstance(spec, StreamPreprocessing) else None
    parts = {
        "source": fingerprint(source),
        "source_name": source.label,
        "variant": [variant_id, digest_of_path(path.parent)],
        "samples": digest_of_arrays(samples),
        "label_output": meaning.label_output,
        "min_top1_agreement": gate,
        "is_unfused": is_unfused,
        "stream": to_builtins(stream),
        "as_written": variant_id in TENSORRT_IDS,
        "multi_label": meaning.multi_label,
    }

    def verify() -> tuple[QualityFigure, ...]:
        figures = verify_tensors(
            source.path, {variant_id: path}, samples,
            source_name=source.label, label_output=meaning.label_output, min_top1_agreement=gate,
            is_unfused=is_unfused, as_written=variant_id in TENSORRT_IDS,
            multi_label=meaning.multi_label,
        )[variant_id]  # fmt: skip
        if stream is not None:
            figures += stream_agreement(source.path, path, samples, stream, source.label)
        return figures

    return shop.cache.value(
        "verify-tensors", parts, tuple[QualityFigure, ...], verify, tools=("onnxruntime", "numpy")
    )


def _same_io(source: OnnxSource, target: Path) -> bool:
    from converters.sources.onnx_file import io_specs

    def names(specs: tuple[TensorSpec, ...]) -> list[tuple[str, str]]:
        return [(spec.name, spec.datatype) for spec in specs]

    inputs, outputs = io_specs(target)
    return names(inputs) == names(source.inputs) and names(outputs) == names(source.outputs)


def _copy(source: OnnxSource, target: Path) -> None:
    shutil.copyfile(source.path, target)
    folder = source.path.resolve().parent
    for file in source.external_files:
        place = target.parent / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
