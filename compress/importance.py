"""What a decoder would miss least, found by forward passes alone.

| part | what is measured | paper |
|---|---|---|
| layers | 1 - mean cosine of a layer's input and output (block influence) | ShortGPT, arXiv:2403.03853 |
| hidden channels | root mean square behind the norms, added up over all layers | Minitron, arXiv:2407.14679 |
| MLP channels, KV groups | error of the next product without them, if the rest makes up | ZipLM, arXiv:2302.04089 |

Minitron takes magnitudes for channels and heads too. The error without them asks what the rest can make up for: where
two channels say the same, one of them may go, however large it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from compress.calibration import Calibration
from compress.checkpoint import Checkpoint, Floats
from compress.families import Decoder
from compress.levels import TINY
from compress.pruned import Indices, Kept
from compress.rounding import damped
from compress.weights import Weights
from train.flops import Dimensions

DAMPING = 0.01  # of the mean diagonal of a moment: inputs that never varied can be inverted too
ROUNDS = 48  # of elimination: so many times the errors are computed anew


@dataclass(frozen=True, slots=True)
class Importance:
    """Each order is from what is missed most to what is missed least."""

    influence: Floats  # [layers]
    hidden: Indices  # [hidden], an order
    inner: list[Indices]  # by layer [inner], an order
    groups: list[Indices]  # by layer [KV heads], an order

    def kept(self, shape: Dimensions) -> Kept:
        """The most important parts, as many as the shape has."""
        layers = sorted(np.argsort(-self.influence, kind="stable")[: shape.layers].tolist())
        return Kept(
            layers=layers,
            hidden=np.sort(self.hidden[: shape.width]),
            inner=[np.sort(self.inner[layer][: shape.inner]) for layer in layers],
            groups=[np.sort(self.groups[layer][: shape.kv_heads]) for layer in layers],
        )


def measure(checkpoint: Checkpoint, decoder: Decoder, windows: Sequence[Sequence[int]], *, threads: int) -> Importance:
    """On token windows, one layer in memory at a time."""
    walk = Calibration(checkpoint, decoder, windows, threads=threads)
    weights = Weights(checkpoint, decoder, {})
    influence: list[np.floating[Any]] = []
    inner: list[Indices] = []
    groups: list[Indices] = []
    magnitude = np.zeros(decoder.hidden_size)
    width = decoder.num_heads // decoder.num_kv_heads * decoder.head_size  # of the inputs of `o` that a KV head makes
    for layer in tqdm(range(decoder.num_layers), desc="importance", unit="layer", disable=None):
        before = walk.hidden
        moments = walk.next_layer().moments
        influence.append(1 - np.concatenate([cosines(x, y) for x, y in zip(before, walk.hidden, strict=True)]).mean())
        for role in ("qkv", decoder.up):
            magnitude += np.sqrt(np.diag(moments[f"layers.{layer}.{role}"]))
        for role, orders, block in (("down", inner, 1), ("o", groups, width)):
            weight, _ = weights.product(layer, role)
            orders.append(elimination_order(weight, moments[f"layers.{layer}.{role}"], block))
    return Importance(np.asarray(influence, np.float32), np.argsort(-magnitude, kind="stable"), inner, groups)


def cosines(x: Floats, y: Floats) -> Floats:
    """Of the rows of x and y, both [tokens, hidden]: [tokens]."""
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    found: Floats = np.einsum("tk,tk->t", x, y) / np.maximum(lengths, TINY)
    return found


def elimination_order(weight: Floats, moment: Floats, block: int = 1) -> Indices:
    """The order [K / block] in which blocks of the inputs of `weight` [N, K] are missed, what is missed most first.

    `moment` [K, K] is that of the inputs. The blocks whose loss costs least are left out in turn, and the weight and
    the inverse moment brought to what is best without them: that is Gaussian elimination.
    """
    rest, inverse = weight.astype(np.float64), np.linalg.inv(damped(moment, DAMPING))
    left = np.arange(weight.shape[1] // block)
    each_round = max(1, -(-len(left) // ROUNDS))
    gone: list[Indices] = []
    while len(left) > 1:
        order = np.argsort(_errors(rest, inverse, block), kind="stable")[: min(each_round, len(left) - 1)]
        going = np.zeros(len(left), bool)
        going[order] = True
        out, stay = (np.flatnonzero(np.repeat(mask, block)) for mask in (going, ~going))
        share = np.linalg.solve(inverse[np.ix_(out, out)], inverse[np.ix_(out, stay)])
        rest = rest[:, stay] - rest[:, out] @ share
        inverse = inverse[np.ix_(stay, stay)] - inverse[np.ix_(stay, out)] @ share
        gone.append(left[order])
        left = left[~going]
    return np.concatenate([*gone, left])[::-1].copy()


def _errors(weight: NDArray[Any], inverse: NDArray[Any], block: int) -> NDArray[Any]:
    """Squared output error without each block, the others making up for it: tr(W_b (H^-1)_bb^-1 W_b^T)."""
    if block == 1:
        errors: NDArray[Any] = np.square(weight).sum(0) / np.diag(inverse)
        return errors
    blocks = [slice(at, at + block) for at in range(0, weight.shape[1], block)]
    return np.array([(weight[:, b].T * np.linalg.solve(inverse[b, b], weight[:, b].T)).sum() for b in blocks])
