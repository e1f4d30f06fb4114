from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import ConfigError
from nearfar.secure.shaping import (
    BUCKET_BYTES,
    LEVELS,
    check_shaping,
    padded_bytes,
    padme_bytes,
    strongest,
)
from nearfar.wire import messages

# Written out by hand from the paper's algorithm: L, E = floor(log2 L), S = floor(log2 E) + 1,
# the last E - S bits are zero.
PADME = {
    1: 1, 2: 2, 3: 3, 8: 8, 9: 10, 10: 10, 17: 18, 100: 104, 128: 128, 129: 144,
    1000: 1024, 1025: 1088, 65_536: 65_536, 65_537: 67_584, 1_000_000: 1_015_808,
}  # fmt: skip


@pytest.mark.parametrize(("size_bytes", "padded"), PADME.items())
def test_padme_of_known_sizes(size_bytes: int, padded: int) -> None:
    assert padme_bytes(size_bytes) == padded


@given(st.integers(1, 2**40))
def test_padme_costs_at_most_twelve_percent(size_bytes: int) -> None:
    padded = padme_bytes(size_bytes)
    assert size_bytes <= padded <= size_bytes * 1.12
    assert padme_bytes(padded) == padded


def test_padme_leaves_few_sizes_to_tell_apart() -> None:
    for limit in (2**10, 2**14, 2**17):
        left = {padme_bytes(size) for size in range(1, limit)}
        assert len(left) <= math.log2(limit) * 2 ** math.log2(math.log2(limit)) * 2


@given(st.integers(0, 2**30))
def test_padded_sizes_are_whole_buckets(size_bytes: int) -> None:
    padded = padded_bytes(size_bytes)
    assert padded >= max(size_bytes, BUCKET_BYTES)
    assert padded % BUCKET_BYTES == 0
    assert padded < size_bytes * 1.12 + BUCKET_BYTES + 1
    assert padded_bytes(padded) == padded


def test_levels_are_ordered_and_the_same_on_the_wire() -> None:
    assert get_args(messages.Shaping) == LEVELS
    assert strongest("off", "balanced") == "balanced"
    assert strongest("strict", "balanced") == "strict"
    assert [check_shaping(level) for level in LEVELS] == list(LEVELS)


@pytest.mark.parametrize("text", ["", "Balanced", "on", "x" * 1000])
def test_unknown_level_is_a_typed_error(text: str) -> None:
    with pytest.raises(ConfigError, match="'off', 'balanced' or 'strict'") as caught:
        check_shaping(text)
    assert caught.value.field == "shaping"
    assert len(caught.value.problem) < 100
