"""What of raw input leaves the device, by the kind of preprocessing."""

from __future__ import annotations

from nearfar.bundle.manifest import ImagePreprocessing, TextPreprocessing
from nearfar.processing.head_tail import reduce
from nearfar.processing.reduction import Seen, is_slow, reduced, seen_of
from tests.support.tiny import AUDIO, HEAD_TAIL, IMAGE


def test_what_no_preprocessing_reads_leaves_as_it_is():
    text = TextPreprocessing(tokenizer="tokenizer.json", max_length_tokens=8)
    assert reduced(b"as it is", None) == reduced(b"as it is", text) == b"as it is"
    assert reduced(b"x" * 999, HEAD_TAIL) == reduce(b"x" * 999, HEAD_TAIL)


def test_what_is_seen_does_not_depend_on_the_input():
    assert seen_of(HEAD_TAIL) == Seen(32, 32)
    assert seen_of(IMAGE) == Seen(3 * 8 * 8, 3 * 10 * 10)
    grey = ImagePreprocessing(input="x", resize=(5, 7), channels="L", mean=(0.0,), std=(1.0,))
    assert seen_of(grey) == Seen(35, 35)


def test_images_and_sounds_are_read_beside_the_event_loop():
    assert is_slow(IMAGE)
    assert is_slow(AUDIO)
    assert not is_slow(HEAD_TAIL)
    assert not is_slow(None)
