"""The decoder as a graph of our own operators, which executes a whole plan in one run: docs/native.md.

Its constants are those of the stock graph, in the same file; compress/constants.py names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.families import Decoder
from compress.graph import PAWL, GraphBuilder
from compress.precisions import precision_of
from compress.weight_file import WeightStore
from proto.manifest import NATIVE_GRAPH, Recipe
from serve.native_runner import NUM_CANDIDATES, block_bytes

NORMS = {"rms": 1, "layer": 2}
# (activation in config.json, whether the MLP is gated) -> that of Linear8 and Linear4
ACTIVATIONS: Mapping[tuple[str, bool], int] = {
    ("silu", True): 1,
    ("gelu_new", False): 2,
    ("gelu_pytorch_tanh", False): 2,
    ("gelu_new", True): 3,
    ("gelu_pytorch_tanh", True): 3,
}


def has_native_form(decoder: Decoder, recipe: Recipe) -> bool:
    """Whether all operands are integers, the embedding's too, and the operators know the activation."""
    precisions = [recipe.default, *(precision_of(recipe, product) for product in decoder.products)]
    is_integer = all(precision.weight_bits < 16 and precision.activation_bits == 8 for precision in precisions)
    return is_integer and (decoder.activation, decoder.family.gated) in ACTIVATIONS


class NativeGraph:
    """One graph in the making. Its values have the names that they have in the stock graph."""

    def __init__(self, weights: WeightStore, decoder: Decoder, recipe: Recipe) -> None:
        self.graph = GraphBuilder(weights)
        self.decoder = decoder
        self.recipe = recipe

    def write(self, directory: Path) -> None:
        """Write `model.native.onnx` into the directory of the weight file, which must hold all constants."""
        g, d = self.graph, self.decoder
        g.input("input_ids", np.int64, ["tokens"])
        g.input("segments", np.int32, ["segments", 3])
        g.input("blocks", np.int32, ["segments", "width"])
        g.input("logits_rows", np.int64, ["rows"])
        g.input("hidden_rows", np.int64, ["hidden_rows"])
        g.input("temperature", np.float32, ["rows"])
        g.input("cache", np.uint8, ["blocks", d.num_layers, d.num_kv_heads, block_bytes(d.head_size)])
        g.output("logits", np.float32, ["rows", d.vocab_size])
        g.output("candidates", np.int32, ["rows", NUM_CANDIDATES])
        g.output("total", np.float32, ["rows"])
        g.output("hidden", np.float32, ["hidden_rows", d.hidden_size])
        x = self._embed()
        for i in range(d.num_layers):
            qkv = self._linear(f"layers.{i}.qkv", x, norm=f"layers.{i}.attention_norm")
            x = self._add(f"layers.{i}.o", f"layers.{i}.attention_post_norm", self._attend(i, qkv), x)
            activation = ACTIVATIONS[d.activation, d.family.gated]
            inner = self._linear(f"layers.{i}.{d.up}", x, norm=f"layers.{i}.mlp_norm", activation=activation)
            x = self._add(f"layers.{i}.down", f"layers.{i}.mlp_post_norm", inner, x)
        wanted = g.node("Gather", [x, "logits_rows"], "wanted")
        self._linear("head", wanted, norm="final_norm", output="logits")
        g.nodes("Select", ["logits", "temperature"], ["candidates", "total"], domain=PAWL)
        self._hidden(g.node("Gather", [x, "hidden_rows"], "hidden.raw"))
        g.save(directory / NATIVE_GRAPH)

    def _embed(self) -> str:
        """The residual stream's start, [tokens, hidden]."""
        g, d = self.graph, self.decoder
        matrix = "head" if d.tied else "embedding"
        rotate = int(d.tied and precision_of(self.recipe, "head").rotated)
        inputs = ["input_ids", f"{matrix}.weight", f"{matrix}.scale", "segments", g.stored("positions.weight")]
        x = self._node("Embed", inputs, "embedding", hidden=d.hidden_size, rotate=rotate)
        if d.embedding_scale == 1:
            return x
        scale = g.shared("embedding.factor", np.array(d.embedding_scale, np.float32))
        return g.node("Mul", [x, scale], "embedding.scaled")

    def _linear(
        self, name: str, x: str, *, norm: str = "", activation: int = 0, residual: str = "", output: str = ""
    ) -> str:
        """activation(normed x times the weight + bias) + residual, [rows, N]; named as the product by default."""
        g, d = self.graph, self.decoder
        role = name.rpartition(".")[2]
        precision = precision_of(self.recipe, name)
        num_outputs, num_inputs = d.shape(role)
        attributes: dict[str, Any] = {
            "inputs": num_inputs,
            "outputs": num_outputs // d.parts(role),
            "norm": NORMS[d.family.norm] if norm else 0,
            "epsilon": d.epsilon,
            "rotate": int(precision.rotated),
            "activation": activation,
        }
        if precision.weight_bits == 4:
            op, third = "Linear4", f"{name}.grid"
            attributes["group"] = precision.group
        else:
            op, third = "Linear8", f"{name}.sums"
        norms = [g.stored(f"{norm}.weight"), g.stored(f"{norm}.bias")] if norm else ["", ""]
        inputs = [x, f"{name}.weight", f"{name}.scale", third, *norms, g.stored(f"{name}.bias"), residual]
        return self._node(op, inputs, output or name, **attributes)

    def _add(self, product: str, norm: str, x: str, residual: str) -> str:
        """The residual stream with the product added to it, normed before if there is such a norm."""
        if not (weight := self.graph.stored(f"{norm}.weight")):
            return self._linear(product, x, residual=residual)
        return self._node("AddNormed", [self._linear(product, x), weight, residual], norm, epsilon=self.decoder.epsilon)

    def _attend(self, layer: int, qkv: str) -> str:
        """[tokens, (heads + 2 kv_heads) head_size] -> [tokens, heads * head_size]."""
        g, d = self.graph, self.decoder
        rope = d.rope_of(layer)
        names = (f"{rope}.cos", f"{rope}.sin", f"layers.{layer}.q_norm.weight", f"layers.{layer}.k_norm.weight")
        return self._node(
            "Attend",
            [qkv, "cache", "segments", "blocks", *map(g.stored, names)],
            f"layers.{layer}.attention",
            layer=layer,
            heads=d.num_heads,
            kv_heads=d.num_kv_heads,
            head_size=d.head_size,
            interleaved=0,
            window=d.windows[layer] or 0,
            epsilon=d.epsilon,
            scale=d.attention_scale,
        )

    def _hidden(self, x: str) -> None:
        g, d = self.graph, self.decoder
        bias = g.stored("final_norm.bias")
        op = "LayerNormalization" if bias else "SimplifiedLayerNormalization"
        inputs = ["final_norm.weight", *([bias] if bias else [])]
        g.node(op, [x, *inputs], "hidden", axis=-1, epsilon=d.epsilon)

    def _node(self, op: str, inputs: list[str], output: str, /, **attributes: Any) -> str:
        """One of our operators; optional inputs that are left out at the end are not named at all."""
        while not inputs[-1]:
            inputs.pop()
        return self.graph.node(op, inputs, output, domain=PAWL, **attributes)
