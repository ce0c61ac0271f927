"""The integer grids of weights: int8 with a scale by row, and 4 bits with a step and a zero by group of inputs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import Floats

LEVELS = 127  # the largest magnitude of a symmetric int8
TINY = 1e-30  # replaces the largest magnitude of a row of zeros, far below any real one
ROWS = 1024  # weight rows quantized at a time, so that the temporaries stay small
TOP = 15  # the largest 4-bit level; the smallest is 0
STEPS = range(16, 32)  # what a group's step may be, in scales of its row: one half of a byte
CACHED = 1 << 17  # weights searched at a time: what a core's cache holds

Int8 = NDArray[np.int8]
UInt8 = NDArray[np.uint8]


class Weight8(NamedTuple):
    """A weight [N, K] as `scale * levels`."""

    levels: Int8  # [N, K], -127 to 127
    scale: Floats  # [N]


class Weight4(NamedTuple):
    """A weight [N, K] as `scale * step * (levels - zero)`, step and zero by group of neighbouring inputs.

    The last group may be shorter.
    """

    levels: UInt8  # [N, K], 0 to 15
    scale: Floats  # [N]
    step: UInt8  # [N, ceil(K / group)], 16 to 31
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


def round_by_group(weight: Floats, group: int) -> Weight4:
    """4 bits by group of inputs.

    A row's scale lets the largest step span the widest group of the row. Of the steps, each group has the one whose
    rounding is nearest, in squares: a smaller one clips a few inputs and is finer for all others.
    """
    num_outputs, num_inputs = weight.shape
    groups = -(-num_inputs // group)
    levels = np.empty(weight.shape, np.uint8)
    scale = np.empty(num_outputs, np.float32)
    step, zero = np.empty((num_outputs, groups), np.uint8), np.empty((num_outputs, groups), np.uint8)
    rows_at_once = max(1, CACHED // num_inputs)
    for start in range(0, num_outputs, rows_at_once):
        rows = slice(start, start + rows_at_once)
        block = np.zeros((len(weight[rows]), groups * group), np.float32)
        block[:, :num_inputs] = weight[rows]
        apart = block.reshape(len(block), groups, group)
        scale[rows], step[rows], zero[rows] = _search_grids(apart)
        steps = scale[rows, None, None] * step[rows, :, None]
        found = nearest_levels(apart, steps, zero[rows, :, None])
        levels[rows] = found.reshape(block.shape)[:, :num_inputs]
    return Weight4(levels, scale, step, zero)


def nearest_levels(weight: Floats, step: Floats, zero: UInt8) -> Floats:
    """The 4-bit levels nearest to `weight`, as floats; step (a real one) and zero broadcast against it."""
    levels: Floats = np.divide(weight, step)
    np.rint(levels, out=levels)
    np.add(levels, zero, out=levels)
    return np.clip(levels, 0, TOP, out=levels)


def dequantize(weight: Weight8 | Weight4, group: int) -> Floats:
    """The weight [N, K] that the levels mean; `group` is that of a 4-bit one."""
    if isinstance(weight, Weight8):
        return weight.levels * weight.scale[:, None]
    num_inputs = weight.levels.shape[1]
    step, zero = (np.repeat(x.astype(np.float32), group, axis=1)[:, :num_inputs] for x in (weight.step, weight.zero))
    exact: Floats = weight.scale[:, None] * step * (weight.levels - zero)
    return exact


def _search_grids(block: Floats) -> tuple[Floats, UInt8, UInt8]:
    """The scale [N] of each row, and the step and zero [N, groups] of each group, of a weight [N, groups, group]."""
    high = np.maximum(block.max(axis=-1), 0)  # a grid that holds 0 keeps zeros exact
    low = np.minimum(block.min(axis=-1), 0)
    scale = (np.maximum((high - low).max(axis=1), TINY) / (TOP * STEPS[-1])).astype(np.float32)
    best = np.full(high.shape, np.inf, np.float32)
    best_step, best_zero = np.empty(high.shape, np.uint8), np.empty(high.shape, np.uint8)
    for step in STEPS:
        real = scale[:, None] * np.float32(step)
        zero = np.clip(np.rint(TOP / 2 - (high + low) / (2 * real)), 0, TOP).astype(np.uint8)
        error = nearest_levels(block, real[..., None], zero[..., None])
        error -= zero[..., None]
        error *= real[..., None]
        error -= block
        squares = np.einsum("ngk,ngk->ng", error, error)
        better = squares < best
        best[better], best_step[better], best_zero[better] = squares[better], step, zero[better]
    return scale, best_step, best_zero
