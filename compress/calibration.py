"""What the model's activations look like, layer by layer: inputs of every product, and the range of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.checkpoint import Checkpoint, Floats
from compress.families import Decoder
from compress.levels import LEVELS
from compress.section import Seen
from compress.stream import Stream

TOGETHER = 8  # windows whose rows are multiplied at once for the moments: twice as fast as one by one
ROWS = 64  # of each product's input that are kept, for the picture of its errors
KV_MARGIN = 1.1  # other text has larger keys and values than the calibration's largest; clipping costs most


@dataclass(frozen=True, slots=True)
class Activations:
    """Of one layer."""

    inputs: dict[str, Floats]  # product -> some input rows, [R, K]
    moments: dict[str, Floats]  # product -> sum of x x^T over all rows, [K, K]
    kv_scales: tuple[Floats, Floats]  # int8 steps of keys (after rotary) and values, [kv_heads, head_size]


class Calibration:
    """Walks the full-precision model over the windows, one layer at a call.

    Of every product's input, some `ROWS` rows are kept.
    """

    def __init__(
        self, checkpoint: Checkpoint, decoder: Decoder, windows: Sequence[Sequence[int]], *, threads: int
    ) -> None:
        self._stream = Stream(checkpoint, decoder, windows, threads=threads)
        random = np.random.default_rng(0)
        per_window = -(-ROWS // len(windows))
        self._kept = [random.permutation(len(window))[:per_window] for window in windows]

    @property
    def hidden(self) -> list[Floats]:
        """The residual stream of each window before the next layer, [tokens, hidden]."""
        return list(self._stream.hidden)

    def next_layer(self) -> Activations:
        """Run the next layer over all windows."""
        d = self._stream.decoder
        rows: dict[str, list[Floats]] = {}
        moments: dict[str, Floats] = {}
        waiting: dict[str, list[Floats]] = {}  # rows that the moments lack
        peaks = np.full((2, d.num_kv_heads, d.head_size), 1e-6, np.float32)

        def see(number: int, seen: Seen) -> None:
            for product, x in seen.inputs.items():
                rows.setdefault(product, []).append(x[self._kept[number]])
                waiting.setdefault(product, []).append(x)
            if (number + 1) % TOGETHER == 0:
                add_moments(moments, waiting)
            for peak, cache in zip(peaks, (seen.keys, seen.values), strict=True):
                np.maximum(peak, np.abs(cache).max(axis=1), out=peak)

        self._stream.run_layer(see)
        add_moments(moments, waiting)
        keys, values = KV_MARGIN * peaks / LEVELS
        return Activations({product: np.concatenate(kept) for product, kept in rows.items()}, moments, (keys, values))

    def head_moment(self) -> Floats:
        """Of the head's inputs, behind the last layer."""
        size = self._stream.decoder.hidden_size
        norm = self._stream.final_norm()
        return sum((x.T @ x for x in map(norm.run, self._stream.hidden)), np.zeros((size, size), np.float32))


def add_moments(moments: dict[str, Floats], waiting: dict[str, list[Floats]]) -> None:
    """Add x^T x of what waits, by product, pieces of rows [R, K]; nothing waits then."""
    for product, pieces in waiting.items():
        x = np.concatenate(pieces)
        moment = x.T @ x
        moments[product] = moments[product] + moment if product in moments else moment
    waiting.clear()
