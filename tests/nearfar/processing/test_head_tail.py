"""Head and tail features: the same integers as magika 1.0's own code, also after reducing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nearfar.bundle.manifest import HeadTailPreprocessing
from nearfar.errors import InvalidInput
from nearfar.processing.head_tail import features, reduce

MAGIKA = HeadTailPreprocessing(
    head_bytes=1024, tail_bytes=1024, block_bytes=4096, padding_value=256, min_bytes=8
)
SMALL = HeadTailPreprocessing(head_bytes=4, tail_bytes=3, block_bytes=9, padding_value=256)

#: White space is what the scheme is about, so it is half of what is drawn.
BYTES = st.lists(
    st.one_of(st.sampled_from(list(b" \t\n\r\x0b\x0c")), st.integers(0, 255)), max_size=60
).map(bytes)

SPECS = st.builds(
    lambda head, tail, more: HeadTailPreprocessing(
        head_bytes=head, tail_bytes=tail, block_bytes=max(head, tail) + more, padding_value=256
    ),
    st.integers(1, 8),
    st.integers(0, 8),
    st.integers(0, 8),
)


def reference(data: bytes, spec: HeadTailPreprocessing) -> list[int]:
    """magika 1.0.3, `_extract_features_from_seekable`, step by step as it is written there."""
    bytes_num_to_read = min(spec.block_bytes, len(data))
    beg_ints: list[int] = []
    if spec.head_bytes > 0:
        beg_content = data[0:bytes_num_to_read].lstrip()
        if spec.head_bytes < len(beg_content):
            beg_content = beg_content[0 : spec.head_bytes]
        beg_ints = list(map(int, beg_content))
        if len(beg_ints) < spec.head_bytes:
            beg_ints = beg_ints + [spec.padding_value] * (spec.head_bytes - len(beg_ints))
    end_ints: list[int] = []
    if spec.tail_bytes > 0:
        start = len(data) - bytes_num_to_read
        end_content = data[start : start + bytes_num_to_read].rstrip()
        if spec.tail_bytes < len(end_content):
            end_content = end_content[len(end_content) - spec.tail_bytes : len(end_content)]
        end_ints = list(map(int, end_content))
        if len(end_ints) < spec.tail_bytes:
            end_ints = [spec.padding_value] * (spec.tail_bytes - len(end_ints)) + end_ints
    return beg_ints + end_ints


@given(BYTES, SPECS)
def test_features_are_those_of_the_reference_algorithm(data, spec):
    assert features(data, spec).tolist() == reference(data, spec)


@given(BYTES, SPECS)
@example(b" " * 9 + b"abcdef" + b" " * 9, SMALL)  # white space fills both blocks
@example(b"ab" + b" " * 20 + b"cd", SMALL)  # both ends short, far apart
@example(b" " * 40, SMALL)
def test_reduced_data_has_the_same_features(data, spec):
    reduced = reduce(data, spec)
    assert features(reduced, spec).tolist() == features(data, spec).tolist()
    assert len(reduced) <= len(data)


@pytest.mark.parametrize("size", [0, 7, 8, 1023, 1024, 2048, 2049, 4095, 4096, 4097, 8192, 9000])
def test_sizes_around_every_limit_of_magika_match_the_reference(size):
    spec = HeadTailPreprocessing(
        head_bytes=1024, tail_bytes=1024, block_bytes=4096, padding_value=256
    )
    random = np.random.default_rng(size)
    for edge in (b"", b"  \n", b" " * 3000, b" " * 4096):
        data = edge + random.bytes(size) + edge
        assert features(data, spec).tolist() == reference(data, spec)
        assert features(reduce(data, spec), spec).tolist() == reference(data, spec)


def test_what_leaves_the_device_of_a_large_file_is_head_and_tail_only():
    data = b"head" * 1000 + b"\0" * 1_000_000 + b"tail" * 1000
    assert reduce(data, MAGIKA) == data[:1024] + data[-1024:]


def test_small_data_is_left_alone():
    assert reduce(b"  hello  ", MAGIKA) == b"  hello  "


def test_row_has_the_type_and_size_the_model_takes():
    row = features(b"x" * 100, MAGIKA)
    assert row.dtype == np.int32
    assert row.shape == (2048,)


@pytest.mark.parametrize("data", [b"", b"1234567", b"  \n 1234567", b" " * 10_000 + b"12345678"])
def test_too_few_bytes_are_an_error_that_says_how_many_are_needed(data):
    with pytest.raises(InvalidInput, match="at least 8") as caught:
        features(data, MAGIKA)
    assert caught.value.field == "data"
    with pytest.raises(InvalidInput, match="at least 8"):  # reducing changes nothing about it
        features(reduce(data, MAGIKA), MAGIKA)


def test_just_enough_bytes_are_enough():
    assert features(b"  12345678", MAGIKA)[:8].tolist() == list(b"12345678")
