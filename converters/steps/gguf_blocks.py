"""Blocks of weights as GGUF files have them, and as `MatMulNBits` of ONNX Runtime takes them.

Both have blocks of 32 weights with one scale, so codes and scales can be taken over as they are.
What differs is the offset. Q4_1 has a minimum for each block, ``w = d q + m`` with any `m`;
`MatMulNBits` takes a zero point of four bits, ``w = d (q - z)``. (Or a float one, for which it has
no fast CPU kernel: measured 25 times slower.) So the minimum is written as

    m = -d z + r,    z = round(-m / d),    |r| <= d / 2

and what is left, `r`, is the same for the 32 weights of its block: 32 `r` is multiplied by the mean
of 32 inputs. These means are appended to the inputs as further columns, and 32 `r` to the matrix as
further blocks of four-bit codes. One such digit leaves an error of at most a fifteenth of `r`, two
leave less than the half-precision `m` of the file is exact to:

    y = MatMulNBits([x, means(x)], [q, codes of 32 r])

Means and not sums, because one node of ONNX Runtime makes them (`AveragePool`).

Blocks of Q4_K are of the same form; their scales and minima are products of a half-precision
number and one of six bits. Such a product has at most 17 binary digits, so it is exact in float32,
and ``d q + m`` is the same float32 number as in llama.cpp.

Layouts: gguf.md and ggml-quants.c of ggml; ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Weights of one block, in GGUF's types below and in what the model builder writes.
BLOCK = 32

_SIZES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
#: A super-block of Q4_K: 8 blocks, whose scales and minima are six-bit multiples of two numbers.
_SUPER, _SUPER_BYTES = 8, 144


@dataclass(frozen=True, slots=True)
class Blocks:
    """One weight matrix as blocks.

    Attributes:
        bits: 4 or 8.
        codes: uint8, shape (rows, blocks, 32), not packed; blocks that are rounded here may be
            longer.
        scales: float16, for Q4_K float32; shape (rows, blocks).
        minima: Of the same type and shape, or `None`: then ``w = scale (code - zero point)``,
            else ``w = scale code + minimum``.
        zero_points: uint8 of the same shape; `None`: 8 or 128 everywhere.
    """

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None
    zero_points: np.ndarray | None = None

    @property
    def block(self) -> int:
        """How many weights share a scale."""
        return int(self.codes.shape[2])

    def dequantized(self) -> np.ndarray:
        """The weights, float32 of shape (rows, columns)."""
        codes = self.codes.astype(np.float32)
        scales = self.scales.astype(np.float32)[..., None]
        if self.zero_points is not None:
            values = scales * (codes - self.zero_points[..., None].astype(np.float32))
        elif self.minima is None:
            values = scales * (codes - np.float32(1 << (self.bits - 1)))
        else:
            values = scales * codes + self.minima.astype(np.float32)[..., None]
        return np.asarray(values.reshape(len(codes), -1))

    def piece(self, rows: np.ndarray | slice) -> Blocks:
        """Some rows, or all in another order."""
        minima = None if self.minima is None else self.minima[rows]
        zeros = None if self.zero_points is None else self.zero_points[rows]
        return Blocks(self.bits, self.codes[rows], self.scales[rows], minima, zeros)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix as `MatMulNBits` takes it.

    Attributes:
        bits: 4 or 8.
        codes: uint8, shape (rows, blocks, weights of a block), not packed.
        scales: float16 or float32, shape (rows, blocks).
        zero_points: uint8 of the same shape, or `None`: 8 or 128 everywhere.
        digits: How often the means of the inputs' blocks follow the inputs.
    """

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None = None
    digits: int = 0

    @property
    def block(self) -> int:
        """How many weights share a scale."""
        return int(self.codes.shape[2])

    @property
    def columns(self) -> int:
        """Inputs, appended means included."""
        return int(self.codes.shape[1]) * self.block

    @property
    def blocks(self) -> int:
        """Blocks of a row, without those of means."""
        return _blocks_before(self.codes.shape[1], self.digits)

    def packed_codes(self) -> np.ndarray:
        """uint8, shape (rows, blocks, 4 * bits)."""
        return packed(self.codes) if self.bits == 4 else self.codes

    def packed_zero_points(self) -> np.ndarray | None:
        """uint8, two in a byte, each row padded to whole bytes."""
        if self.zero_points is None:
            return None
        padding = self.zero_points.shape[1] % 2
        return packed(np.pad(self.zero_points, ((0, 0), (0, padding))))

    def effective(self) -> np.ndarray:
        """The weights that it stands for, float32 of shape (rows, columns without means)."""
        middle = np.float32(1 << (self.bits - 1))
        zeros = middle if self.zero_points is None else self.zero_points[..., None].astype("f4")
        values = (self.codes.astype(np.float32) - zeros) * self.scales.astype(np.float32)[..., None]
        if not self.digits:
            return np.asarray(values.reshape(len(values), -1))
        blocks = self.blocks
        rests = values[:, blocks:].reshape(len(values), self.digits, -1)[..., :blocks].sum(axis=1)
        return np.asarray((values[:, :blocks] + rests[..., None] / BLOCK).reshape(len(values), -1))


