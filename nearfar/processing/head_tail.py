"""Any bytes to a fixed row of integers: the start and the end, without outer white space.

The scheme of magika 1.0 (features extraction v2): look at one block at each end, strip white space
from the left of the first and from the right of the last, keep `head_bytes` and `tail_bytes` of
what is left, pad the head on its right and the tail on its left.
"""

from __future__ import annotations

import numpy as np

from nearfar.bundle.manifest import HeadTailPreprocessing
from nearfar.errors import InvalidInput


def features(data: bytes, spec: HeadTailPreprocessing) -> np.ndarray:
    """The row of integers a model is given.

    Args:
        data: Any bytes; only the first and last `spec.block_bytes` are looked at.
        spec: How much of each end; neither end is longer than a block.

    Returns:
        int32 array of shape (head_bytes + tail_bytes,).

    Raises:
        InvalidInput: The stripped head has fewer than `spec.min_bytes` bytes.
    """
    head, tail = _ends(data, spec)
    if len(head) < min(spec.min_bytes, spec.head_bytes):
        raise InvalidInput(
            f"The data has {len(head)} bytes after leading white space, and the model needs at "
            f"least {spec.min_bytes} to say anything",
            field="data",
            fix="Give more of the data, or do not ask for so little",
        )
    row = np.full(spec.head_bytes + spec.tail_bytes, spec.padding_value, dtype=np.int32)
    row[: len(head)] = np.frombuffer(head, dtype=np.uint8)
    row[len(row) - len(tail) :] = np.frombuffer(tail, dtype=np.uint8)
    return row


def reduce(data: bytes, spec: HeadTailPreprocessing) -> bytes:
    """The part of the data the model can see, so that the rest need not leave the device.

    ``features(reduce(data, spec), spec)`` equals ``features(data, spec)`` for any data.

    Returns:
        At most ``max(head_bytes + tail_bytes, 2 * block_bytes)`` bytes; usually the former.
    """
    if len(data) <= spec.head_bytes + spec.tail_bytes:
        return data
    head, tail = _ends(data, spec)
    if len(head) == spec.head_bytes and len(tail) == spec.tail_bytes:
        # Both ends are full and begin / end without white space: joined, they strip to themselves.
        return head + tail
    # A short end would take bytes from the other one if joined, so the blocks keep their white
    # space, which is what keeps the ends apart.
    if len(data) <= 2 * spec.block_bytes:
        return data
    return data[: spec.block_bytes] + data[-spec.block_bytes :]


def _ends(data: bytes, spec: HeadTailPreprocessing) -> tuple[bytes, bytes]:
    head = data[: spec.block_bytes].lstrip()[: spec.head_bytes]
    last = data[max(0, len(data) - spec.block_bytes) :].rstrip()
    return head, last[max(0, len(last) - spec.tail_bytes) :]
