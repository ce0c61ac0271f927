"""The rotation that spreads a few large inputs of a product over 64 of them (QuaRot, arXiv:2404.00456).

It is orthonormal: rotated inputs times rotated columns of the weight give the same product. But no rotated input stands
out, and so 8 bits hold them better. docs/native.md defines it.
"""

from __future__ import annotations

import numpy as np

from compress.checkpoint import Floats
from compress.packing import DEPTH


def _walsh_hadamard(size: int) -> Floats:
    """[size, size], in natural order; `size` is a power of 4, so that every entry is exact."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(size**0.5)


MATRIX = _walsh_hadamard(DEPTH)  # its own inverse


def rotate(x: Floats) -> Floats:
    """x [..., K] -> [..., ceil(K / 64) 64]: each 64 of the last axis rotated, zeros being put behind the last ones."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % DEPTH)])
    rotated: Floats = (padded.reshape(-1, DEPTH) @ MATRIX).reshape(padded.shape)
    return rotated
