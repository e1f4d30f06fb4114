"""What a conversion would do, before it is done: steps, time and disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.awq.environment import SIZE_BYTES, TIME_S, is_made
from converters.cache import default_root
from converters.options import ConversionOptions
from converters.recipes import bundle, cached_text, classifier, embedding, text_generation
from converters.recipes.base import Workshop
from converters.recipes.int8 import HALVES
from converters.recipes.onnx_model import variants_of
from converters.settings import SlimSettings
from converters.slim.shape import Cut, check_slim
from converters.sources.base import Source
from converters.sources.bundle import BundleSource
from converters.sources.gguf import GgufSource
from converters.sources.huggingface import HuggingFaceSource
from converters.sources.onnx_file import OnnxSource
from converters.sources.torch_module import TorchSource

#: Size of a variant against the weights in 32 bits, and seconds per GiB of these on two AVX-512
#: VNNI cores. From SmolLM2-135M (0.5 GiB), all-MiniLM-L6-v2 (0.08 GiB) and magika (0.003 GiB);
#: other machines and models are easily two times off.
_SIZE = {
    "fp32": 1.0, "fp16": 0.5, "bf16": 0.5, "int8": 0.3, "int4": 0.22,
    "trt-fp32": 1.0, "trt-fp16": 0.5, "trt-bf16": 0.5, "trt-int8": 0.3,
}  # fmt: skip
_SIZE_TEXT = {
    "fp32": 1.0, "int8": 0.4, "int4": 0.22,
    "onnx-fp32": 1.0, "onnx-fp16": 0.5, "onnx-int8": 0.28, "onnx-int4": 0.22,
}  # fmt: skip
#: Seconds of training for each token and GiB of weights. Language models: SmolLM2-135M took 32 s of
#: processor time on two threads for 256 tokens, most of it for the scores of its 49,152 words.
_TRAIN_S, _TRAIN_TEXT_S = 0.02, 0.12
#: Seconds for each GiB, from processor time of conversions of SmolLM2-135M (0.5 GiB; elapsed times
#: were taken on a busy machine and say little). `torch.export` of a plain graph took more than
#: 163 s. AWQ took 233 s with four windows of 512 tokens and 162 s with one of 64: scales are tried
#: on the weights, whatever is read; the search shares its work between threads.
_EXPORT_CACHED_S, _BLOCKS_S = 400.0, 40.0
_AWQ_S, _AWQ_WINDOW_S = 220.0, 30.0
#: GPTQ: SmolLM2-135M, eight windows.
_GPTQ_S, _GPTQ_WINDOW_S = 240.0, 15.0
#: Comparing layers: SmolLM2-135M `int4` 20 s, all-MiniLM-L6-v2 11 s.
_LAYERS_START_S, _LAYERS_S = 9.0, 22.0
_MEASURE_S = 4.0
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step.

    Attributes:
        title: What would be done.
        time_s: About how long it takes.
        disk_bytes: About how much it writes, intermediate files included.
    """

    title: str
    time_s: float
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps of a conversion.

    Attributes:
        variants: Ids of the variants that would be made, best first.
        steps: In their order.
        bundle_bytes: About how large the bundle is.
    """

    variants: tuple[str, ...]
    steps: tuple[PlannedStep, ...]
    bundle_bytes: int

    @property
    def time_s(self) -> float:
        """About how long everything takes."""
        return sum(step.time_s for step in self.steps)

    @property
    def disk_bytes(self) -> int:
        """About how much room is needed while it runs."""
        return sum(step.disk_bytes for step in self.steps)


def plan(source: Source, options: ConversionOptions) -> Plan:
    """Estimate a conversion; nothing but the source's size is looked at.

    Raises:
        ConversionError: A wished variant cannot be made of this model.
    """
    check_slim(source, options)
    if isinstance(source, TorchSource):
        return _plan_module(source, options)
    if isinstance(source, OnnxSource):
        return _plan_onnx(source, options)
    if isinstance(source, BundleSource):
        return _plan_bundle(source, options)
    if isinstance(source, HuggingFaceSource) and source.task == "embedding":
        return _plan_encoder(source, options)
    if isinstance(source, HuggingFaceSource) and source.task == "classification":
        return _plan_classifier(source, options)
    return _plan_language_model(source, options)


def _plan_onnx(source: OnnxSource, options: ConversionOptions) -> Plan:
    own = source.precision
    ids = _ids(options, *variants_of(own))
    full = source.path.stat().st_size + sum(file.stat().st_size for file in source.external_files)
    steps = [_step("optimise the graph", full, per_gib_s=60, disk=full)]
    if own == "fp32":
        steps += _compressing(ids, full, options)
    steps.append(_step("verify every variant", full * (1 + len(ids)), per_gib_s=60))
    return _finished(ids, steps, lambda name: full * _SIZE[name] / _SIZE[own], options)


def _plan_module(source: TorchSource, options: ConversionOptions) -> Plan:
    prune = options.settings.prune
    settings = options.settings.slim
    narrow = "slim" if settings.is_wished else "pruned" if prune.ratio else ""
    ids = _ids(options, *variants_of("fp32", narrow=narrow))
    full = source.weights_bytes
    left: float = (1 - prune.ratio) ** 2
    steps = [
        _step("export to ONNX and compare with torch", full, per_gib_s=100, start_s=6, disk=full),
        _step("optimise the graph", full, per_gib_s=60, disk=full),
    ]
    if prune.ratio:
        # How long an epoch takes depends on the data, which is not read for a plan.
        title = f"prune and train for {prune.recovery_epochs} epochs"
        steps.append(_step(title, full, per_gib_s=600, start_s=12, disk=full * left))
    if settings.is_wished:
        # How much of the module the layers are is not looked at for a plan.
        left = settings.keep_mlp
        title = f"slice the layers, and train for {settings.recovery_steps} steps"
        steps.append(_step(title, full, per_gib_s=600, start_s=12, disk=full * left))
    steps += _compressing(ids, full, options)
    steps.append(_step("verify every variant", full * (1 + len(ids)), per_gib_s=60))
    sizes = {name: full * left * share for name, share in _SIZE.items()}
    sizes |= {"fp32": full, narrow: full * left}
    return _finished(ids, steps, lambda name: sizes[name], options)


def _plan_bundle(source: BundleSource, options: ConversionOptions) -> Plan:
    ids = _ids(options, (), bundle.POSSIBLE)
    full, there = source.full.size_bytes, source.bundle.size_bytes()
    steps = [_step("take the variants over", there, per_gib_s=4, disk=there)]
    if ids:
        steps += _compressing(ids, full, options)
        steps.append(_step("verify", full * (1 + len(ids)), per_gib_s=60))
    planned = _finished(ids, steps, lambda name: full * _SIZE[name], options)
    return Plan(planned.variants, planned.steps, planned.bundle_bytes + there)


def _plan_encoder(source: HuggingFaceSource, options: ConversionOptions) -> Plan:
    cut = check_slim(source, options)
    ids = _ids(options, *embedding.variants_of(is_slim=cut is not None))
    full = _weights(source.path)
    steps = [
        _step("load the source", full, per_gib_s=20, start_s=8),
        _step("export to ONNX", full, per_gib_s=100, start_s=6, disk=full),
        _step("optimise the graph", full, per_gib_s=40, disk=full),
        _step("run the source on real passages", full, per_gib_s=40),
    ]
    steps += _compressing(ids, full, options)
    steps.append(_step("verify every variant", full * len(ids), per_gib_s=40))
    steps += _comparisons(ids, full)
    if cut is not None:
        steps.insert(1, _slicing(cut, options.settings.slim, full))
    return _finished(ids, steps, _sizes(full, _SIZE, cut), options)


def _plan_classifier(source: HuggingFaceSource, options: ConversionOptions) -> Plan:
    ids = _ids(options, classifier.DEFAULT_VARIANTS, variants_of("fp32")[1])
    full = _weights(source.path)
    steps = [
        _step("load the source", full, per_gib_s=20, start_s=8),
        _step("export to ONNX and compare with torch", full, per_gib_s=120, start_s=6, disk=full),
        _step("optimise the graph", full, per_gib_s=60, disk=full),
    ]
    steps += _compressing(ids, full, options)
    steps.append(_step("verify every variant", full * (1 + len(ids)), per_gib_s=60))
    return _finished(ids, steps, lambda name: full * _SIZE[name], options)


def _plan_language_model(source: Source, options: ConversionOptions) -> Plan:
    cut = check_slim(source, options)
    ids = _ids(options, *text_generation.variants_of(is_slim=cut is not None))
    # Quantized GGUF weights have 4 to 5 bits; safetensors of language models have 16.
    full = source.path.stat().st_size * 6 if isinstance(source, GgufSource) else 0
    full = full or _weights(source.path) * 2
    int4 = options.settings.int4
    is_scaled = "int4" in ids and int4.algorithm == "awq" and int4.awq.scales == "search"
    steps = []
    if is_scaled and not is_made(options.cache):
        title = f"make an environment for nvidia-modelopt in {options.cache or default_root()}"
        steps.append(PlannedStep(title, TIME_S, SIZE_BYTES))
    steps += [
        _step("load the source", full, per_gib_s=16, start_s=4),
        _step("write safetensors", full, per_gib_s=4, disk=full),
        _step("run the source on real text", full, per_gib_s=10),
        *(
            [
                _step(
                    "find AWQ's scales",
                    full,
                    per_gib_s=_AWQ_S + _AWQ_WINDOW_S * int4.awq.windows,
                    start_s=15,
                    disk=2 * full,
                )
            ]
            if is_scaled
            else []
        ),
        *(
            [
                _step(
                    "choose codes by GPTQ",
                    full,
                    per_gib_s=_GPTQ_S + _GPTQ_WINDOW_S * int4.gptq.windows,
                    start_s=5,
                    disk=full / 7,
                )
            ]
            if "int4" in ids and int4.algorithm == "gptq"
            else []
        ),
        *_builds(ids, full),
        _step("verify every variant", full * len(ids), per_gib_s=60),
        *_comparisons(ids, full),
    ]
    if cut is not None:
        trained = _slicing(cut, options.settings.slim, full, token_s=_TRAIN_TEXT_S)
        steps.insert(3, trained)
    return _finished(ids, steps, _sizes(full, _SIZE_TEXT, cut), options)


def _compressing(
    ids: tuple[str, ...], full: float, options: ConversionOptions
) -> list[PlannedStep]:
    """The steps that make variants of a graph in full precision."""
    is_smooth = options.settings.int8.smooth is not None
    halves = [
        _step(f"store weights as {name.upper()}", full, per_gib_s=10, disk=full / 2)
        for name in HALVES
        if name in ids
    ]
    smoothed = [
        _step("move what is hard to round into weights", full, per_gib_s=60, disk=full)
        for name in ("int8", "trt-int8")
        if name in ids and is_smooth
    ]
    if options.settings.optimise.fuse:
        halves.insert(0, _step("fuse operators for ONNX Runtime", full, per_gib_s=60, disk=full))
    return [*halves, *smoothed] + [
        _step(f"quantize to {name.upper()}", full, per_gib_s=40, disk=full)
        for name in ("int8", "int4")
        if name in ids
    ]


def _builds(ids: tuple[str, ...], full: float) -> list[PlannedStep]:
    """For onnxruntime-genai, and as plain graphs, whose blocks go into the one in FP32."""
    plain = [name for name in ids if name in cached_text.IDS]
    others = [name for name in ids if name not in cached_text.IDS]
    steps = []
    if others:
        title = f"build {' and '.join(others)} for onnxruntime-genai"
        steps.append(_step(title, full, per_gib_s=75 * len(others), disk=full))
    rounded = [name for name in plain if name in ("onnx-int8", "onnx-int4")]
    exported = [name for name in plain if name not in rounded]
    if rounded and "onnx-fp32" not in plain:
        exported.insert(0, "onnx-fp32")
    if plain:
        seconds = _EXPORT_CACHED_S * len(exported) + _BLOCKS_S * len(rounded)
        # What is only made to make others of it, besides what the bundle holds.
        between = full if "onnx-fp32" not in plain and rounded else 0
        title = f"build {' and '.join(plain)} for plain ONNX Runtime"
        steps.append(_step(title, full, per_gib_s=seconds, start_s=6, disk=between))
    return steps


def _comparisons(ids: tuple[str, ...], full: float) -> list[PlannedStep]:
    """One for each variant that is rounded: nobody knows before whether it loses so much."""
    best = "onnx-fp32" if "onnx-fp32" in ids else "fp32"
    return [
        _step(
            f"find the layers where {name} errs, if it loses more than 1 %",
            full, per_gib_s=_LAYERS_S, start_s=_LAYERS_START_S,
        )
        for name in ids
        if best in ids and name.endswith(("int8", "int4"))
    ]  # fmt: skip


def _slicing(
    cut: Cut, settings: SlimSettings, full: float, *, token_s: float = _TRAIN_S
) -> PlannedStep:
    """Time of forward and backward passes, which grows with weights and tokens."""
    tokens = settings.recovery_steps * settings.batch * settings.tokens
    train_s = token_s * full / _GIB * tokens
    limit_s = settings.recovery_limit_s
    before, after = cut.before, cut.after
    title = (
        f"keep {after.layers} of {before.layers} layers, {after.heads} of {before.heads} heads, "
        f"{after.inner} of {before.inner} MLP channels; train for {settings.recovery_steps} steps"
    )
    step = _step(title, full, per_gib_s=60, start_s=8, disk=full * cut.share)
    train_s = train_s if limit_s is None else min(train_s, limit_s)
    return PlannedStep(title, step.time_s + train_s, step.disk_bytes)


def _sizes(full: float, shares: Mapping[str, float], cut: Cut | None) -> Callable[[str], float]:
    """Size of a variant; what is made of a sliced model is smaller by what its layers lost."""

    def size(name: str) -> float:
        if cut is None or name == "fp32":
            return full * shares[name]
        # Embedding tables stay: a third of what small models weigh.
        left = 1 / 3 + cut.share * 2 / 3
        return full * left * shares["fp32" if name == "slim" else name]

    return size


def _ids(
    options: ConversionOptions, default: tuple[str, ...], possible: tuple[str, ...]
) -> tuple[str, ...]:
    return Workshop.choose(options, default, possible)


def _finished(
    ids: tuple[str, ...],
    steps: list[PlannedStep],
    size: Callable[[str], float],
    options: ConversionOptions,
) -> Plan:
    bundle_bytes = int(sum(size(name) for name in ids))
    if options.measure:
        steps += [PlannedStep(f"measure {name}", _MEASURE_S) for name in ids]
    steps.append(_step("hash and write the bundle", bundle_bytes, per_gib_s=4, disk=bundle_bytes))
    return Plan(ids, tuple(steps), bundle_bytes)


def _step(
    title: str, size: float, *, per_gib_s: float, start_s: float = 0.3, disk: float = 0
) -> PlannedStep:
    return PlannedStep(title, start_s + per_gib_s * size / _GIB, int(disk))


def _weights(folder: Path) -> int:
    files = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in files)
