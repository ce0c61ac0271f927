"""The integer grids of weights: int8 with a scale by row, and 4 bits with a scale and a zero by group of inputs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import Floats

LEVELS = 127  # the largest magnitude of a symmetric int8
TINY = 1e-30  # replaces the largest magnitude of a row of zeros, far below any real one
ROWS = 1024  # weight rows quantized at a time, so that the temporaries stay small
TOP = 15  # the largest 4-bit level; the smallest is 0
SHRINK = np.linspace(1.0, 0.6, 17, dtype=np.float32)  # of a group's range: clipping its ends makes the steps finer
HALF_SCALES = (2.0**-24, 65504.0)  # the smallest and the largest positive float16

Int8 = NDArray[np.int8]
UInt8 = NDArray[np.uint8]
Halves = NDArray[np.float16]


class Weight8(NamedTuple):
    """A weight [N, K] as `scale * levels`."""

    levels: Int8  # [N, K], -127 to 127
    scale: Floats  # [N]


class Weight4(NamedTuple):
    """A weight [N, K] as `scale * (levels - zero)`, in groups of neighbouring inputs; the last one may be shorter."""

    levels: UInt8  # [N, K], 0 to 15
    scale: Halves  # [N, ceil(K / group)]
    zero: UInt8  # [N, ceil(K / group)], 0 to 15


def round_to_nearest(weight: Floats) -> Weight8:
    """Symmetric int8 by output channel."""
    quantized = np.empty(weight.shape, np.int8)
    scale = np.empty(len(weight), np.float32)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        block = weight[rows]
        scale[rows] = np.maximum(np.abs(block).max(axis=1), TINY) / LEVELS
        quantized[rows] = np.rint(block / scale[rows, None])
    return Weight8(quantized, scale)


def round_by_group(weight: Floats, group: int, importance: Floats | None = None) -> Weight4:
    """4 bits by group of inputs, clipped where that is nearer in the squares weighted by `importance` [K]."""
    num_outputs, num_inputs = weight.shape
    levels = np.empty(weight.shape, np.uint8)
    scale = np.empty((num_outputs, -(-num_inputs // group)), np.float16)
    zero = np.empty(scale.shape, np.uint8)
    for start in range(0, num_outputs, ROWS):
        rows = slice(start, start + ROWS)
        for g in range(scale.shape[1]):
            columns = slice(g * group, (g + 1) * group)
            block = weight[rows, columns]
            scale[rows, g], zero[rows, g] = _search_grid(block, None if importance is None else importance[columns])
            levels[rows, columns] = nearest_levels(block, scale[rows, g, None], zero[rows, g, None])
    return Weight4(levels, scale, zero)


def nearest_levels(weight: Floats, scale: Halves, zero: UInt8) -> Floats:
    """The 4-bit levels nearest to `weight`, as floats; scale and zero broadcast against it."""
    levels: Floats = np.clip(np.rint(weight / scale.astype(np.float32)) + zero, 0, TOP)
    return levels


def dequantize(weight: Weight8 | Weight4, group: int) -> Floats:
    """The weight [N, K] that the levels mean; `group` is that of a 4-bit one."""
    if isinstance(weight, Weight8):
        return weight.levels * weight.scale[:, None]
    num_inputs = weight.levels.shape[1]
    scale, zero = (np.repeat(x.astype(np.float32), group, axis=1)[:, :num_inputs] for x in weight[1:])
    exact: Floats = scale * (weight.levels - zero)
    return exact


def _search_grid(block: Floats, importance: Floats | None) -> tuple[Halves, UInt8]:
    """Scale and zero, each [N], of one group [N, group] of a weight."""
    high = np.maximum(block.max(axis=1), 0)  # a grid that holds 0 keeps zeros exact
    low = np.minimum(block.min(axis=1), 0)
    best = np.full(len(block), np.inf, np.float32)
    best_scale, best_zero = np.empty(len(block), np.float16), np.empty(len(block), np.uint8)
    for shrink in SHRINK:
        scale = np.clip((high - low) * (shrink / TOP), *HALF_SCALES).astype(np.float16)
        zero = np.clip(np.rint(-low * shrink / scale.astype(np.float32)), 0, TOP).astype(np.uint8)
        rounded = (nearest_levels(block, scale[:, None], zero[:, None]) - zero[:, None]) * scale[:, None]
        squares = np.square(rounded - block)
        error = squares.sum(axis=1) if importance is None else squares @ importance
        better = error < best
        best[better], best_scale[better], best_zero[better] = error[better], scale[better], zero[better]
    return best_scale, best_zero
