"""Sequences into rows of one length, best fit first.

After Ding et al. 2024, Fewer Truncations Improve Language Modeling (https://arxiv.org/abs/2404.10830): longest first,
each sequence into the fullest row that still has room for it, so that nothing is cut and little is padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from train.errors import TrainError

BLOCK = 1 << 16  # sequences that are packed together, which keeps the time linear


@dataclass(frozen=True, slots=True)
class Rows:
    """Row n holds the sequences `order[starts[n] : starts[n + 1]]`; each sequence is in one row.

    order [sequences] int64; starts [rows + 1] int64.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        return self.order[self.starts[row] : self.starts[row + 1]]


def pack(lengths: ArrayLike, capacity: int) -> Rows:
    """Rows of at most `capacity` tokens out of sequences of `lengths`. Depends on nothing else.

    Raises TrainError if a sequence is longer than a row.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.max() > capacity:
        raise TrainError(f"a sequence of {sizes.max()} tokens is longer than a row of {capacity}; cut it first")
    row_of = np.empty(len(sizes), np.int64)
    num_rows = 0
    for start in range(0, len(sizes), BLOCK):
        block = _pack_block(sizes[start : start + BLOCK], capacity)
        row_of[start : start + BLOCK] = block + num_rows
        num_rows += int(block.max()) + 1
    starts = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=starts[1:])
    return Rows(np.argsort(row_of, kind="stable"), starts)


def _pack_block(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """[sequences] The row of each."""
    row_of = np.empty(len(sizes), np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the tokens that are free in them
    rooms = 0  # a bit for each number of free tokens that some row has: the lowest set bit is the best fit
    num_rows = 0
    order = np.argsort(-sizes, kind="stable")
    for sequence, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, num_rows
            num_rows += 1
        row_of[sequence] = row
        with_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return row_of
