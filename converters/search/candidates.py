"""Which ways there are to compress a model of a kind, and how long trying them takes."""

from __future__ import annotations

from collections.abc import Sequence

from converters.options import ConversionOptions
from converters.plan import Plan, PlannedStep, plan
from converters.settings import CalibrationSettings, Int4Settings, Int8Settings, Trial
from converters.sources.base import Source
from converters.sources.bundle import BundleSource
from converters.sources.gguf import GgufSource
from converters.sources.huggingface import HuggingFaceSource
from converters.sources.onnx_file import OnnxSource
from converters.sources.torch_module import TorchSource
from converters.steps.carry_gguf import can_carry
from nearfar.errors import ConfigError, ConversionError

#: The variant that all others are held against.
FULL = "fp32"

_BLOCKS = (
    Trial(id="int8-blocks-128", variant="int8", int8=Int8Settings(block_size=128)),
    Trial(id="int8-blocks-32", variant="int8", int8=Int8Settings(block_size=32)),
)
_DYNAMIC = Trial(id="int8-dynamic", variant="int8", int8=Int8Settings(method="dynamic"))
#: Alpha as it was best for all-MiniLM-L6-v2 of 0.3, 0.5, 0.7 and 0.85.
_SMOOTH = Trial(
    id="int8-dynamic-smooth", variant="int8", int8=Int8Settings(method="dynamic", smooth=0.7)
)
_INT4 = Trial(
    id="int4-blocks-32", variant="int4", int4=Int4Settings(algorithm="rtn", block_size=32)
)
_STATIC = tuple(
    Trial(
        id=f"int8-static-{method}",
        variant="int8",
        int8=Int8Settings(method="static", calibration=CalibrationSettings(method=method)),
    )
    for method in ("minmax", "entropy", "percentile")
)
#: Of a sentence encoder ranges are found on long texts, which takes minutes; `entropy` and
#: `percentile` take a multiple of that.
_ENCODER = (*_BLOCKS, _DYNAMIC, _SMOOTH, _STATIC[0], _INT4)
_TENSORS = (*_BLOCKS, _DYNAMIC, *_STATIC)
_CARRY = Trial(id="int4-carry", variant="int4", int4=Int4Settings(algorithm="carry"))
_TEXT = (
    Trial(id="int4-k-quant-mixed", variant="int4", int4=Int4Settings(algorithm="k_quant_mixed")),
    Trial(id="int4-k-quant", variant="int4", int4=Int4Settings(algorithm="k_quant")),
    Trial(id="int4-gptq", variant="int4", int4=Int4Settings(algorithm="gptq")),
    Trial(id="int4-rtn", variant="int4", int4=Int4Settings(algorithm="rtn")),
    Trial(id="int8", variant="int8"),
)
#: How often a graph is run for one way, beside being quantized and verified.
_CALIBRATIONS = {"minmax": 1.0, "entropy": 3.0, "percentile": 3.0}
_MEASURE_S = 4.0


def candidates(source: Source) -> tuple[Trial, ...]:
    """The ways to compress a model, the likely ones first.

    Raises:
        ConversionError: There is nothing to search.
    """
    if isinstance(source, (GgufSource, HuggingFaceSource)):
        if isinstance(source, HuggingFaceSource) and source.task == "embedding":
            return _ENCODER
        if isinstance(source, HuggingFaceSource) and source.task == "classification":
            return _TENSORS if source.modality == "image" else _ENCODER
        carry = isinstance(source, GgufSource) and can_carry(source)
        return (_CARRY, *_TEXT) if carry else _TEXT
    if isinstance(source, BundleSource):
        return _ENCODER if source.bundle.manifest.task == "embedding" else _TENSORS
    if isinstance(source, OnnxSource) and source.precision != FULL:
        raise ConversionError(
            f"{source.path} is in {source.precision} already: there is nothing to search",
            fix="Leave --auto out, or give the model in 32 bits",
        )
    assert isinstance(source, (OnnxSource, TorchSource))
    return _TENSORS


