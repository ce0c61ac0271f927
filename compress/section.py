"""Parts of the stock graph that are run by themselves, over constants in memory: how a model larger than memory is run.

Between them goes the residual stream of one window of tokens, [tokens, hidden]. Any recipe's constants will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from compress.checkpoint import Floats
from compress.families import Decoder
from compress.operands import Operand
from compress.stock import StockGraph
from compress.weight_memory import WeightMemory
from proto.manifest import Recipe

CHUNK = 512  # tokens a run: bounds the attention scores, heads * CHUNK * window


class Seen(NamedTuple):
    """What one layer made of a window."""

    hidden: Floats  # the residual stream behind the layer, [tokens, hidden]
    inputs: dict[str, Floats]  # product -> its input, [tokens, K]
    keys: Floats  # after the rotary embedding, [kv_heads, tokens, head_size]
    values: Floats  # [kv_heads, tokens, head_size]


class Embedding(StockGraph):
    """Tokens to the residual stream's start. Needs the constants of positions, and of the embedding or a tied head."""

    def __init__(self, weights: WeightMemory, decoder: Decoder, recipe: Recipe, *, threads: int) -> None:
        super().__init__(weights, decoder, recipe)
        self.graph.input("input_ids", np.int64, ["batch", "sequence"])
        self.graph.input("seqlens_k", np.int32, ["batch"])
        self._name = self._embed(self._load_head() if decoder.tied else Operand(""))
        self.graph.output(self._name, np.float32, ["batch", "sequence", decoder.hidden_size])
        self._session = weights.open(self.graph.model(), threads)

    def run(self, window: Sequence[int]) -> Floats:
        """[tokens, hidden]"""
        feeds = {"input_ids": np.asarray([window], np.int64), "seqlens_k": np.asarray([len(window) - 1], np.int32)}
        names = {value.name for value in self._session.get_inputs()}  # rotary models do not ask for lengths here
        hidden: Floats = self._session.run([self._name], {name: feeds[name] for name in names})[0][0]
        return hidden


class Layer(StockGraph):
    """One layer. Needs its constants and those of positions."""

    def __init__(self, weights: WeightMemory, decoder: Decoder, recipe: Recipe, layer: int, *, threads: int) -> None:
        super().__init__(weights, decoder, recipe)
        g = self.graph
        shape = ("batch", "sequence", decoder.hidden_size)
        residual = g.input("hidden", np.float32, shape)
        self._input_lengths()
        out, bias, residual = self._layer(layer, self._norm(residual, f"layers.{layer}.attention_norm"), residual)
        g.output(g.node("Add", [residual, self._add_bias(out, bias)], "hidden_out"), np.float32, shape)
        for product, value in self.product_inputs.items():
            g.output(value, np.float32, ["batch", "sequence", decoder.shape(product.rpartition(".")[2])[1]])
        self._caches = [f"{kind}_cache.{layer}" for kind in ("key", "value")]
        self._session = weights.open(g.model(), threads)

    def run(self, hidden: Floats) -> Seen:
        d, length = self.decoder, len(hidden)
        caches = [np.zeros((1, d.num_kv_heads, length, d.head_size), np.float32)] * 2
        present = [name.replace("_cache", "_cache_out") for name in self._caches]
        outputs = ["hidden_out", *self.product_inputs.values(), *present]
        parts: list[list[Floats]] = []
        for start in range(0, length, CHUNK):
            end = min(start + CHUNK, length)
            feeds = {
                "hidden": hidden[None, start:end],
                "seqlens_k": np.asarray([end - 1], np.int32),
                "total_sequence_length": np.asarray(end, np.int32),
                **dict(zip(self._caches, caches, strict=True)),
            }
            *part, keys, values = self._session.run(outputs, feeds)
            parts.append([value[0] for value in part])
            caches = [keys, values]
        out, *inputs = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
        return Seen(out, dict(zip(self.product_inputs, inputs, strict=True)), caches[0][0], caches[1][0])


class FinalNorm(StockGraph):
    """What the head reads. Needs the constants of the final norm."""

    def __init__(self, weights: WeightMemory, decoder: Decoder, recipe: Recipe, *, threads: int) -> None:
        super().__init__(weights, decoder, recipe)
        shape = ("tokens", decoder.hidden_size)
        self._normed = self._norm(self.graph.input("residual", np.float32, shape), "final_norm")
        self.graph.output(self._normed, np.float32, shape)
        self._session = weights.open(self.graph.model(), threads)

    def run(self, hidden: Floats) -> Floats:
        """The residual stream [tokens, hidden], normed."""
        normed: Floats = self._session.run([self._normed], {"residual": hidden})[0]
        return normed


class Head(StockGraph):
    """The final norm and the head. Needs their constants."""

    def __init__(self, weights: WeightMemory, decoder: Decoder, recipe: Recipe, *, threads: int) -> None:
        super().__init__(weights, decoder, recipe)
        residual = self.graph.input("residual", np.float32, ["batch", "sequence", decoder.hidden_size])
        self._head(self._norm(residual, "final_norm"), self._load_head())
        self._session = weights.open(self.graph.model(), threads)

    def run(self, hidden: Floats) -> Floats:
        """The residual stream [rows, hidden] -> logits [rows, vocab]."""
        feeds = {"residual": hidden[None], "logits_rows": np.arange(len(hidden))}
        logits: Floats = self._session.run(["logits"], feeds)[0]
        return logits
