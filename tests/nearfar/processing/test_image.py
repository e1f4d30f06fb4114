"""Encoded images to pixels."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.bundle.manifest import ImagePreprocessing
from nearfar.errors import InvalidInput
from nearfar.processing import image as module
from nearfar.processing.image import pixels_of, reduce

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


SPECS = [
    PLAIN,
    ImagePreprocessing(input="x", resize=(9,), crop=(8, 7), channels="BGR"),
    ImagePreprocessing(input="x", resize=(30, 5), resample="bicubic", channels="L", mean=(0.5,),
                       std=(2.0,)),
]  # fmt: skip


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(SPECS), st.integers(1, 8))
def test_what_leaves_of_an_image_is_all_that_the_model_sees(
    height: int, width: int, spec: ImagePreprocessing, orientation: int
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole = png(colours(height, width), exif=exif)
    part = reduce(whole, spec)
    np.testing.assert_array_equal(pixels_of([part], spec), pixels_of([whole], spec))
    assert reduce(part, spec) == part


def photograph(height: int = 300, width: int = 400, kind: str = "JPEG") -> bytes:
    """With an owner and a profile, as cameras write them."""
    exif = Image.Exif()
    exif[0x8298] = "canary the owner"
    exif.get_ifd(0x8825)[1] = "canary the place"
    stream = io.BytesIO()
    image = Image.fromarray(colours(height, width))
    image.save(stream, kind, exif=exif, icc_profile=b"canary the profile", comment=b"canary")
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_nothing_but_pixels_leaves(kind: str):
    whole = photograph(kind=kind)
    assert b"canary" in whole
    part = reduce(whole, ImagePreprocessing(input="x", resize=(16,), crop=(16, 16)))
    chunks, at = [], 8
    while at < len(part):
        chunks.append(part[at + 4 : at + 8])
        at += 12 + int.from_bytes(part[at : at + 4], "big")
    assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}
    assert len(part) < 16 * 22 * 3 + 200 < len(whole)
    transparent = io.BytesIO()
    Image.new("P", (3, 3)).save(transparent, "PNG", transparency=0)
    assert b"tRNS" not in reduce(transparent.getvalue(), PLAIN)


def test_tags_of_an_image_are_logged_nowhere(caplog: pytest.LogCaptureFixture):
    images = [photograph(kind=kind) for kind in ("JPEG", "PNG", "WEBP")]
    library = logging.getLogger("PIL")
    level = library.level
    library.setLevel(logging.NOTSET)
    caplog.set_level(logging.DEBUG)
    try:
        pixels_of(images, PLAIN)
        for image in images:
            reduce(image, PLAIN)
        assert "canary" not in caplog.text
        library.setLevel(logging.DEBUG)  # who asks for it by name has it
        pixels_of(images, PLAIN)
        assert "canary the owner" in caplog.text
    finally:
        library.setLevel(level)


def test_a_strip_that_would_grow_without_end_is_refused():
    spec = ImagePreprocessing(input="x", resize=(224,), crop=(224, 224))
    strip = png(np.zeros((1, 60_000), np.uint8))
    assert len(strip) < 1000
    for see in (lambda: pixels_of([strip], spec), lambda: reduce(strip, spec)):
        with pytest.raises(InvalidInput, match="60000 x 1 pixels, and is too long"):
            see()


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
