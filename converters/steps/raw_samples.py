"""Images and sounds as files: made up, or read from a folder that a person gave."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from converters.libraries import load
from converters.steps.verify_tensors import LABELS, Feeds
from nearfar.bundle.manifest import AudioPreprocessing, ImagePreprocessing
from nearfar.errors import ConversionError, InvalidInput

RawPreprocessing = ImagePreprocessing | AudioPreprocessing

#: Of a person's folder, and made up.
_MAX_FILES, _MADE_UP = 1000, 64
_SUFFIXES = {
    "image": frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}),
    "audio": frozenset({".wav"}),
}
#: Of an image that is made up, and its coarsest pattern.
_SIDES, _GRID = (96, 640), 8
_SOUND_S = 1.0


def raw_samples(
    path: Path | None, spec: RawPreprocessing, labels: Sequence[str], seed: int
) -> tuple[list[Feeds], str]:
    """Inputs to verify with.

    Args:
        path: A folder with images or WAV files; in folders named like classes, the files' folder
            is their right class. `None` makes some up.
        spec: How files become inputs.
        labels: Names of the classes.
        seed: Of what is made up.

    Returns:
        (inputs of one call each, what they are for people).

    Raises:
        ConversionError: There are no such files, or one does not fit.
    """
    what = "images" if isinstance(spec, ImagePreprocessing) else "sounds"
    if path is None:
        made = made_up(spec, seed, _MADE_UP)
        return [feeds_of(data, spec) for data in made], f"made-up {what} (real ones: --samples)"
    files = sorted(_files(path, _SUFFIXES["image" if what == "images" else "audio"]))[:_MAX_FILES]
    if not files:
        raise ConversionError(f"There are no {what} in {path}", fix="Give a folder that has some")
    known = {name: number for number, name in enumerate(labels)}
    is_labelled = all(file.parent.name in known for file in files)
    feeds = []
    for file in files:
        try:
            feed = feeds_of(file.read_bytes(), spec)
        except (InvalidInput, OSError) as exc:
            raise ConversionError(
                f"{file} cannot be a sample: {exc}", fix="Take it out of the folder"
            ) from exc
        if is_labelled:
            feed[LABELS] = np.array([known[file.parent.name]])
        feeds.append(feed)
    return feeds, what


def feeds_of(data: bytes, spec: RawPreprocessing) -> Feeds:
    """One file as the model is given it.

    Raises:
        InvalidInput: It does not fit.
    """
    if isinstance(spec, ImagePreprocessing):
        from nearfar.processing.image import pixels_of

        return {spec.input: pixels_of([data], spec)}
    from nearfar.processing.audio import samples_of

    return {spec.input: samples_of([data], spec)}


def made_up(spec: RawPreprocessing, seed: int, count: int) -> list[bytes]:
    """PNG or WAV files, always the same for a seed: for want of real ones."""
    generator = np.random.default_rng(seed)
    make: Callable[[], bytes]
    if isinstance(spec, ImagePreprocessing):
        load("PIL.Image")

        def make() -> bytes:
            return _image(generator)
    else:
        sound = spec

        def make() -> bytes:
            return _sound(generator, sound)

    return [make() for _ in range(count)]


def _image(generator: np.random.Generator) -> bytes:
    """Soft patches of colour with an edge and some noise, of any size and proportion."""
    from PIL import Image

    width, height = (int(side) for side in generator.integers(*_SIDES, 2))
    coarse = generator.integers(0, 256, (_GRID, _GRID, 3), dtype=np.uint8)
    soft = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(soft).astype(np.int16)
    edge = int(generator.integers(width // 4, width // 2))
    pixels[:, edge:] = 255 - pixels[:, edge:]
    pixels = pixels + generator.integers(-12, 13, pixels.shape, dtype=np.int16)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _sound(generator: np.random.Generator, spec: AudioPreprocessing) -> bytes:
    """A tone that rises or falls, its harmonics and noise."""
    rate = spec.sample_rate_hz
    count = int(generator.uniform(0.5, 1.5) * _SOUND_S * rate)
    count = min(max(count, spec.min_samples), spec.max_samples)
    first, last = generator.uniform(80, rate / 8, 2)
    phase = 2 * np.pi * np.cumsum(np.linspace(first, last, count)) / rate
    weights = generator.uniform(0, 1, 4)
    tone = sum(weight * np.sin(n * phase) for n, weight in enumerate(weights, 1))
    loudness = np.sin(np.pi * np.linspace(0, generator.uniform(1, 6), count)) ** 2
    noise = generator.uniform(0.01, 0.3) * generator.standard_normal(count)
    signal = (tone * loudness + noise) / 5
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((signal.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return stream.getvalue()


def _files(path: Path, suffixes: frozenset[str]) -> Iterator[Path]:
    """Files of that kind in a folder and in the folders of it."""
    if path.is_file():
        yield path
        return
    for pattern in ("*", "*/*"):
        for file in path.glob(pattern):
            if file.is_file() and file.suffix.lower() in suffixes:
                yield file