def chosen(source: Source, ways: Sequence[str]) -> tuple[Trial, ...]:
    """Of `candidates` those with these ids, in their order; all where none is named.

    Raises:
        ConfigError: There is no such way for this model.
        ConversionError: See `candidates`.
    """
    known = candidates(source)
    ids = [one.id for one in known]
    for way in ways:
        if way not in ids:
            raise ConfigError(
                f"There is no way {way!r} to compress this model",
                field="only",
                fix=f"Name some of: {', '.join(ids)}",
            )
    return tuple(one for one in known if not ways or one.id in ways)


def mixed(trial: Trial) -> Trial:
    """The same way with sensitive nodes in full precision."""
    return Trial(id=f"{trial.id}-mixed", variant=trial.variant, int8=trial.int8, is_mixed=True)


def can_be_mixed(trial: Trial) -> bool:
    """Whether leaving nodes in full precision is worth trying: one way of each method."""
    return trial.id in (_BLOCKS[0].id, _STATIC[0].id)


def is_text(source: Source) -> bool:
    """Whether the source is a language model, whose variants are built side by side."""
    return isinstance(source, GgufSource) or (
        isinstance(source, HuggingFaceSource) and source.task == "text-generation"
    )


def planned(
    source: Source, options: ConversionOptions, trials: tuple[Trial, ...]
) -> tuple[PlannedStep, ...]:
    """What a search would do: one step for full precision, and one for each way.

    Estimates as those of `converters.plan`, easily two times off.
    """
    from dataclasses import replace

    def together(*variants: str) -> PlannedStep:
        one = plan(source, replace(options, variants=variants))
        return PlannedStep(variants[0], one.time_s, one.disk_bytes)

    base = together(FULL) if not isinstance(source, BundleSource) else PlannedStep(FULL, 1.0)
    steps = [PlannedStep(f"make and measure {FULL}", base.time_s, base.disk_bytes)]
    for trial in trials:
        if is_text(source):
            both = together(trial.variant, FULL)
            steps.append(PlannedStep(f"try {trial.id}", both.time_s, both.disk_bytes))
            continue
        size = source.full.size_bytes if isinstance(source, BundleSource) else _bytes(source)
        runs = 2.0 + _CALIBRATIONS.get(trial.int8.calibration.method, 0.0) * (
            trial.int8.method == "static"
        )
        searched = 6.0 if trial.is_mixed else 1.0
        time_s = searched * size / 2**30 * (40 + 60 * runs) + 1.0
        time_s += _MEASURE_S if options.measure else 0.0
        steps.append(PlannedStep(f"try {trial.id}", time_s, 2 * size))
    return tuple(steps)


def plan_search(source: Source, options: ConversionOptions, ways: Sequence[str] = ()) -> Plan:
    """What `search_model` would do, in the form of any plan.

    Raises:
        ConfigError, ConversionError: See `chosen`.
    """
    trials = options.trials or chosen(source, ways)
    steps = list(planned(source, options, trials))
    if not options.trials and any(can_be_mixed(one) for one in trials):
        extra = planned(source, options, tuple(mixed(one) for one in trials if can_be_mixed(one)))
        steps += [
            PlannedStep(f"{one.title}, if it is needed", one.time_s, one.disk_bytes)
            for one in extra[1:]
        ]
    # What is taken is known at the end: full precision and a third of it is what it often is.
    bundle_bytes = int(1.5 * max(one.disk_bytes for one in steps) / 2)
    steps.append(PlannedStep("hash and write the bundle", 1.0, bundle_bytes))
    return Plan(tuple(one.id for one in trials), tuple(steps), bundle_bytes)


def _bytes(source: Source) -> int:
    if isinstance(source, TorchSource):
        return source.weights_bytes
    if isinstance(source, OnnxSource):
        return source.full_bytes
    return sum(file.stat().st_size for file in source.path.glob("*.safetensors"))
