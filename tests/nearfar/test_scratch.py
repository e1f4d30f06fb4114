"""What is framed where it lies is what the library would have made of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from websockets.utils import apply_mask

from nearfar.scratch import of_thread

MASK = bytes.fromhex("00ff5aa5")
#: Around words.
SIZES = [0, 1, 7, 8, 9, 4095, 4096, 4097, 4103, 150_001]


@pytest.mark.parametrize("mask", [MASK, b""])
@pytest.mark.parametrize("size_bytes", SIZES)
def test_a_frame_is_its_head_and_what_lay_in_the_room(size_bytes: int, mask: bytes) -> None:
    payload = bytes(range(1, 256)) * (size_bytes // 255 + 1)
    scratch = of_thread()
    scratch.room[:size_bytes] = payload[:size_bytes]
    framed = bytes(scratch.framed(size_bytes, b"head" + mask, mask))
    assert framed[: 4 + len(mask)] == b"head" + mask
    expected = payload[:size_bytes]
    assert framed[4 + len(mask) :] == (apply_mask(expected, mask) if mask else expected)


def test_threads_share_no_memory() -> None:
    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(of_thread).result()
    mine = of_thread()
    assert mine is of_thread()
    assert theirs.room.obj is not mine.room.obj
    assert theirs.plain.obj is not mine.plain.obj
