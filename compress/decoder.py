"""The decoder graph: from a checkpoint straight to ONNX on stock operators.

    1. embed the tokens                       input_ids [batch, sequence] -> [batch, sequence, hidden]
    2. for each layer: norm, qkv, attention (which writes the caches), o; norm, MLP
    3. final norm, then only the wanted rows  -> hidden [rows, hidden]
    4. the head                               -> logits [rows, vocab]

Inputs: `input_ids` int64 [batch, sequence]; `seqlens_k` int32 [batch], each row's length after this step minus 1;
`total_sequence_length` int32 [], the largest length; `logits_rows` int64 [rows], indices into batch * sequence; and
by layer `key_cache.{i}`, `value_cache.{i}` [batch, kv_heads, capacity, head_size], float32 or int8.
Outputs: `logits`, `hidden`, and `key_cache_out.{i}`, `value_cache_out.{i}`, to be bound to the inputs' memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto

from compress.checkpoint import Checkpoint, CheckpointError, Floats
from compress.families import Decoder, describe
from compress.graph import MICROSOFT, GraphBuilder
from compress.linear import FLOAT, PRECISIONS, WeightHook, multiply, round_to_nearest, store
from compress.rope import tables
from compress.weights import Tensors, Weights
from proto.manifest import Architecture, KvCacheType, Precision, Recipe

MAX_CONTEXT = 8192  # tokens, where neither the caller nor the checkpoint asks for less

# (graph, product, the value that is its input, K): adds outputs. The value is [batch, sequence, K] or, for the head,
# [rows, K].
Tap = Callable[[GraphBuilder, str, str, int], None]

# activation in config.json -> operator and its attributes
ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "silu": ("QuickGelu", {"alpha": 1.0}),
    "gelu_new": ("FastGelu", {}),
    "gelu_pytorch_tanh": ("FastGelu", {}),
}


def build(
    checkpoint: Checkpoint,
    directory: Path,
    recipe: Recipe,
    *,
    kv: KvCacheType = "fp32",
    kv_scales: Sequence[tuple[Floats, Floats]] | None = None,
    scales: Mapping[str, Floats] | None = None,
    weight_hook: WeightHook | None = None,
    taps: Tap | None = None,
    max_context: int | None = None,
) -> Architecture:
    """Write `model.onnx` and `model.onnx.data` into the directory, and return the numbers that a server needs.

    `kv_scales` gives each layer's key and value step for int8 caches, [1] or [kv_heads, head_size]; `scales` migrates
    magnitude from activations into weights (see compress/weights.py); `weight_hook` replaces round to nearest.
    """
    decoder = describe(checkpoint)
    limit = max_context or min(decoder.max_position, MAX_CONTEXT)
    if limit > decoder.max_position:
        raise ValueError(f"max_context {limit} is more than the {decoder.max_position} of the checkpoint; ask for less")
    if decoder.activation not in ACTIVATIONS:
        raise CheckpointError(
            f"activation {decoder.activation!r} is not supported. Supported are {', '.join(ACTIVATIONS)}."
        )
    _check_recipe(recipe, decoder)
    if (kv == "int8") != (kv_scales is not None) or (kv_scales is not None and len(kv_scales) != decoder.num_layers):
        raise ValueError(
            f"kv_scales must be given for kv='int8' alone, one pair for each of {decoder.num_layers} layers"
        )
    weights = Weights(checkpoint, decoder, scales or {})
    with GraphBuilder(directory) as graph:
        _Assembly(graph, decoder, weights, recipe, weight_hook, taps, kv_scales, limit).assemble()
        graph.save()
    return decoder.architecture(limit)


def _check_recipe(recipe: Recipe, decoder: Decoder) -> None:
    for name, precision in (("default", recipe.default), *recipe.products.items()):
        if name != "default" and name not in decoder.products:
            raise ValueError(f"recipe {recipe.name} names product {name}; there are {', '.join(decoder.products)}")
        if precision not in PRECISIONS:
            offered = ", ".join(f"({p.weight_bits}, {p.activation_bits})" for p in PRECISIONS)
            raise ValueError(
                f"recipe {recipe.name} gives {name} ({precision.weight_bits}, {precision.activation_bits}) bits of "
                f"weight and activation; there are {offered}"
            )


class _Assembly:
    """One graph in the making. Names of values: `layers.{i}.{what}`, a product's output having the product's name."""

    def __init__(
        self,
        graph: GraphBuilder,
        decoder: Decoder,
        weights: Weights,
        recipe: Recipe,
        weight_hook: WeightHook | None,
        taps: Tap | None,
        kv_scales: Sequence[tuple[Floats, Floats]] | None,
        max_context: int,
    ) -> None:
        self.graph = graph
        self.decoder = decoder
        self.weights = weights
        self.recipe = recipe
        self.weight_hook = weight_hook
        self.taps = taps
        self.kv_scales = kv_scales
        self.max_context = max_context

    def assemble(self) -> None:
        g, d = self.graph, self.decoder
        g.input("input_ids", np.int64, ["batch", "sequence"])
        g.input("seqlens_k", np.int32, ["batch"])
        g.input("total_sequence_length", np.int32, [])
        g.input("logits_rows", np.int64, ["rows"])
        g.output("logits", np.float32, ["rows", d.vocab_size])
        g.output("hidden", np.float32, ["rows", d.hidden_size])
        if d.rope:
            cos, sin = tables(d.rope, d.head_size, d.max_position, self.max_context)
            g.constant("rope.cos", cos)
            g.constant("rope.sin", sin)
        residual = self._embed()
        normed = self._norm(residual, "layers.0.attention_norm", self.weights.attention_norm(0))
        for i in range(d.num_layers):
            qkv, bias = self._product(i, "qkv", normed)
            attention = self._attend(i, self._add_bias(qkv, bias))
            out, bias = self._product(i, "o", attention)
            normed, residual = self._add_norm(residual, out, bias, f"layers.{i}.mlp_norm", self.weights.mlp_norm(i))
            out, bias = self._mlp(i, normed)
            if i + 1 < d.num_layers:
                name, norm = f"layers.{i + 1}.attention_norm", self.weights.attention_norm(i + 1)
            else:
                name, norm = "final_norm", self.weights.final_norm()
            normed, residual = self._add_norm(residual, out, bias, name, norm)
        self._head(normed)

    def _precision(self, product: str) -> Precision:
        return self.recipe.products.get(product, self.recipe.default)

    def _embed(self) -> str:
        """The residual stream's start [batch, sequence, hidden]; also stores a tied head's matrix."""
        g, d = self.graph, self.decoder
        precision = self._precision("head") if d.tied else self.recipe.default
        matrix = self.weights.embedding()  # [vocab, hidden]
        if precision == FLOAT:
            name = "head.weight" if d.tied else "embedding.weight"
            x = g.node("Gather", [g.constant(name, matrix), "input_ids"], "embedding")
        elif d.tied:  # the head's matrix is [hidden, vocab]: its columns are the tokens
            store(g, "head", matrix, precision, self.weight_hook)
            columns = g.node("Gather", ["head.weight", "input_ids"], "embedding.columns", axis=1)
            levels = g.node("Transpose", [columns], "embedding.levels", perm=[1, 2, 0])
            x = self._dequantize(levels, "head.scale")
        else:
            quantized, scale = round_to_nearest(matrix)
            levels = g.node("Gather", [g.constant("embedding.weight", quantized), "input_ids"], "embedding.levels")
            x = self._dequantize(levels, g.constant("embedding.scale", scale))
        return self._add_positions(x) if d.family.positions else x

    def _dequantize(self, levels: str, scale: str) -> str:
        """int8 token rows [batch, sequence, hidden] times each token's scale, from [vocab]."""
        g = self.graph
        last = g.shared("axis.last", np.array([-1], np.int64))
        scale = g.node("Gather", [scale, "input_ids"], "embedding.scale_of_token")
        scale = g.node("Unsqueeze", [scale, last], "embedding.scale_of_row")
        rows = g.node("Cast", [levels], "embedding.rows", to=TensorProto.FLOAT)
        return g.node("Mul", [rows, scale], "embedding")

    def _add_positions(self, x: str) -> str:
        """Add the learned embeddings of positions past + 0, past + 1, ...; past = seqlens_k + 1 - sequence.

        In a first prompt that is padded on the right the rows are shorter than the sequence and past is 0.
        """
        g = self.graph
        one, zero = g.shared("one", np.array(1, np.int64)), g.shared("zero", np.array(0, np.int64))
        axis = g.shared("axis.1", np.array([1], np.int64))
        shape = g.node("Shape", ["input_ids"], "positions.shape")
        sequence = g.node("Gather", [shape, one], "positions.sequence")
        length = g.node(
            "Add", [g.node("Cast", ["seqlens_k"], "positions.last", to=TensorProto.INT64), one], "positions.length"
        )
        past = g.node("Max", [g.node("Sub", [length, sequence], "positions.before"), zero], "positions.past")
        steps = g.node("Range", [zero, sequence, one], "positions.steps")
        index = g.node("Add", [g.node("Unsqueeze", [past, axis], "positions.start"), steps], "positions.index")
        table = g.constant("positions.weight", self.weights.positions(self.max_context))
        return g.node("Add", [x, g.node("Gather", [table, index], "positions")], "embedding.positioned")

    def _product(self, layer: int, role: str, x: str) -> tuple[str, str]:
        """The product's output without its bias, and the bias's name ("" where it has none)."""
        name = f"layers.{layer}.{role}"
        weight, bias = self.weights.product(layer, role)
        self._tap(name, x, weight.shape[1])
        store(self.graph, name, weight, self._precision(name), self.weight_hook)
        y = multiply(self.graph, name, x, self._precision(name))
        return y, "" if bias is None else self.graph.constant(f"{name}.bias", bias)

    def _tap(self, product: str, x: str, size: int) -> None:
        if self.taps:
            self.taps(self.graph, product, x, size)

    def _add_bias(self, y: str, bias: str) -> str:
        return self.graph.node("Add", [y, bias], f"{y}.biased") if bias else y

    def _norm(self, x: str, name: str, norm: Tensors) -> str:
        weight, bias = self._norm_constants(name, norm)
        op = "LayerNormalization" if bias else "SimplifiedLayerNormalization"
        return self.graph.node(op, [x, weight, *([bias] if bias else [])], name, axis=-1, epsilon=self.decoder.epsilon)

    def _add_norm(self, residual: str, x: str, x_bias: str, name: str, norm: Tensors) -> tuple[str, str]:
        """residual + x + its bias, normed and as it is."""
        weight, bias = self._norm_constants(name, norm)
        op = "SkipLayerNormalization" if bias else "SkipSimplifiedLayerNormalization"
        inputs = [residual, x, weight, *([bias] if bias else []), *([x_bias] if x_bias else [])]
        outputs = [name, "", "", f"{name}.residual"]
        self.graph.nodes(op, inputs, outputs, domain=MICROSOFT, epsilon=self.decoder.epsilon)
        return outputs[0], outputs[3]

    def _norm_constants(self, name: str, norm: Tensors) -> tuple[str, str]:
        weight, bias = norm
        weight_name = self.graph.constant(f"{name}.weight", weight)
        return weight_name, "" if bias is None else self.graph.constant(f"{name}.bias", bias)

    def _attend(self, layer: int, qkv: str) -> str:
        """[batch, sequence, (heads + 2 kv_heads) head_size] -> [batch, sequence, heads * head_size]."""
        g, d = self.graph, self.decoder
        caches = []
        for kind in ("key", "value"):
            shape: list[int | str] = ["batch", d.num_kv_heads, "capacity", d.head_size]
            dtype = np.int8 if self.kv_scales else np.float32
            caches.append(g.input(f"{kind}_cache.{layer}", dtype, shape))
            g.output(f"{kind}_cache_out.{layer}", dtype, shape)
        heads = self._norm_heads(layer, qkv) if d.family.q_norm else [qkv, "", ""]
        inputs = [*heads, *caches, "seqlens_k", "total_sequence_length"]
        attributes: dict[str, int | float | str] = {"num_heads": d.num_heads, "kv_num_heads": d.num_kv_heads}
        if d.rope:
            inputs += ["rope.cos", "rope.sin"]
            attributes["do_rotary"] = 1
        if window := d.windows[layer]:
            attributes["local_window_size"] = window
        if self.kv_scales:
            inputs += [""] * (12 - len(inputs))  # k_scale and v_scale are inputs 12 and 13
            for kind, scale in zip("kv", self.kv_scales[layer], strict=True):
                by_channel = scale.size > 1
                shape_of_scale = (1, d.num_kv_heads, 1, d.head_size) if by_channel else (1,)
                inputs.append(g.constant(f"layers.{layer}.{kind}_scale", scale.reshape(shape_of_scale)))
                attributes[f"{kind}_quant_type"] = "PER_CHANNEL" if by_channel else "PER_TENSOR"
            attributes["kv_cache_bit_width"] = 8
        outputs = [f"layers.{layer}.attention", f"key_cache_out.{layer}", f"value_cache_out.{layer}"]
        return g.nodes("GroupQueryAttention", inputs, outputs, domain=MICROSOFT, **attributes)[0]

    def _norm_heads(self, layer: int, qkv: str) -> list[str]:
        """Split, and norm each query and key head; the attention operator's own norm is refused on the CPU."""
        g, d = self.graph, self.decoder
        widths = np.array([d.num_heads, d.num_kv_heads, d.num_kv_heads], np.int64) * d.head_size
        q, k, v = g.nodes(
            "Split", [qkv, g.shared("heads.widths", widths)], [f"layers.{layer}.{x}" for x in "qkv"], axis=-1
        )
        apart = g.shared("heads.apart", np.array([0, 0, -1, d.head_size], np.int64))
        joined = g.shared("heads.joined", np.array([0, 0, -1], np.int64))
        normed = []
        for x, template in ((q, d.family.q_norm), (k, d.family.k_norm)):
            assert template is not None
            x = g.node("Reshape", [x, apart], f"{x}.heads")
            x = self._norm(x, f"{x}.norm", (self.weights.head_norm(template, layer), None))
            normed.append(g.node("Reshape", [x, joined], f"{x}.joined"))
        return [*normed, v]

    def _mlp(self, layer: int, x: str) -> tuple[str, str]:
        g, d = self.graph, self.decoder
        up, bias = self._product(layer, d.up, x)
        op, attributes = ACTIVATIONS[d.activation]
        up = self._add_bias(up, bias)
        if d.family.gated:
            gate, up = g.nodes("Split", [up], [f"layers.{layer}.{x}" for x in ("gate", "up")], axis=-1, num_outputs=2)
            gate = g.node(op, [gate], f"layers.{layer}.activation", domain=MICROSOFT, **attributes)
            inner = g.node("Mul", [gate, up], f"layers.{layer}.inner")
        else:
            inner = g.node(op, [up], f"layers.{layer}.inner", domain=MICROSOFT, **attributes)
        return self._product(layer, "down", inner)

    def _head(self, normed: str) -> None:
        g, d = self.graph, self.decoder
        rows = g.constant("hidden.shape", np.array([-1, d.hidden_size], np.int64))
        flat = g.node("Reshape", [normed, rows], "hidden.flat")  # [batch * sequence, hidden]
        hidden = g.node("Gather", [flat, "logits_rows"], "hidden")
        self._tap("head", hidden, d.hidden_size)
        precision = self._precision("head")
        if d.tied and precision == FLOAT:  # the embedding's [vocab, hidden], stored once
            g.node("Gemm", [hidden, "head.weight"], "logits", transB=1)
            return
        if not d.tied:
            store(g, "head", self.weights.head(), precision, self.weight_hook)
        multiply(g, "head", hidden, precision, output="logits")
