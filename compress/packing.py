"""The layouts in which weights are stored, in tiles of 16 outputs that the native operators read as they lie.

docs/native.md defines them. `parts` are products fused one above the other, each padded to whole tiles by itself.
All functions are pure; `unpack_` undoes `pack_`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.levels import Int8, UInt8

TILE = 16  # outputs side by side
DEPTH = 64  # inputs: what they are padded to
WORD = 4  # bytes of one output that lie together


def pad(size: int, multiple: int) -> int:
    """The size, rounded up."""
    return -(-size // multiple) * multiple


def pad_rows(array: NDArray[Any], parts: int = 1, fill: float = 0) -> NDArray[Any]:
    """[N, ...] -> [parts * ceil(N / parts / 16) 16, ...]: each part followed by rows of `fill`."""
    rows = len(array) // parts
    padded = np.full((parts, pad(rows, TILE), *array.shape[1:]), fill, array.dtype)
    padded[:, :rows] = array.reshape(parts, rows, *array.shape[1:])
    return padded.reshape(-1, *array.shape[1:])


def drop_rows(padded: NDArray[Any], size: int, parts: int = 1) -> NDArray[Any]:
    """Undo `pad_rows` for N = `size`."""
    apart = padded.reshape(parts, -1, *padded.shape[1:])
    return apart[:, : size // parts].reshape(size, *padded.shape[1:])


def pack_int8(levels: Int8, parts: int = 1) -> Int8:
    """int8 [N, K] -> [ceil(N/16), ceil(K/64) 16, 16, 4]: element [b, c, n, k] is levels[16 b + n, 4 c + k]."""
    num_outputs, num_inputs = levels.shape
    rows = num_outputs // parts
    padded = np.zeros((parts, pad(rows, TILE), pad(num_inputs, DEPTH)), np.int8)
    padded[:, :rows, :num_inputs] = levels.reshape(parts, rows, num_inputs)
    return _to_tiles(padded.reshape(-1, padded.shape[2]))


def unpack_int8(packed: Int8, shape: tuple[int, int], parts: int = 1) -> Int8:
    return drop_rows(_from_tiles(packed), shape[0], parts)[:, : shape[1]]


def pack_int4(levels: UInt8, zero: UInt8, group: int, parts: int = 1) -> UInt8:
    """Levels [N, K] and zeros [N, ceil(K / group)] -> [ceil(N/16), ceil(K/64) 8, 16, 4], two levels in a byte.

    Byte [b, c, n, j] has levels[16 b + n, 8 c + 2 j] in its low half and the next one in its high half. Padded levels
    equal their group's zero, and so weigh nothing.
    """
    num_outputs, num_inputs = levels.shape
    padded = np.zeros((num_outputs, pad(num_inputs, DEPTH)), np.uint8)
    padded[:, :num_inputs] = levels
    padded[:, num_inputs : pad(num_inputs, group)] = zero[:, -1:]
    padded = pad_rows(padded, parts)
    return _to_tiles(padded[:, 0::2] | padded[:, 1::2] << 4)


def unpack_int4(packed: UInt8, shape: tuple[int, int], parts: int = 1) -> UInt8:
    """The levels [N, K]."""
    halves = _from_tiles(packed)
    levels = np.stack([halves & 15, halves >> 4], axis=-1).reshape(len(halves), -1)
    return drop_rows(levels, shape[0], parts)[:, : shape[1]]


def pack_groups(values: NDArray[Any], num_inputs: int, group: int, parts: int = 1) -> NDArray[Any]:
    """A value of each group [N, ceil(K / group)] -> [ceil(N/16), ceil(K/64) 64 / group, 16]."""
    missing = pad(num_inputs, DEPTH) // group - values.shape[1]
    padded = pad_rows(np.pad(values, ((0, 0), (0, missing))), parts)
    return padded.reshape(-1, TILE, padded.shape[1]).transpose(0, 2, 1)


def unpack_groups(packed: NDArray[Any], shape: tuple[int, int], group: int, parts: int = 1) -> NDArray[Any]:
    """[N, ceil(K / group)] of a weight of the shape [N, K]."""
    rows = packed.transpose(0, 2, 1).reshape(-1, packed.shape[1])
    return drop_rows(rows, shape[0], parts)[:, : -(-shape[1] // group)]


def _to_tiles(rows: NDArray[Any]) -> NDArray[Any]:
    """[16 B, 4 C] -> [B, C, 16, 4], a view: whoever writes it makes it contiguous, piece by piece."""
    return rows.reshape(len(rows) // TILE, TILE, -1, WORD).transpose(0, 2, 1, 3)


def _from_tiles(tiles: NDArray[Any]) -> NDArray[Any]:
    return tiles.transpose(0, 2, 1, 3).reshape(len(tiles) * TILE, -1)
