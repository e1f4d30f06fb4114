"""What a manifest must say beyond having the right types; see docs/reference/bundle.md."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence

from nearfar.bundle.manifest import (
    AudioPreprocessing,
    FileEntry,
    HeadTailPreprocessing,
    ImagePreprocessing,
    Manifest,
    StreamPreprocessing,
    TensorSpec,
    TextPreprocessing,
    Variant,
)
from nearfar.bundle.paths import MANIFEST_NAME, path_problem
from nearfar.bundle.signature import SIGNATURE_NAME
from nearfar.bundle.versions import is_version
from nearfar.tensors import DATATYPES

#: Ids become folder names, metric labels and wire strings, so they are kept plain.
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
#: 1 TiB: larger than any single model file, small enough that a sum of sizes means something.
MAX_FILE_BYTES = 1 << 40
#: TensorRT counts sizes in 32 bits.
_MAX_AXIS = 2**31 - 1
#: Head and tail rows are allocated per request.
_MAX_HEAD_TAIL = 1 << 20
#: Windows and states of signals likewise; also the highest sample rate, in Hz.
_MAX_STREAM = 1 << 20
#: An image is allocated per request, four bytes to a pixel and channel.
_MAX_SIDE = 1 << 13
#: A sound too: three hours of 24 kHz.
_MAX_SOUND = 1 << 28


def manifest_problems(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield (field, what is wrong with it); nothing when the manifest holds together."""
    if not _IDENTIFIER.fullmatch(manifest.name):
        yield "name", f"{manifest.name!r} is not of the form {_IDENTIFIER.pattern}"
    if not is_version(manifest.version):
        yield "version", f"{manifest.version!r} is not a semantic version such as 1.0.0"
    if not manifest.variants:
        yield "variants", "is empty"
    ids = [variant.id for variant in manifest.variants]
    for name in sorted({name for name in ids if ids.count(name) > 1}):
        yield "variants", f"has the id {name!r} more than once"
    yield from _file_problems(manifest)
    for position, variant in enumerate(manifest.variants):
        yield from _variant_problems(f"variants[{position}]", variant)
    yield from _tensor_problems("inputs", manifest.inputs)
    yield from _tensor_problems("outputs", manifest.outputs)
    yield from _task_problems(manifest)


def _file_problems(manifest: Manifest) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    groups: list[tuple[str, Iterable[FileEntry]]] = [("files", manifest.files)]
    groups += [(f"variants[{i}].files", v.files) for i, v in enumerate(manifest.variants)]
    for group, entries in groups:
        for position, entry in enumerate(entries):
            field = f"{group}[{position}]"
            problem = path_problem(entry.path)
            if problem is not None:
                yield f"{field}.path", f"{entry.path!r} {problem}"
            if entry.path == MANIFEST_NAME:
                yield f"{field}.path", "names the manifest itself"
            if entry.path == SIGNATURE_NAME:
                yield f"{field}.path", "names the signature"
            # Folded, so that a bundle means the same on file systems that ignore case.
            if entry.path.casefold() in seen:
                yield f"{field}.path", f"names {entry.path!r} a second time"
            seen.add(entry.path.casefold())
            if not 0 <= entry.size_bytes <= MAX_FILE_BYTES:
                yield f"{field}.size_bytes", f"{entry.size_bytes} is not in 0..{MAX_FILE_BYTES}"
            if not _SHA256.fullmatch(entry.sha256):
                yield f"{field}.sha256", "is not 64 lower-case hexadecimal digits"


def _variant_problems(field: str, variant: Variant) -> Iterator[tuple[str, str]]:
    if not _IDENTIFIER.fullmatch(variant.id):
        yield f"{field}.id", f"{variant.id!r} is not of the form {_IDENTIFIER.pattern}"
    if not variant.files:
        yield f"{field}.files", "is empty"
    problem = path_problem(variant.entry)
    if problem is not None:
        yield f"{field}.entry", f"{variant.entry!r} {problem}"
    elif not any(
        entry.path == variant.entry or entry.path.startswith(variant.entry + "/")
        for entry in variant.files
    ):
        yield f"{field}.entry", f"{variant.entry!r} is not among the variant's files"
    if not variant.placement:
        yield f"{field}.placement", "is empty"
    if variant.requirements.memory_bytes < 0:
        yield f"{field}.requirements.memory_bytes", "is negative"
    yield from _tensorrt_problems(field, variant)
    for position, quality in enumerate(variant.quality):
        if not math.isfinite(quality.value):
            yield f"{field}.quality[{position}].value", "is not finite"
    for position, latency in enumerate(variant.latency):
        figures = (latency.p50_ms, latency.p99_ms, latency.ms_per_token or 0.0)
        if not all(math.isfinite(figure) and figure >= 0 for figure in figures):
            yield f"{field}.latency[{position}]", "has a figure that is not a duration"
        rates = (latency.rows_per_s, latency.prefill_tokens_per_s, latency.decode_tokens_per_s)
        if not all(rate is None or (math.isfinite(rate) and rate >= 0) for rate in rates):
            yield f"{field}.latency[{position}]", "has a throughput that is not a rate"


