"""The decoder as a graph of stock operators, which runs on any ONNX Runtime.

    1. embed the tokens                       input_ids [batch, sequence] -> [batch, sequence, hidden]
    2. for each layer: norm, qkv, attention (which writes the caches), o; norm, MLP
    3. final norm, then only the wanted rows  -> hidden [rows, hidden]
    4. the head                               -> logits [rows, vocab]

Inputs: `input_ids` int64 [batch, sequence]; `seqlens_k` int32 [batch], each row's length after this step minus 1;
`total_sequence_length` int32 [], the largest length; `logits_rows` int64 [rows], indices into batch * sequence; and
by layer `key_cache.{i}`, `value_cache.{i}` [batch, kv_heads, capacity, head_size], int8 or of the activations' type,
which is float32 or, for CUDA, of 16 bits. Outputs: `logits`, `hidden`, both float32, and `key_cache_out.{i}`,
`value_cache_out.{i}`, to be bound to the inputs' memory. The graph for CUDA has others too: compress/selection.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from onnx import TensorProto

from compress.accuracy_levels import FLOAT_PRODUCT, INT8_PRODUCT
from compress.checkpoint import Floats
from compress.constants import is_float_embedding
from compress.families import Decoder
from compress.graph import MICROSOFT, GraphBuilder
from compress.linear import multiply, rotate_value
from compress.operands import Operand, int8_rows, load, row_values
from compress.packing import DEPTH, pad
from compress.precisions import float_type, is_float, is_weight_only, precision_of
from compress.selection import gather_tokens, input_tokens, select
from compress.weight_file import WeightStore
from proto.manifest import GRAPH, Precision, Recipe

# activation in config.json -> operator and its attributes
ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "silu": ("QuickGelu", {"alpha": 1.0}),
    "gelu_new": ("FastGelu", {}),
    "gelu_pytorch_tanh": ("FastGelu", {}),
}


class StockGraph:
    """One graph in the making. Names of values: `layers.{i}.{what}`, a product's output having the product's name.

    `product_inputs` tells what each product reads: values [batch, sequence, K] or, for the head, [rows, K].
    """

    def __init__(
        self,
        weights: WeightStore,
        decoder: Decoder,
        recipe: Recipe,
        kv_scales: Sequence[tuple[Floats, Floats]] | None = None,
        accuracy_levels: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.graph = GraphBuilder(weights)
        self.floats = weights.floats
        self.decoder = decoder
        self.recipe = recipe
        self.kv_scales = kv_scales
        self.accuracy_levels = accuracy_levels  # of weight-only products: compress/accuracy_levels.py
        self.product_inputs: dict[str, str] = {}

    def write(self, directory: Path) -> None:
        """Write `model.onnx` into the directory of the weight file, which must hold all constants."""
        g, d = self.graph, self.decoder
        (input_tokens if self.floats == np.float32 else gather_tokens)(g)
        self._input_lengths()
        head = self._load_head()
        residual = self._embed(head)
        normed = self._norm(residual, "layers.0.attention_norm")
        for i in range(d.num_layers):
            out, bias, residual = self._layer(i, normed, residual)
            name = f"layers.{i + 1}.attention_norm" if i + 1 < d.num_layers else "final_norm"
            normed, residual = self._add_norm(residual, out, bias, name)
        self._head(normed, head)
        g.save(directory / GRAPH)

    def _input_lengths(self) -> None:
        self.graph.input("seqlens_k", np.int32, ["batch"])
        self.graph.input("total_sequence_length", np.int32, [])

    def _load_head(self) -> Operand:
        return load(self.graph, "head", precision_of(self.recipe, "head"), self.decoder.shape("head"))

    def _layer(self, layer: int, normed: str, residual: str) -> tuple[str, str, str]:
        """The MLP's output without its bias, that bias's name, and the residual stream to which both are to be added.

        `normed` is the residual stream [batch, sequence, hidden] after the attention norm.
        """
        qkv, bias = self._product(layer, "qkv", normed)
        attention = self._attend(layer, self._add_bias(qkv, bias))
        out, bias = self._post_norm(layer, "attention", *self._product(layer, "o", attention))
        normed, residual = self._add_norm(residual, out, bias, f"layers.{layer}.mlp_norm")
        return *self._post_norm(layer, "mlp", *self._mlp(layer, normed)), residual

    def _embed(self, head: Operand) -> str:
        """The residual stream's start [batch, sequence, hidden]."""
        g, d = self.graph, self.decoder
        precision = precision_of(self.recipe, "head")
        if is_float(precision) if d.tied else is_float_embedding(self.recipe):
            x = g.node("Gather", ["head.weight" if d.tied else "embedding.weight", "input_ids"], "embedding")
        elif d.tied and is_weight_only(precision):
            x = self._gather_blocks(head, precision)
        elif d.tied:  # the head's matrix is [hidden, vocab]: its columns are the tokens
            columns = g.node("Gather", [head.weight, "input_ids"], "embedding.columns", axis=1)
            levels = g.node("Transpose", [columns], "embedding.levels", perm=[1, 2, 0])
            x = self._dequantize(levels, head.scale)
            if precision.rotated:
                x = self._rotate_back(x)
        else:
            matrix = int8_rows(g, "embedding", d.shape("head"))
            levels = g.node("Gather", [matrix, "input_ids"], "embedding.levels")
            x = self._dequantize(levels, row_values(g, "embedding.scale", d.vocab_size))
        if d.embedding_scale != 1:
            scale = g.shared("embedding.factor", np.array(d.embedding_scale, self.floats))
            x = g.node("Mul", [x, scale], "embedding.scaled")
        return self._add_positions(x) if d.family.positions else x

    def _gather_blocks(self, head: Operand, precision: Precision) -> str:
        """Token rows of a tied weight-only head, [batch, sequence, hidden]."""
        g, d = self.graph, self.decoder
        last = g.shared("axis.last", np.array([-1], np.int64))
        # A block is an axis of its own, as the product has it: so the matrix is stored once.
        scale, zero = (g.node("Unsqueeze", [value, last], f"{value}.apart") for value in (head.scale, head.zero))
        sizes = {"gather_axis": 0, "quantize_axis": 2, "bits": precision.weight_bits, "block_size": precision.group}
        inputs = [head.weight, "input_ids", scale, zero]
        blocks = g.node("GatherBlockQuantized", inputs, "embedding.blocks", domain=MICROSOFT, **sizes)
        width = pad(d.hidden_size, precision.group)
        joined = g.shared("embedding.joined", np.array([0, 0, width], np.int64))
        return self._cut(g.node("Reshape", [blocks, joined], "embedding.whole"), width)

    def _dequantize(self, levels: str, scale: str) -> str:
        """int8 token rows [batch, sequence, hidden] times each token's scale, from [vocab]."""
        g = self.graph
        last = g.shared("axis.last", np.array([-1], np.int64))
        scale = g.node("Gather", [scale, "input_ids"], "embedding.scale_of_token")
        scale = g.node("Unsqueeze", [scale, last], "embedding.scale_of_row")
        rows = g.node("Cast", [levels], "embedding.rows", to=TensorProto.FLOAT)
        return g.node("Mul", [rows, scale], "embedding")

    def _rotate_back(self, x: str) -> str:
        """Rotated token rows as they were: the rotation is its own inverse. Drops the padding."""
        g, d = self.graph, self.decoder
        return self._cut(rotate_value(g, "embedding", x, pad(d.hidden_size, DEPTH)), pad(d.hidden_size, DEPTH))

    def _cut(self, x: str, width: int) -> str:
        """Token rows [batch, sequence, width] without the padding."""
        g, d = self.graph, self.decoder
        if d.hidden_size == width:
            return x
        start, end = (g.shared(f"embedding.{n}", np.array([n], np.int64)) for n in (0, d.hidden_size))
        return g.node("Slice", [x, start, end, g.shared("axis.last", np.array([-1], np.int64))], "embedding.cut")

    def _add_positions(self, x: str) -> str:
        """Add the learned embeddings of positions past + 0, past + 1, ...; past = seqlens_k + 1 - sequence.

        In a first prompt that is padded on the right the rows are shorter than the sequence and past is 0. The sequence
        is counted, not asked of a shape: shapes are computed on the host, and a CUDA graph has no host.
        """
        g = self.graph
        one, zero = g.shared("one", np.array(1, np.int64)), g.shared("zero", np.array(0, np.int64))
        axis = g.shared("axis.1", np.array([1], np.int64))
        each = g.node("Equal", ["input_ids", "input_ids"], "positions.each")
        ones = g.node("Cast", [each], "positions.ones", to=TensorProto.INT64)
        count = g.node("CumSum", [ones, g.shared("axis.one", np.array(1, np.int64))], "positions.count")
        ends = (g.shared(f"axis.{name}", np.array([at], np.int64)) for name, at in (("last", -1), ("end", 2**31)))
        sequence = g.node("Slice", [count, *ends, axis], "positions.sequence")
        last = g.node("Cast", ["seqlens_k"], "positions.last", to=TensorProto.INT64)
        length = g.node("Add", [g.node("Unsqueeze", [last, axis], "positions.column"), one], "positions.length")
        past = g.node("Max", [g.node("Sub", [length, sequence], "positions.before"), zero], "positions.past")
        end = g.node("Add", [past, count], "positions.end")
        index = g.node("Sub", [end, one], "positions.index")
        return g.node("Add", [x, g.node("Gather", ["positions.weight", index], "positions")], "embedding.positioned")

    def _product(self, layer: int, role: str, x: str) -> tuple[str, str]:
        """The product's output without its bias, and the bias's name ("" where it has none)."""
        g, d = self.graph, self.decoder
        name = f"layers.{layer}.{role}"
        precision, shape = precision_of(self.recipe, name), d.shape(role)
        self.product_inputs[name] = x
        operand = load(g, name, precision, shape, d.parts(role))
        coarsest = INT8_PRODUCT if float_type(precision) == "fp32" else FLOAT_PRODUCT
        level = self.accuracy_levels.get(name, coarsest)
        y = multiply(g, name, x, operand, precision, shape, accuracy_level=level)
        return y, g.stored(f"{name}.bias")

    def _post_norm(self, layer: int, part: str, y: str, bias: str) -> tuple[str, str]:
        """What attention or the MLP adds to the residual stream, and a bias to add to it, normed if there is a norm."""
        name = f"layers.{layer}.{part}_post_norm"
        if not self.graph.stored(f"{name}.weight"):
            return y, bias
        return self._norm(self._add_bias(y, bias), name), ""

    def _add_bias(self, y: str, bias: str) -> str:
        return self.graph.node("Add", [y, bias], f"{y}.biased") if bias else y

    def _norm(self, x: str, name: str, weights: str = "") -> str:
        """x normed, as value `name`; the constants are called `weights`, if not the same."""
        weight, *bias = self._norm_constants(weights or name)
        op = "LayerNormalization" if bias else "SimplifiedLayerNormalization"
        return self.graph.node(op, [x, weight, *bias], name, axis=-1, epsilon=self.decoder.epsilon)

    def _add_norm(self, residual: str, x: str, x_bias: str, name: str) -> tuple[str, str]:
        """residual + x + its bias, normed and as it is."""
        weight, *bias = self._norm_constants(name)
        op = "SkipLayerNormalization" if bias else "SkipSimplifiedLayerNormalization"
        inputs = [residual, x, weight, *bias, *([x_bias] if x_bias else [])]
        outputs = [name, "", "", f"{name}.residual"]
        self.graph.nodes(op, inputs, outputs, domain=MICROSOFT, epsilon=self.decoder.epsilon)
        return outputs[0], outputs[3]

    def _norm_constants(self, name: str) -> list[str]:
        return [f"{name}.weight", *filter(None, [self.graph.stored(f"{name}.bias")])]

    def _attend(self, layer: int, qkv: str) -> str:
        """[batch, sequence, (heads + 2 kv_heads) head_size] -> [batch, sequence, heads * head_size]."""
        g, d = self.graph, self.decoder
        caches = []
        for kind in ("key", "value"):
            shape: list[int | str] = ["batch", d.num_kv_heads, "capacity", d.head_size]
            dtype = np.dtype(np.int8) if self.kv_scales else self.floats
            caches.append(g.input(f"{kind}_cache.{layer}", dtype, shape))
            g.output(f"{kind}_cache_out.{layer}", dtype, shape)
        heads = self._norm_heads(layer, qkv) if d.family.q_norm else [qkv, "", ""]
        inputs = [*heads, *caches, "seqlens_k", "total_sequence_length"]
        attributes: dict[str, int | float | str] = {"num_heads": d.num_heads, "kv_num_heads": d.num_kv_heads}
        attributes["scale"] = d.attention_scale
        if rope := d.rope_of(layer):
            inputs += [f"{rope}.cos", f"{rope}.sin"]
            attributes["do_rotary"] = 1
        if window := d.windows[layer]:
            attributes["local_window_size"] = window
        if self.kv_scales:
            inputs += [""] * (12 - len(inputs))  # k_scale and v_scale are inputs 12 and 13
            for kind, scale in zip("kv", self.kv_scales[layer], strict=True):
                by_channel = scale.size > 1
                shape_of_scale = (1, d.num_kv_heads, 1, d.head_size) if by_channel else (1,)
                scale = scale.reshape(shape_of_scale)
                inputs.append(g.constant(f"layers.{layer}.{kind}_scale", scale, as_it_is=True))
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
        for x in (q, k):
            heads = g.node("Reshape", [x, apart], f"{x}.heads")
            heads = self._norm(heads, f"{x}.normed", f"{x}_norm")
            normed.append(g.node("Reshape", [heads, joined], f"{x}.joined"))
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

    def _head(self, normed: str, operand: Operand) -> None:
        g, d = self.graph, self.decoder
        g.input("logits_rows", np.int64, ["rows"])
        g.output("logits", np.float32, ["rows", d.vocab_size])
        g.output("hidden", np.float32, ["rows", d.hidden_size])
        rows = g.constant("hidden.shape", np.array([-1, d.hidden_size], np.int64))
        flat = g.node("Reshape", [normed, rows], "hidden.flat")  # [batch * sequence, hidden]
        precision = precision_of(self.recipe, "head")
        is_half = self.floats != np.float32
        hidden, logits = (f"{name}.half" if is_half else name for name in ("hidden", "logits"))
        g.node("Gather", [flat, "logits_rows"], hidden)
        self.product_inputs["head"] = hidden
        if d.tied and is_float(precision):  # the embedding's [vocab, hidden], stored once
            g.node("Gemm", [hidden, "head.weight"], logits, transB=1)
        else:
            level = FLOAT_PRODUCT if is_half else INT8_PRODUCT
            multiply(g, "head", hidden, operand, precision, d.shape("head"), output=logits, accuracy_level=level)
        if is_half:
            for name in ("hidden", "logits"):
                g.node("Cast", [f"{name}.half"], name, to=TensorProto.FLOAT)
            select(g, d.vocab_size)
