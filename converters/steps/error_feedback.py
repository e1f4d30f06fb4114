"""Choose codes of few bits so that what one column's rounding loses, later columns make up for.

This is GPTQ (Frantar et al. 2022, arXiv:2210.17323): with the inputs `x` of a matrix `W` of shape
(outputs, inputs) and ``H = mean(x xT)``, what counts is not how far weights are off but how far
products are, ``tr((W - Q) H (W - Q)T)``. Columns are rounded one after the other; the error of
each, divided by its entry on the diagonal of the upper Cholesky factor `U` of ``H^-1``, is taken
from the columns that follow, times that row of `U`. Columns stay in their order (no "act-order"),
so that blocks of neighbours share a scale and a zero point, as `MatMulNBits` has them.

The scale and zero point of a block are chosen when its first column's turn comes, so that they fit
the weights as earlier columns have changed them.
"""

from __future__ import annotations

import numpy as np

from converters.libraries import load
from converters.steps.gguf_blocks import Blocks

#: Shares of the range of a block's weights that its codes reach over; the best is taken. Less than
#: all rounds the middle more finely and cuts off what is outermost.
_REACHES = (0.76, 0.81, 0.85, 0.89, 0.93, 0.97, 1.0, 1.04)
#: Of a scale in half precision, so that it is not zero: the least that is not denormal.
_LEAST_SCALE = 2.0**-14


def feedback_factor(gram: np.ndarray, damping: float) -> np.ndarray:
    """The upper Cholesky factor of the inverse of ``mean(x xT)``.

    Args:
        gram: Shape (inputs, inputs), symmetric.
        damping: Added to the diagonal, as a share of its mean: few texts say little about inputs
            that are hardly ever there.

    Returns:
        float32 `U` with ``UT U = H^-1``.
    """
    torch = load("torch")
    damped = gram.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)
    # An input that is always zero may be rounded as one likes.
    diagonal[diagonal <= 0] = max(float(diagonal.mean()), 1e-12)
    diagonal += damping * diagonal.mean()
    # H = R RT with R upper is the Cholesky factor of H with its axes turned round; U = R^-1.
    turned = torch.linalg.cholesky(torch.from_numpy(np.ascontiguousarray(damped[::-1, ::-1])))
    factor = torch.linalg.solve_triangular(
        turned.flip(0, 1), torch.eye(len(gram), dtype=torch.float64), upper=True
    )
    return np.ascontiguousarray(factor.numpy(), np.float32)


def round_with_feedback(
    weights: np.ndarray, factor: np.ndarray, *, block: int, bits: int = 4
) -> Blocks:
    """Round a matrix.

    Args:
        weights: float32, shape (outputs, inputs); inputs a multiple of `block`.
        factor: From `feedback_factor`.
        block: How many weights of a row share a scale and a zero point.
        bits: Of a code.
    """
    outputs, inputs = weights.shape
    top = np.float32((1 << bits) - 1)
    codes = np.empty((inputs, outputs), np.uint8)
    scales = np.empty((inputs // block, outputs), np.float16)
    zero_points = np.empty((inputs // block, outputs), np.uint8)
    # Columns lie one behind the other here, for they are what is worked on.
    rest = np.array(weights.T, np.float32, order="C")
    errors = np.empty((block, outputs), np.float32)
    for start in range(0, inputs, block):
        end = start + block
        own = rest[start:end]
        importance = 1 / factor.diagonal()[start:end] ** 2
        scale, zero = _fitting(own, importance / importance.sum(), top)
        scales[start // block], zero_points[start // block] = scale, zero
        for place in range(block):
            row = factor[start + place]
            code = np.clip(np.rint(own[place] / scale) + zero, 0, top)
            codes[start + place] = code
            errors[place] = (own[place] - scale * (code - zero)) / row[start + place]
            own[place + 1 :] -= row[start + place + 1 : end, None] * errors[place]
        rest[end:] -= factor[start:end, end:].T @ errors
    return Blocks(
        bits,
        np.ascontiguousarray(codes.T).reshape(outputs, -1, block),
        np.ascontiguousarray(scales.T),
        None,
        np.ascontiguousarray(zero_points.T),
    )


def _fitting(
    columns: np.ndarray, importance: np.ndarray, top: np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """The best scale and zero point for each row of a block, float32 but exact in fewer bits.

    Args:
        columns: Shape (block, outputs).
        importance: Of each column.
        top: The largest code.
    """
    # Zero is always among what codes can say: zero points are codes themselves.
    low, high = np.minimum(columns.min(axis=0), 0), np.maximum(columns.max(axis=0), 0)
    middle = (low + high) / 2
    best = np.full(columns.shape[1], np.inf, np.float32)
    scales, zeros = np.empty_like(best), np.empty_like(best)
    for reach in _REACHES:
        step = np.maximum((high - low) * np.float32(reach) / top, np.float32(_LEAST_SCALE))
        step = step.astype(np.float16).astype(np.float32)
        zero = np.clip(np.rint(top / 2 - middle / step), 0, top)
        found = columns / step
        np.rint(found, out=found)
        np.clip(found, -zero, top - zero, out=found)
        found *= step
        found -= columns
        np.square(found, out=found)
        error = importance.astype(np.float32) @ found
        is_better = error < best
        np.copyto(best, error, where=is_better)
        np.copyto(scales, step, where=is_better)
        np.copyto(zeros, zero, where=is_better)
    return scales, zeros
