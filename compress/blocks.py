"""Weight-only grids: 4 or 8 bits with a scale and a zero for each block of neighbouring inputs, as in `MatMulNBits`.

Activations are not part of it, so all that is lost is lost in the weights. Columns are rounded so that their errors
cancel on the calibration inputs (compress/rounding.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import Floats
from compress.rounding import compensate

CACHED = 1 << 17  # weights searched at a time: what a core's cache holds
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of a 4-bit block's range: clipped, it has finer steps
WHOLE = (1.0,)  # 8 bits have steps so fine that clipping never pays
HALF_SCALES = (2.0**-24, 65504.0)  # the smallest and the largest positive float16

Halves = NDArray[np.float16]
UInt8 = NDArray[np.uint8]


class WeightBlocks(NamedTuple):
    """A weight [N, K] as `scale * (levels - zero)`, in blocks of inputs; the last one may be shorter."""

    levels: UInt8  # [N, K], 0 to 2^bits - 1
    scale: Halves  # [N, ceil(K / block)]
    zero: UInt8  # [N, ceil(K / block)], 0 to 2^bits - 1


def round_blocks(weight: Floats, block: int, bits: int, importance: Floats | None = None) -> WeightBlocks:
    """Each to the nearest level of its block's grid.

    The grid's range is the block's, shrunk by the factor whose rounding is nearest, in squares weighted by
    `importance` [K].
    """
    num_outputs, num_inputs = weight.shape
    blocks, top = -(-num_inputs // block), 2**bits - 1
    weights = np.zeros(blocks * block, np.float32)  # of the squares; inputs that fill up the last block have none
    weights[:num_inputs] = 1 if importance is None else importance
    found = WeightBlocks(
        np.empty(weight.shape, np.uint8),
        np.empty((num_outputs, blocks), np.float16),
        np.empty((num_outputs, blocks), np.uint8),
    )
    step = max(1, CACHED // num_inputs)
    for start in range(0, num_outputs, step):
        rows = slice(start, start + step)
        apart = np.zeros((len(weight[rows]), blocks * block), np.float32)
        apart[:, :num_inputs] = weight[rows]
        apart = apart.reshape(-1, blocks, block)
        scale, zero = _search_grids(apart, weights.reshape(blocks, block), top, SHRINK if bits == 4 else WHOLE)
        levels = _levels(apart, scale[..., None], zero[..., None], top)
        found.levels[rows] = levels.reshape(len(apart), -1)[:, :num_inputs]
        found.scale[rows], found.zero[rows] = scale, zero
    return found


def round_blocks_compensating(weight: Floats, hessian: Floats, block: int, bits: int) -> WeightBlocks:
    """Weight [N, K] and hessian [K, K] -> levels whose errors cancel on inputs of that second moment.

    The grids are chosen beforehand, for the weight as it was: so the columns may be rounded in any order.
    """
    found = round_blocks(weight, block, bits, np.diag(hessian))
    scales, top = found.scale.astype(np.float32), 2**bits - 1

    def to_grid(rows: slice, k: int, column: Floats) -> Floats:
        scale, zero = scales[rows, k // block], found.zero[rows, k // block]
        levels = _levels(column, scale, zero, top)
        found.levels[rows, k] = levels
        value: Floats = (levels - zero) * scale
        return value

    compensate(weight, hessian, to_grid)
    return found


def dequantize_blocks(weight: WeightBlocks, block: int) -> Floats:
    """The weight [N, K] that the levels mean."""
    num_inputs = weight.levels.shape[1]
    scale, zero = (np.repeat(x.astype(np.float32), block, axis=1)[:, :num_inputs] for x in weight[1:])
    exact: Floats = scale * (weight.levels - zero)
    return exact


def pack_blocks(weight: WeightBlocks, block: int, bits: int) -> tuple[UInt8, UInt8]:
    """Levels [N, blocks, block * bits / 8] and zeros [N, ceil(blocks * bits / 8)], as `MatMulNBits` reads them.

    Of two in a byte, the first is in the low half. Inputs that fill up the last block meet inputs of 0 there.
    """
    num_outputs, blocks = weight.zero.shape
    levels = np.zeros((num_outputs, blocks * block), np.uint8)
    levels[:, : weight.levels.shape[1]] = weight.levels
    zero = weight.zero
    if bits == 4:
        levels, zero = _join_halves(levels), _join_halves(np.pad(zero, ((0, 0), (0, blocks % 2))))
    return levels.reshape(num_outputs, blocks, -1), zero


def _join_halves(values: UInt8) -> UInt8:
    joined: UInt8 = values[:, 0::2] | np.left_shift(values[:, 1::2], 4, dtype=np.uint8)
    return joined


def _levels(weight: Floats, scale: NDArray[np.floating], zero: UInt8, top: int) -> Floats:
    """The nearest levels, as floats; scale and zero broadcast against the weight."""
    levels: Floats = np.divide(weight, scale, dtype=np.float32)
    np.rint(levels, out=levels)
    levels += zero
    return np.clip(levels, 0, top, out=levels)


def _search_grids(apart: Floats, importance: Floats, top: int, shrink: tuple[float, ...]) -> tuple[Halves, UInt8]:
    """Scale and zero, each [N, blocks], of a weight [N, blocks, block]; importance is [blocks, block]."""
    high = np.maximum(apart.max(axis=-1), 0)  # a grid that holds 0 keeps zeros exact
    low = np.minimum(apart.min(axis=-1), 0)
    best = np.full(high.shape, np.inf, np.float32)
    best_scale, best_zero = np.empty(high.shape, np.float16), np.empty(high.shape, np.uint8)
    for factor in shrink:
        scale = np.clip((high - low) * (factor / top), *HALF_SCALES).astype(np.float16)
        zero = np.clip(np.rint(-low * factor / scale), 0, top).astype(np.uint8)
        error = (_levels(apart, scale[..., None], zero[..., None], top) - zero[..., None]) * scale[..., None] - apart
        squares = np.einsum("ngk,ngk,gk->ng", error, error, importance)
        better = squares < best
        best[better], best_scale[better], best_zero[better] = squares[better], scale[better], zero[better]
    return best_scale, best_zero
