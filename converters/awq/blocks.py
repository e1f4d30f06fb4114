"""Weights rounded to the nearest of sixteen steps, in blocks of 32 with one scale."""

from __future__ import annotations

import numpy as np

from converters.steps.gguf_blocks import BLOCK, Blocks

#: float16 is exact to eleven digits from here on, and reaches to there.
_LEAST, _MOST = 6.2e-5, 6.5e4
#: Rows that are rounded at a time.
_PIECE = 1024


def round_to_nearest(array: np.ndarray) -> Blocks:
    """Blocks of a matrix: codes -8 to 7, the largest weight of a block being 7 steps.

    The grid is the one that modelopt searches AWQ's scales for (``num_bits`` 4, symmetric).

    Args:
        array: Shape (outputs, inputs); inputs are a multiple of 32.
    """
    blocks = array.shape[1] // BLOCK
    codes = np.empty((len(array), blocks, BLOCK), np.uint8)
    steps = np.empty((len(array), blocks), np.float32)
    for start in range(0, len(array), _PIECE):
        at = slice(start, start + _PIECE)
        steps[at] = np.abs(array[at].reshape(-1, blocks, BLOCK)).max(axis=-1) / np.float32(7)
    steps[steps == 0] = 1
    scales = steps
    if steps.min() >= _LEAST and steps.max() <= _MOST:
        scales = steps.astype(np.float16)
    for start in range(0, len(array), _PIECE):
        at = slice(start, start + _PIECE)
        # By the scale as it is stored, so that storing it costs nothing.
        values = array[at].reshape(-1, blocks, BLOCK) / scales[at].astype(np.float32)[..., None]
        codes[at] = np.clip(np.rint(values), -8, 7) + 8
    return Blocks(4, codes, scales, None)