def _tensorrt_problems(field: str, variant: Variant) -> Iterator[tuple[str, str]]:
    plan = variant.tensorrt
    if plan is None:
        if variant.engine == "tensorrt":
            yield f"{field}.tensorrt", "is missing, but the engine is tensorrt"
        return
    for position, sizes in enumerate(plan.profile):
        where = f"{field}.tensorrt.profile[{position}]"
        if not len(sizes.smallest) == len(sizes.usual) == len(sizes.largest):
            yield where, "has shapes of different length"
        elif not all(
            0 <= low <= usual <= high <= _MAX_AXIS
            for low, usual, high in zip(sizes.smallest, sizes.usual, sizes.largest, strict=True)
        ):
            yield where, "does not rise from smallest over usual to largest"
    if not all(math.isfinite(value) for value in plan.fixed.values()):
        yield f"{field}.tensorrt.fixed", "has a value that is not finite"
    if plan.workspace_bytes < 0:
        yield f"{field}.tensorrt.workspace_bytes", "is negative"
    if plan.optimization_level is not None and not 0 <= plan.optimization_level <= 5:
        yield f"{field}.tensorrt.optimization_level", "is not in 0..5"


def _tensor_problems(field: str, specs: tuple[TensorSpec, ...]) -> Iterator[tuple[str, str]]:
    names = [spec.name for spec in specs]
    for position, spec in enumerate(specs):
        if not spec.name or names.index(spec.name) != position:
            yield f"{field}[{position}].name", f"{spec.name!r} is empty or used twice"
        if spec.datatype not in DATATYPES:
            yield f"{field}[{position}].datatype", f"{spec.datatype!r} is not a known datatype"
        if any(size < -1 for size in spec.shape):
            yield f"{field}[{position}].shape", f"{list(spec.shape)} has a size below -1"


def _task_problems(manifest: Manifest) -> Iterator[tuple[str, str]]:
    outputs = {spec.name for spec in manifest.outputs}
    if manifest.label_output is not None and manifest.label_output not in outputs:
        yield "label_output", f"{manifest.label_output!r} is not one of the outputs"
    if manifest.embedding_output is not None and manifest.embedding_output not in outputs:
        yield "embedding_output", f"{manifest.embedding_output!r} is not one of the outputs"
    if manifest.task == "classification" and manifest.label_output is None:
        yield "label_output", "is missing, but the task is classification"
    if manifest.task == "embedding" and manifest.embedding_output is None:
        yield "embedding_output", "is missing, but the task is embedding"
    if manifest.task == "text-generation" and (manifest.context_length_tokens or 0) < 1:
        yield "context_length_tokens", "is missing or below 1, but the task is text-generation"
    if manifest.task != "text-generation" and not (manifest.inputs and manifest.outputs):
        yield "inputs", "and outputs must both be given for this task"
    if manifest.golden is not None:
        listed = {entry.path for entry in manifest.files}
        for path in (manifest.golden.inputs, manifest.golden.outputs):
            if path not in listed:
                yield "golden", f"{path!r} is not among `files`"
    preprocessing = manifest.preprocessing
    if isinstance(preprocessing, TextPreprocessing):
        if preprocessing.tokenizer not in {entry.path for entry in manifest.files}:
            yield "preprocessing.tokenizer", f"{preprocessing.tokenizer!r} is not among `files`"
        if preprocessing.max_length_tokens < 1:
            yield "preprocessing.max_length_tokens", "is below 1"
    elif isinstance(preprocessing, HeadTailPreprocessing):
        row = (preprocessing.head_bytes, preprocessing.tail_bytes)
        if min(row) < 0 or max(row) > _MAX_HEAD_TAIL or sum(row) == 0:
            yield "preprocessing", f"head_bytes and tail_bytes must be in 0..{_MAX_HEAD_TAIL}"
        if not max(row) <= preprocessing.block_bytes <= _MAX_HEAD_TAIL:
            yield "preprocessing.block_bytes", f"must be in {max(row)}..{_MAX_HEAD_TAIL}"
        if not 0 <= preprocessing.min_bytes <= preprocessing.head_bytes:
            yield "preprocessing.min_bytes", "must be in 0..head_bytes"
        if 0 <= preprocessing.padding_value <= 255:
            yield "preprocessing.padding_value", "is a possible byte value"
    elif isinstance(preprocessing, StreamPreprocessing):
        names = [spec.name for spec in manifest.inputs]
        yield from stream_problems(preprocessing, names, list(outputs))
    elif isinstance(preprocessing, (ImagePreprocessing, AudioPreprocessing)):
        names = [spec.name for spec in manifest.inputs]
        if names != [preprocessing.input]:
            yield "preprocessing.input", f"is {preprocessing.input!r}, the inputs are {names}"
        if isinstance(preprocessing, ImagePreprocessing):
            yield from _image_problems(preprocessing)
        else:
            yield from _audio_problems(preprocessing)


