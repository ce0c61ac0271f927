"""The native graph in numpy, node by node, for one segment without a past.

Keys and values are floats, or, if a `cache` is given, rounded as it would hold them; it is neither read nor written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from compress.packing import drop_rows, pad, unpack_groups, unpack_int4, unpack_int8
from compress.rotation import rotate as spread

Array = NDArray[Any]
GATED = (1, 3)  # activations of an MLP's first part, which the second is multiplied by


def run_native(directory: Path, tokens: Sequence[int], rows: Sequence[int], **inputs: Any) -> dict[str, Array]:
    """Every value of the graph by name; `rows` are those wanted, of logits and of hidden states."""
    graph = onnx.load(directory / "model.native.onnx").graph
    values: dict[str, Any] = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    values |= {"": None, "input_ids": np.array(tokens), "logits_rows": np.array(rows), "hidden_rows": np.array(rows)}
    values |= {"segments": np.array([[0, 0, len(tokens)]]), "blocks": np.zeros((1, 1)), "cache": None}
    values |= {"temperature": np.ones(len(rows), np.float32)} | inputs
    for node in graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        arguments = [values[name] for name in node.input]
        results = OPERATORS[node.op_type](*arguments, **attributes)
        values |= dict(zip(node.output, results if isinstance(results, tuple) else (results,), strict=True))
    return values


def embed(
    ids: Array,
    weight: Array,
    scale: Array,
    segments: Array,
    positions: Array | None = None,
    *,
    hidden: int,
    rotate: int,
):
    levels = unpack_int8(weight, (len(weight) * 16, pad(hidden, 64)))
    x = levels[ids] * scale[ids, None]
    x = (spread(x) if rotate else x)[:, :hidden]
    return x if positions is None else x + positions[: len(ids)]


def linear8(x: Array, weight: Array, scale: Array, sums: Array, *optional: Array, **attributes: Any):
    shape, parts = product_of(attributes)
    levels = unpack_int8(weight, shape, parts)
    np.testing.assert_array_equal(drop_rows(sums, shape[0], parts), levels.sum(axis=1, dtype=np.int64))
    return linear(x, levels * drop_rows(scale, shape[0], parts)[:, None], *optional, **attributes)


def linear4(x: Array, weight: Array, scale: Array, grid: Array, *optional: Array, group: int, **attributes: Any):
    shape, parts = product_of(attributes)
    grids = np.repeat(unpack_groups(grid, shape, group, parts).astype(np.int32), group, axis=1)[:, : shape[1]]
    levels = (16 + (grids >> 4)) * (unpack_int4(weight, shape, parts) - (grids & 15))
    return linear(x, levels * drop_rows(scale, shape[0], parts)[:, None], *optional, **attributes)


def product_of(attributes: dict[str, Any]) -> tuple[tuple[int, int], int]:
    """Rows and columns of the weight, and how many parts it has."""
    parts = 2 if attributes["activation"] in GATED else 1
    columns = pad(attributes["inputs"], 64) if attributes["rotate"] else attributes["inputs"]
    return (parts * attributes["outputs"], columns), parts


def linear(
    x: Array,
    weight: Array,
    norm_weight: Array | None = None,
    norm_bias: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    inputs: int,
    outputs: int,
    norm: int,
    epsilon: float,
    rotate: int,
    activation: int,
) -> Array:
    assert x.shape[1] == inputs
    if norm == 1:
        x = rms_norm(x, norm_weight, epsilon=epsilon)
    elif norm == 2:
        x = layer_norm(x, norm_weight, norm_bias, epsilon=epsilon)
    y = round_rows(spread(x) if rotate else x) @ weight.T
    if bias is not None:
        y = y + bias
    y, up = (y[:, :outputs], y[:, outputs:]) if activation in GATED else (y, 1)
    if activation == 1:
        y = y / (1 + np.exp(-y)) * up
    elif activation:
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) * up
    return y if residual is None else y + residual


def round_rows(x: Array) -> Array:
    """What int8 holds of each row."""
    step = np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-30) / 127
    return np.rint(x / step) * step


def rms_norm(x: Array, weight: Array, *, epsilon: float, axis: int = -1) -> Array:
    return x / np.sqrt(np.square(x).mean(axis=axis, keepdims=True) + epsilon) * weight


def add_normed(x: Array, weight: Array, residual: Array, *, epsilon: float) -> Array:
    return residual + rms_norm(x, weight, epsilon=epsilon)


def layer_norm(x: Array, weight: Array, bias: Array, *, epsilon: float, axis: int = -1) -> Array:
    return rms_norm(x - x.mean(axis=axis, keepdims=True), weight, epsilon=epsilon, axis=axis) + bias


def attend(
    qkv: Array,
    cache: Array,
    segments: Array,
    blocks: Array,
    cos: Array | None = None,
    sin: Array | None = None,
    q_norm: Array | None = None,
    k_norm: Array | None = None,
    *,
    layer: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    interleaved: int,
    window: int,
    epsilon: float,
    scale: float,
) -> Array:
    count = len(qkv)
    x = qkv.reshape(count, heads + 2 * kv_heads, head_size).transpose(1, 0, 2)
    q, k, v = np.split(x, [heads, heads + kv_heads])
    if q_norm is not None:
        q, k = rms_norm(q, q_norm, epsilon=epsilon), rms_norm(k, k_norm, epsilon=epsilon)
    if cos is not None:
        assert not interleaved
        q, k = (rotate(y, cos[:count], sin[:count]) for y in (q, k))
    if cache is not None:
        q, k, v = spread(q), round_rows(spread(k)), round_rows(v)
    k, v = (np.repeat(y, heads // kv_heads, axis=0) for y in (k, v))
    distance = np.arange(count)[:, None] - np.arange(count)
    hidden = (distance < 0) | ((distance >= window) if window else False)
    scores = np.where(hidden, -np.inf, scale * q @ k.transpose(0, 2, 1))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(count, -1)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """The first dimensions of x [heads, tokens, head_size], in halves."""
    half = cos.shape[1]
    a, b, rest = np.split(x, [half, 2 * half], axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def select(logits: Array, temperature: Array) -> tuple[Array, Array]:
    divisor = np.where(temperature == 0, 1, temperature)[:, None]
    total = np.exp((logits - logits.max(axis=1, keepdims=True)) / divisor).sum(axis=1)
    return np.argsort(-logits, axis=1, kind="stable")[:, :64], total


OPERATORS = {
    "AddNormed": add_normed,
    "Embed": embed,
    "Linear8": linear8,
    "Linear4": linear4,
    "Attend": attend,
    "Select": select,
    "Mul": np.multiply,
    "Gather": lambda x, rows: x[rows],
    "SimplifiedLayerNormalization": rms_norm,
    "LayerNormalization": layer_norm,
}
