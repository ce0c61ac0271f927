"""The integer grids of weights: int8 with a scale by row, and 4 bits with a scale and a zero by group of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import Floats

LEVELS = 127  # the largest magnitude of a symmetric int8
TINY = 1e-30  # replaces the largest magnitude of a row of zeros, far below any real one
ROWS = 1024  # weight rows quantized at a time, so that the temporaries stay small
TOP = 15  # the largest 4-bit level; the smallest is 0
CACHED = 1 << 17  # weights searched at a time: what a core's cache holds
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of a group's range: clipped, it has finer steps
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


def round_by_group(
    weight: Floats, group: int, importance: Floats | None = None, shrink: Sequence[float] = SHRINK
) -> Weight4:
    """4 bits by group of inputs.

    Each group's range is shrunk by the factor of `shrink` whose rounding is nearest, in squares weighted by
    `importance` [K].
    """
    num_outputs, num_inputs = weight.shape
    groups = -(-num_inputs // group)
    levels = np.empty(weight.shape, np.uint8)
    scale = np.empty((num_outputs, groups), np.float16)
    zero = np.empty((num_outputs, groups), np.uint8)
    weights = np.zeros(groups * group, np.float32)  # of the squares; inputs that fill up the last group have none
    weights[:num_inputs] = 1 if importance is None else importance
    step = max(1, CACHED // num_inputs)
    for start in range(0, num_outputs, step):
        rows = slice(start, start + step)
        block = np.zeros((len(weight[rows]), groups * group), np.float32)
        block[:, :num_inputs] = weight[rows]
        apart = block.reshape(len(block), groups, group)
        scale[rows], zero[rows] = _search_grids(apart, weights.reshape(groups, group), shrink)
        found = nearest_levels(apart, scale[rows, :, None], zero[rows, :, None])
        levels[rows] = found.reshape(block.shape)[:, :num_inputs]
    return Weight4(levels, scale, zero)


def nearest_levels(weight: Floats, scale: Halves, zero: UInt8) -> Floats:
    """The 4-bit levels nearest to `weight`, as floats; scale and zero broadcast against it."""
    levels: Floats = np.divide(weight, scale.astype(np.float32))
    np.rint(levels, out=levels)
    np.add(levels, zero, out=levels)
    return np.clip(levels, 0, TOP, out=levels)


def dequantize(weight: Weight8 | Weight4, group: int) -> Floats:
    """The weight [N, K] that the levels mean; `group` is that of a 4-bit one."""
    if isinstance(weight, Weight8):
        return weight.levels * weight.scale[:, None]
    num_inputs = weight.levels.shape[1]
    scale, zero = (np.repeat(x.astype(np.float32), group, axis=1)[:, :num_inputs] for x in weight[1:])
    exact: Floats = scale * (weight.levels - zero)
    return exact


def _search_grids(block: Floats, importance: Floats, shrink: Sequence[float]) -> tuple[Halves, UInt8]:
    """Scale and zero, each [N, groups], of a weight [N, groups, group]; importance is [groups, group]."""
    high = np.maximum(block.max(axis=-1), 0)  # a grid that holds 0 keeps zeros exact
    low = np.minimum(block.min(axis=-1), 0)
    best = np.full(high.shape, np.inf, np.float32)
    best_scale, best_zero = np.empty(high.shape, np.float16), np.empty(high.shape, np.uint8)
    for factor in shrink:
        scale = np.clip((high - low) * (factor / TOP), *HALF_SCALES).astype(np.float16)
        zero = np.clip(np.rint(-low * factor / scale), 0, TOP).astype(np.uint8)
        error = nearest_levels(block, scale[..., None], zero[..., None])
        error -= zero[..., None]
        error *= scale[..., None]
        error -= block
        squares = np.einsum("ngk,ngk,gk->ng", error, error, importance)
        better = squares < best
        best[better], best_scale[better], best_zero[better] = squares[better], scale[better], zero[better]
    return best_scale, best_zero