def _image_problems(image: ImagePreprocessing) -> Iterator[tuple[str, str]]:
    sides = (*image.resize, *(image.crop or ()))
    if len(image.resize) not in (1, 2) or not all(1 <= side <= _MAX_SIDE for side in sides):
        yield "preprocessing.resize", f"and crop must be one or two sizes in 1..{_MAX_SIDE}"
        return
    if image.crop is None and len(image.resize) == 1:
        yield "preprocessing.crop", "is missing, but resize says the shorter side only"
    elif image.crop is not None:
        height, width = image.resize[0], image.resize[-1]
        if image.crop[0] > height or image.crop[1] > width:
            yield "preprocessing.crop", f"{image.crop} is larger than what it is cut out of"
    for name, numbers in (("mean", image.mean), ("std", image.std)):
        if len(numbers) != len(image.channels) or not all(map(math.isfinite, numbers)):
            yield f"preprocessing.{name}", f"must be {len(image.channels)} finite numbers"
    if not math.isfinite(image.scale) or not all(image.std):
        yield "preprocessing.std", "has a zero, or scale is not finite"


def _audio_problems(sound: AudioPreprocessing) -> Iterator[tuple[str, str]]:
    if not 1 <= sound.sample_rate_hz <= _MAX_STREAM:
        yield "preprocessing.sample_rate_hz", f"is not in 1..{_MAX_STREAM}"
    if not 1 <= sound.min_samples <= sound.max_samples <= _MAX_SOUND:
        yield "preprocessing.min_samples", f"and max_samples must rise in 1..{_MAX_SOUND}"


def stream_problems(
    stream: StreamPreprocessing, inputs: Sequence[str], outputs: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """As `manifest_problems`, of how a signal becomes inputs; given the names of both ends."""
    if not stream.rates:
        yield "preprocessing.rates", "is empty"
    for position, rate in enumerate(stream.rates):
        sizes = (rate.sample_rate_hz, rate.window_samples)
        if not 1 <= min(sizes) <= max(sizes) <= _MAX_STREAM:
            yield f"preprocessing.rates[{position}]", f"has a size outside 1..{_MAX_STREAM}"
        if not 0 <= rate.context_samples <= rate.window_samples:
            yield f"preprocessing.rates[{position}].context_samples", "exceeds window_samples"
    taken = [stream.input, *(state.input for state in stream.states)]
    if stream.rate_input is not None:
        taken.append(stream.rate_input)
    if sorted(taken) != sorted(inputs):
        yield "preprocessing", f"fills {', '.join(taken)}, the inputs are {', '.join(inputs)}"
    for position, state in enumerate(stream.states):
        field = f"preprocessing.states[{position}]"
        if state.output not in outputs:
            yield f"{field}.output", f"{state.output!r} is not one of the outputs"
        if not all(1 <= size <= _MAX_STREAM for size in state.shape):
            yield f"{field}.shape", f"has a size outside 1..{_MAX_STREAM}"
        elif math.prod(state.shape) > _MAX_STREAM:
            yield f"{field}.shape", f"holds more than {_MAX_STREAM} numbers"
