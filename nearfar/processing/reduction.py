"""What of raw input a model can see: the rest need not leave the device."""

from __future__ import annotations

from typing import NamedTuple

from nearfar.bundle.manifest import (
    AudioPreprocessing,
    HeadTailPreprocessing,
    ImagePreprocessing,
    Preprocessing,
)


def reduced(data: bytes, spec: Preprocessing | None) -> bytes:
    """The part of one input that the model can see; preprocessing makes the same of both.

    Args:
        data: What an app gave.
        spec: The model's preprocessing.

    Raises:
        InvalidInput: It is nothing that the model takes.
        EngineError: A package is missing that reads it.
    """
    if isinstance(spec, HeadTailPreprocessing):
        from nearfar.processing import head_tail

        return head_tail.reduce(data, spec)
    if isinstance(spec, ImagePreprocessing):
        from nearfar.processing import image

        return image.reduce(data, spec)
    if isinstance(spec, AudioPreprocessing):
        from nearfar.processing import audio

        return audio.reduce(data, spec)
    return data


class Seen(NamedTuple):
    """What a model sees of one input, however large that is.

    Attributes:
        elements: Numbers that it is given.
        most_bytes: About how much of an input leaves at most.
    """

    elements: int
    most_bytes: int


def seen_of(spec: HeadTailPreprocessing | ImagePreprocessing) -> Seen:
    """What a model with such preprocessing sees of one input."""
    if isinstance(spec, HeadTailPreprocessing):
        width = spec.head_bytes + spec.tail_bytes
        return Seen(width, width)
    channels, height, width = spec.shape
    # As a square, when only the shorter side is known, and as if nothing could be compressed.
    return Seen(channels * height * width, channels * spec.resize[0] * spec.resize[-1])


def is_slow(spec: Preprocessing | None) -> bool:
    """Whether `reduced` takes as long as the input is large, so that no event loop may wait."""
    return isinstance(spec, (ImagePreprocessing, AudioPreprocessing))
