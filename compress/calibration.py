"""What the model's activations look like: inputs of every product, and the range of keys and values.

Runs the full-precision graph with the inputs of all products as extra outputs. Memory, in float32: `rows` rows of every
product's input, and its second moment [K, K].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.checkpoint import Floats
from compress.families import Decoder
from compress.graph import GraphBuilder
from compress.levels import LEVELS
from serve.runner import open_session

KV_MARGIN = 1.1  # other text has larger keys and values than the calibration's largest; clipping costs most


@dataclass(frozen=True, slots=True)
class Activations:
    inputs: dict[str, Floats]  # product -> sampled input rows, [rows, K]
    moments: dict[str, Floats]  # product -> sum of x x^T over all rows, [K, K]
    kv_scales: list[tuple[Floats, Floats]]  # by layer: int8 steps of keys (after rotary) and values, [kv_heads, head]


def tap_inputs(graph: GraphBuilder, product: str, x: str, size: int) -> None:
    """A tap for `compress.decoder.build`: output `tap.{product}`, the product's input [batch, sequence, K]."""
    del size
    graph.output(graph.node("Identity", [x], f"tap.{product}"), np.float32, ["batch", "sequence", "inputs"])


def calibrate(
    graph: Path,
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    *,
    rows: int,
    threads: int,
    progress: Callable[[], None] = lambda: None,
) -> Activations:
    """Run every window through the tapped graph in directory `graph`, keeping `rows` rows of each input.

    The first token of a window is always kept among them: its activations are by far the largest.
    """
    session = open_session(graph, threads)
    products = [product for product in decoder.products if product != "head"]
    caches = [f"{kind}_cache_out.{i}" for i in range(decoder.num_layers) for kind in ("key", "value")]
    parts: dict[str, list[Floats]] = {product: [] for product in products}
    moments: dict[str, Floats] = {}
    peaks = np.zeros((len(caches), decoder.num_kv_heads, decoder.head_size), np.float32)
    random = np.random.default_rng(0)
    per_window = max(2, rows // len(windows))
    for window in windows:
        length = len(window)
        empty = np.zeros((1, decoder.num_kv_heads, length, decoder.head_size), np.float32)
        feeds = {
            "input_ids": np.asarray([window], np.int64),
            "seqlens_k": np.asarray([length - 1], np.int32),
            "total_sequence_length": np.asarray(length, np.int32),
            "logits_rows": np.asarray([length - 1], np.int64),
            **{name.replace("_out", ""): empty for name in caches},
        }
        found = session.run([f"tap.{product}" for product in products] + caches, feeds)
        kept = np.concatenate([[0], random.permutation(length - 1)[: per_window - 1] + 1])
        for product, values in zip(products, found, strict=False):
            x = values.reshape(-1, values.shape[-1])
            parts[product].append(x[kept])
            moments[product] = moments.get(product, np.float32(0)) + x.T @ x
        for i, cache in enumerate(found[len(products) :]):
            np.maximum(peaks[i], np.abs(cache[0]).max(axis=1), out=peaks[i])
        progress()
    steps = KV_MARGIN * np.maximum(peaks, 1e-6) / LEVELS
    return Activations(
        {product: np.concatenate(part) for product, part in parts.items()},
        moments,
        [(steps[2 * i], steps[2 * i + 1]) for i in range(decoder.num_layers)],
    )
