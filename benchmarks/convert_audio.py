"""Real models behave as before: silero-vad on recorded speech, magika on files of this machine.

What they are compared with is the file that was converted, run as its makers run it, without any
part of nearfar in between.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Bar, Figure
from benchmarks.sounds import at_half_rate, recordings_below
from benchmarks.subjects import Begin, Part
from converters.options import ConversionOptions
from converters.pipeline import convert_model
from converters.steps.onnx_session import open_session
from nearfar.bundle.manifest import HeadTailPreprocessing
from nearfar.engines.model import LoadedModel
from nearfar.processing.head_tail import features
from sdk import Client

MIN_AGREEMENT = 0.999
MIN_INPUTS = 1000
#: The probability from which silero-vad's own code takes a window for speech.
_SPEECH = 0.5
_MAX_FILE_BYTES = 4 << 20
#: INT8 has no bar: undecided cases tip over, one in a hundred and more (docs/reference/bench.md).
_VARIANTS = ("fp32", "fp16", "int8")


def measure_audio(source: Path, sounds: Path, work: Path, begin: Begin) -> Part:
    """Convert silero-vad to each precision, and stream recorded speech through the SDK.

    Args:
        source: ``silero_vad.onnx``.
        sounds: Folder with ``.wav`` files of 8 or 16 kHz; those of 16 kHz are heard at both rates.
        work: Where the bundle goes.
        begin: Shows progress.
    """
    heard = [(rate_hz, samples) for samples, rate_hz in recordings_below(sounds)
             if rate_hz in (8000, 16000)]  # fmt: skip
    heard += [(8000, at_half_rate(samples)) for rate_hz, samples in heard if rate_hz == 16000]
    session = open_session(source)
    step = begin("silero-vad: recordings", len(heard) * (1 + len(_VARIANTS)))
    expected = []
    for rate_hz, samples in heard:
        expected.append(_original(session, samples, rate_hz))
        step()
    truth = np.concatenate(expected)
    bars = [_least("silero-vad: recorded windows", len(truth), MIN_INPUTS)]
    figures = [
        _one("silero-vad: recorded sound", sum(len(row) / hz for hz, row in heard), "s"),
        _one("silero-vad: windows that are speech", float((truth >= _SPEECH).mean())),
    ]
    for variant_id in _VARIANTS:
        options = ConversionOptions(
            name="vad", license="MIT", variants=(variant_id,), measure=False
        )
        bundle = convert_model(source, work / variant_id / "vad", options)
        found = []
        with Client(models=work / variant_id) as client:
            for rate_hz, samples in heard:
                stream = client.stream_audio("vad", sample_rate_hz=rate_hz)
                found += [answer.score for answer in stream.feed(samples)]
                step()
        scores = np.array(found)
        same = float(((scores >= _SPEECH) == (truth >= _SPEECH)).mean())
        name = f"silero-vad, {variant_id}"
        if variant_id == "int8":
            figures.append(_one(f"{name}: same decisions", same))
        else:
            bars.append(_least(f"{name}: same decisions", same, MIN_AGREEMENT))
        ratio = bundle.variant(variant_id).size_bytes / source.stat().st_size
        figures.append(_one(f"{name}: size ÷ source", ratio))
        worst = float(np.abs(scores - truth).max())
        figures.append(_one(f"{name}: largest difference of a probability", worst))
    return Part(tuple(bars), tuple(figures))


def _original(session: Any, samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """Probabilities as silero-vad 6.2's `OnnxWrapper` gets them, window by window."""
    window, context = (512, 64) if rate_hz == 16000 else (256, 32)
    signal = samples.astype(np.float32) / 32768
    before = np.zeros((1, context), np.float32)
    state = np.zeros((2, 1, 128), np.float32)
    found = []
    for start in range(0, len(signal) - window + 1, window):
        row = np.concatenate([before, signal[None, start : start + window]], axis=1)
        out, state = session.run(None, {"input": row, "state": state, "sr": np.array(rate_hz)})
        before = row[:, -context:]
        found.append(float(out[0, 0]))
    return np.array(found)


def measure_files(source: Path, work: Path, count: int, seed: int, begin: Begin) -> Part:
    """Convert magika to each precision, and ask source and variants about real files.

    Args:
        source: ``model.onnx`` of magika, its ``config.min.json`` beside it.
        work: Where the bundle goes.
        count: How many files.
        seed: Which ones is drawn from it.
        begin: Shows progress.
    """
    options = ConversionOptions(name="file-type", variants=_VARIANTS, measure=False)
    bundle = convert_model(source, work / "file-type", options)
    spec = bundle.manifest.preprocessing
    assert isinstance(spec, HeadTailPreprocessing)
    contents = list(itertools.islice(_real_files(spec.min_bytes, seed), count))
    ids = [variant.id for variant in bundle.manifest.variants]
    step = begin("magika: files", 1 + len(ids))
    session = open_session(source)
    name = session.get_inputs()[0].name
    expected = np.concatenate(
        [session.run(None, {name: features(data, spec)[None]})[0] for data in contents]
    )
    step()
    bars = [_least("magika: files", len(contents), MIN_INPUTS)]
    figures = [_one("magika: kinds among them", len(set(expected.argmax(axis=1).tolist())))]
    for variant_id in ids:
        model = LoadedModel(bundle, variant_id)
        output = bundle.manifest.label_output or ""
        found = np.concatenate([model.infer_raw("bytes", [data])[output] for data in contents])
        model.close()
        same = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
        if variant_id == "int8":
            figures.append(_one(f"magika, {variant_id}: same answers", same))
        else:
            bars.append(_least(f"magika, {variant_id}: same answers", same, MIN_AGREEMENT))
        ratio = bundle.variant(variant_id).size_bytes / source.stat().st_size
        figures.append(_one(f"magika, {variant_id}: size ÷ source", ratio))
        step()
    return Part(tuple(bars), tuple(figures))


def _real_files(least_bytes: int, seed: int) -> Iterator[bytes]:
    """Contents of files below ``/usr`` and of this Python, each suffix in turn.

    The libraries that conversions take their own samples from are left out.
    """
    seen = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib"))
    by_suffix: dict[str, list[Path]] = {}
    for root in ("/usr", sys.base_prefix):
        for folder, subfolders, names in os.walk(root):
            subfolders.sort()
            if folder.startswith(seen):
                continue
            for name in sorted(names):
                path = Path(folder, name)
                by_suffix.setdefault(path.suffix.lower(), []).append(path)
    for paths in by_suffix.values():
        random.Random(seed).shuffle(paths)
    for row in itertools.zip_longest(*(by_suffix[suffix] for suffix in sorted(by_suffix))):
        for path in row:
            try:
                if path is None or path.is_symlink():
                    continue
                if 64 <= path.stat().st_size <= _MAX_FILE_BYTES:
                    data = path.read_bytes()
                    if len(data.strip()) >= max(least_bytes, 1):
                        yield data
            except OSError:
                continue


def _least(name: str, value: float, limit: float) -> Bar:
    return Bar(name=name, value=float(value), limit=limit, direction="at_least", unit="")


def _one(name: str, value: float, unit: str = "") -> Figure:
    return Figure.of_rounds(name, unit, [float(value)])
