"""Encoded images to pixels, with Pillow: as the image processors of transformers do it.

Pillow is the filter that most image models were tried with; other libraries resize differently.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from nearfar.bundle.manifest import ImagePreprocessing
from nearfar.errors import ConfigError, EngineError, InvalidInput

#: Formats that every build of Pillow decodes. Others, some rarely used and rarely tested, never
#: meet bytes of strangers.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
#: Decoded, one has three bytes to a pixel; a file of some kilobytes may claim any size.
_MAX_PIXELS = 64_000_000
#: After resizing. A strip of one pixel in width becomes very long when its shorter side grows.
_MAX_RESIZED = 16_000_000
#: zlib's: the quickest, for a tenth more bytes than the usual one.
_COMPRESSION = 1


def pixels_of(images: Sequence[bytes], spec: ImagePreprocessing) -> np.ndarray:
    """Decode, turn upright (EXIF), resize, cut and scale.

    Args:
        images: Encoded images; of one with several pictures the first is taken.
        spec: How.

    Returns:
        float32 of shape (len(images), channels, height, width).

    Raises:
        InvalidInput: One is no image, or has too many pixels.
        EngineError: Pillow is not installed.
    """
    return np.stack([_pixels(data, spec) for data in images])


def reduce(data: bytes, spec: ImagePreprocessing) -> bytes:
    """The part of an image that the model can see, so that the rest need not leave the device.

    Its pixels, upright and no more of them than it is resized to, as PNG: nothing of who made it,
    when, where and with what. ``pixels_of([reduce(data, spec)], spec)`` equals
    ``pixels_of([data], spec)``.

    Raises:
        InvalidInput: As `pixels_of`.
        ConfigError: Pillow is not installed, which no route can help.
    """
    try:
        pillow = _pillow()
    except EngineError as error:
        raise ConfigError(error.problem, field="data", fix=error.fix) from error
    image, size = _upright(data, spec, pillow)
    if size[0] * size[1] < image.width * image.height:
        image = image.resize(size, pillow.Resampling[spec.resample.upper()])
    stream = io.BytesIO()
    # Made of the pixels alone: what else Pillow knows of an image, it may write into the file.
    pixels = pillow.frombytes(image.mode, image.size, image.tobytes())
    pixels.save(stream, "PNG", compress_level=_COMPRESSION)
    return stream.getvalue()


def _pixels(data: bytes, spec: ImagePreprocessing) -> np.ndarray:
    pillow = _pillow()
    image, (width, height) = _upright(data, spec, pillow)
    image = image.resize((width, height), pillow.Resampling[spec.resample.upper()])
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    if spec.crop is not None:
        top, left = ((of - to) // 2 for of, to in zip((height, width), spec.crop, strict=True))
        values = values[top : top + spec.crop[0], left : left + spec.crop[1]]
    if spec.channels == "BGR":
        values = values[..., ::-1]
    scaled = (values * np.float64(spec.scale)).astype(np.float32)
    normal = (scaled - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))


def _upright(data: bytes, spec: ImagePreprocessing, pillow: Any) -> tuple[Any, tuple[int, int]]:
    """The decoded image, and width and height to resize it to."""
    image = _decoded(data, "L" if spec.channels == "L" else "RGB", pillow)
    width, height = _size(image.width, image.height, spec.resize)
    if width * height > _MAX_RESIZED:
        raise InvalidInput(
            f"The image has {image.width} x {image.height} pixels, and is too long for a model "
            f"that resizes its shorter side to {spec.resize[0]}",
            field="data",
            fix="Cut it, and ask for each part",
        )
    return image, (width, height)


def _decoded(data: bytes, mode: str, pillow: Any) -> Any:
    from PIL import ImageOps

    try:
        with pillow.open(io.BytesIO(data), formats=_FORMATS) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                raise InvalidInput(
                    f"The image has {opened.width} x {opened.height} pixels, more than "
                    f"{_MAX_PIXELS} together",
                    field="data",
                    fix="Make it smaller; the model sees a few hundred pixels of each side",
                )
            return ImageOps.exif_transpose(opened).convert(mode)
    except InvalidInput:
        raise
    # Pillow's decoders raise what they like on damaged files: OSError, SyntaxError, struct.error.
    except Exception as exc:
        raise InvalidInput(
            f"The data is no image that can be decoded ({type(exc).__name__})",
            field="data",
            fix=f"Give the bytes of a file of the kind {', '.join(_FORMATS)}",
        ) from exc


def _size(width: int, height: int, resize: tuple[int, ...]) -> tuple[int, int]:
    """(width, height) after resizing."""
    if len(resize) == 2:
        return resize[1], resize[0]
    (side,) = resize
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as exc:
        raise EngineError(
            f"Models that see images need the package Pillow ({exc})",
            fix="pip install 'nearfar[images]'",
        ) from exc
    # On DEBUG it logs the tags of each file, with place and owner. Who wants that says so of "PIL";
    # of everything is not enough.
    log = logging.getLogger("PIL")
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    return Image
