"""Encoded images to pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.bundle.manifest import ImagePreprocessing
from nearfar.errors import InvalidInput
from nearfar.processing import image as module
from nearfar.processing.image import pixels_of

Image = pytest.importorskip("PIL.Image")

PLAIN = ImagePreprocessing(input="x", resize=(4, 6), resample="nearest", scale=1.0)


def png(array: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", **options)
    return stream.getvalue()


def colours(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pixels_are_channels_first_and_in_the_order_that_is_stated():
    picture = colours(4, 6)
    pixels = pixels_of([png(picture)], PLAIN)
    assert (pixels.shape, pixels.dtype) == ((1, 3, 4, 6), np.float32)
    np.testing.assert_array_equal(pixels[0].transpose(1, 2, 0), picture)
    swapped = ImagePreprocessing(input="x", resize=(4, 6), resample="nearest", scale=1.0,
                                 channels="BGR")  # fmt: skip
    np.testing.assert_array_equal(pixels_of([png(picture)], swapped), pixels[:, ::-1])


def test_the_shorter_side_is_resized_and_the_middle_cut_out():
    spec = ImagePreprocessing(input="x", resize=(8,), crop=(8, 4), resample="nearest", scale=1.0)
    picture = colours(8, 17)
    pixels = pixels_of([png(picture)], spec)[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(pixels, picture[:, 6:10])
    tall = pixels_of([png(colours(40, 16))], spec)
    assert tall.shape == (1, 3, 8, 4)


def test_values_are_scaled_and_normalised_for_each_channel():
    spec = ImagePreprocessing(input="x", resize=(1, 1), mean=(0.5, 0.0, 1.0), std=(0.5, 1.0, 2.0))
    white = png(np.full((1, 1, 3), 255, np.uint8))
    assert pixels_of([white], spec).ravel().tolist() == [1.0, 1.0, 0.0]


def test_grey_colour_palette_and_transparent_images_all_become_what_the_model_sees():
    spec = ImagePreprocessing(input="x", resize=(2, 2), channels="L", mean=(0.0,), std=(1.0,))
    for mode in ("L", "RGB", "RGBA", "P", "1", "LA"):
        stream = io.BytesIO()
        Image.new(mode, (3, 3)).save(stream, "PNG")
        assert pixels_of([stream.getvalue()], spec).shape == (1, 1, 2, 2)
        assert pixels_of([stream.getvalue()], PLAIN).shape == (1, 3, 4, 6)


def test_a_photograph_that_lies_on_its_side_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to the right
    picture = colours(6, 4)
    turned = pixels_of([png(picture, exif=exif)], PLAIN)[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(turned, np.rot90(picture, -1))


def test_an_image_that_claims_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_MAX_PIXELS", 23)
    with pytest.raises(InvalidInput, match="6 x 4 pixels"):
        pixels_of([png(colours(4, 6))], PLAIN)


@given(st.binary(max_size=80), st.integers(0, 120))
def test_damaged_images_are_refused_and_nothing_else(noise: bytes, cut: int):
    whole = png(colours(4, 6))
    for data in (noise, whole[: min(cut, len(whole) - 20)], whole[:cut] + noise):
        try:
            pixels = pixels_of([data], PLAIN)
        except InvalidInput:
            continue
        assert pixels.shape == (1, 3, 4, 6)