def read_blocks(kind: str, data: np.ndarray) -> Blocks | None:
    """Blocks of a GGUF tensor; `None` for types that have no equal here.

    Args:
        kind: ``Q4_0``, ``Q4_1``, ``Q4_K``, ``Q8_0``; others are not carried over.
        data: uint8 of shape (rows, bytes of a row).
    """
    if kind == "Q4_K":
        return _read_super_blocks(data)
    if kind not in _SIZES:
        return None
    raw = np.ascontiguousarray(data).reshape(len(data), -1, _SIZES[kind])

    def half(start: int) -> np.ndarray:
        found: np.ndarray = np.ascontiguousarray(raw[..., start : start + 2]).view("<f2")[..., 0]
        return found

    if kind == "Q8_0":
        codes = (raw[..., 2:].view(np.int8).astype(np.int16) + 128).astype(np.uint8)
        return Blocks(8, codes, half(0), None)
    nibbles = raw[..., 4:] if kind == "Q4_1" else raw[..., 2:]
    # The first sixteen weights are in the low halves of the bytes, the others in the high ones.
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    return Blocks(4, codes, half(0), half(2) if kind == "Q4_1" else None)


def _read_super_blocks(data: np.ndarray) -> Blocks:
    raw = np.ascontiguousarray(data).reshape(len(data), -1, _SUPER_BYTES)
    factors = np.ascontiguousarray(raw[..., :4]).view("<f2").astype(np.float32)
    packed = raw[..., 4:16].reshape(*raw.shape[:2], 3, 4)
    low, middle, high = packed[..., 0, :], packed[..., 1, :], packed[..., 2, :]
    # The first four have six bits of a byte, the last four their upper two bits in those bytes.
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=-1)
    nibbles = raw[..., 16:].reshape(*raw.shape[:2], _SUPER // 2, 1, BLOCK)
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-2)
    return Blocks(
        4,
        codes.reshape(len(raw), -1, BLOCK),
        (factors[..., :1] * scales).reshape(len(raw), -1),
        -(factors[..., 1:] * minima).reshape(len(raw), -1),
    )


def joined(parts: Sequence[Blocks]) -> Blocks | None:
    """Matrices with the same inputs as one; `None` if they are not of one kind."""
    if len({_form(blocks) for blocks in parts}) != 1:
        return None
    minima = [blocks.minima for blocks in parts if blocks.minima is not None]
    zero_points = [blocks.zero_points for blocks in parts if blocks.zero_points is not None]
    return Blocks(
        parts[0].bits,
        np.concatenate([blocks.codes for blocks in parts]),
        np.concatenate([blocks.scales for blocks in parts]),
        np.concatenate(minima) if minima else None,
        np.concatenate(zero_points) if zero_points else None,
    )


def _form(blocks: Blocks) -> tuple[object, ...]:
    """What matrices must have in common to become one."""
    have = blocks.minima is None, blocks.zero_points is None
    return blocks.bits, *have, *blocks.codes.shape[1:], blocks.scales.dtype


def matrix_of(blocks: Blocks, *, digits: int) -> Matrix:
    """Blocks as `MatMulNBits` takes them.

    Args:
        blocks: As in the file.
        digits: Of four bits, for what zero points leave of the minima; 0 drops it.
    """
    if blocks.minima is None:
        return Matrix(blocks.bits, blocks.codes, blocks.scales, blocks.zero_points)
    scales = blocks.scales.astype(np.float32)
    minima = blocks.minima.astype(np.float32)
    # A scale of zero is a block of 32 equal weights: its minimum is their scale then.
    is_flat = scales == 0
    shifts = np.divide(-minima, scales, out=np.full_like(minima, 8), where=~is_flat)
    zero_points = np.clip(np.rint(shifts), 0, 15)
    # What a mean of inputs is multiplied by: as often as it has inputs.
    rest = BLOCK * np.where(is_flat, np.float32(0), minima + scales * zero_points)
    codes = [np.where(is_flat[..., None], np.uint8(9), blocks.codes)]
    halves = [np.where(is_flat, blocks.minima, blocks.scales)]
    zeros = [zero_points.astype(np.uint8)]
    for _ in range(digits):
        digit, half = _digit(rest)
        values = (digit.astype(np.float32) - 8) * half.astype(np.float32)[..., None]
        rest = rest - values.reshape(len(rest), -1)[:, : rest.shape[1]]
        codes.append(digit)
        halves.append(half)
        zeros.append(np.full(half.shape, 8, np.uint8))
    return Matrix(
        blocks.bits,
        np.concatenate(codes, axis=1),
        np.concatenate(halves, axis=1),
        np.concatenate(zeros, axis=1),
        digits,
    )


def mean_columns(blocks: int) -> int:
    """How many columns the means of so many blocks take, padded to whole blocks."""
    return -(-blocks // BLOCK) * BLOCK


def _blocks_before(blocks: int, digits: int) -> int:
    """How many of `blocks` hold weights, where `digits` times their means follow."""
    for count in range(blocks, 0, -1):
        if count + digits * mean_columns(count) // BLOCK == blocks:
            return count
    raise ValueError(f"{blocks} blocks cannot end with {digits} digits of means")


def _digit(rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round to four bits, 32 numbers of a row with one scale.

    Returns:
        Codes with zero point 8, uint8 of shape (rows, blocks, 32), and scales, float16.
    """
    columns = mean_columns(rest.shape[1])
    padded = np.pad(rest, ((0, 0), (0, columns - rest.shape[1]))).reshape(len(rest), -1, BLOCK)
    # Codes reach from -8 to 7: half a step beyond them is still rounded by half a step only.
    steps = np.maximum(padded.max(axis=-1) / 7.5, -padded.min(axis=-1) / 8.5)
    scales = steps.astype(np.float16)
    wide = scales.astype(np.float32)[..., None]
    codes = np.divide(padded, wide, out=np.zeros_like(padded), where=wide != 0)
    return (np.clip(np.rint(codes), -8, 7) + 8).astype(np.uint8), scales


def packed(nibbles: np.ndarray) -> np.ndarray:
    """Two numbers of four bits in a byte, the first in the low half."""
    return np.asarray(nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), dtype=np.uint8)


def unpacked(pairs: np.ndarray) -> np.ndarray:
    """What `packed` packed."""
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], -1)
