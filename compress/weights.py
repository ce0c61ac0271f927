"""A decoder's weights, layer by layer, with scale migration folded in.

Migration moves magnitude from a product's input channels into its weight: the input is divided by a vector s [K] and
the weight's columns are multiplied by it, which changes nothing in exact arithmetic but makes the input easier to
quantize. The division costs nothing at run time, because it is folded into whatever makes the input:

| product        | s                        | divided by s                                             |
|----------------|--------------------------|----------------------------------------------------------|
| `qkv`          | [hidden]                 | the attention norm's weight and bias                     |
| `o`            | [num_heads * head_size]  | the rows of v: constant over the query heads of one group |
| `gate_up`/`fc` | [hidden]                 | the MLP norm's weight and bias                           |
| `down`         | [intermediate]           | the rows of up; not through GPT-2's GELU                 |
| `head`         | none                     | its matrix may be the embedding too                      |
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compress.checkpoint import Checkpoint, CheckpointError, Floats
from compress.families import Decoder

Tensors = tuple[Floats, Floats | None]  # a weight and its bias


def share_over_groups(decoder: Decoder, values: Floats) -> Floats:
    """[num_heads * head_size] -> the same shape, each value the mean over the query heads of its KV head.

    Makes a scale for `o` foldable: query heads of one group read the same v.
    """
    grouped = values.reshape(decoder.num_kv_heads, -1, decoder.head_size)
    return np.broadcast_to(grouped.mean(axis=1, keepdims=True), grouped.shape).reshape(-1).copy()


class Weights:
    """Reads what a layer needs, when it is asked for; keeps nothing."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, scales: Mapping[str, Floats]) -> None:
        self._checkpoint = checkpoint
        self._decoder = decoder
        self._scales = scales
        self._check_scales()

    def embedding(self) -> Floats:
        """[vocab, hidden]"""
        d = self._decoder
        return self._read(f"{d.prefix}{d.family.embedding}.weight", (d.vocab_size, d.hidden_size))

    def positions(self, length: int) -> Floats:
        """The first learned position embeddings, [length, hidden]."""
        d = self._decoder
        return self._read(f"{d.prefix}{d.family.positions}.weight", (d.max_position, d.hidden_size))[:length]

    def head(self) -> Floats:
        """[vocab, hidden]; of an untied head."""
        return self._read(f"{self._decoder.family.head}.weight", (self._decoder.vocab_size, self._decoder.hidden_size))

    def attention_norm(self, layer: int) -> Tensors:
        return self._norm(self._decoder.family.attention_norm.format(i=layer), f"layers.{layer}.qkv")

    def mlp_norm(self, layer: int) -> Tensors:
        return self._norm(self._decoder.family.mlp_norm.format(i=layer), f"layers.{layer}.{self._decoder.up}")

    def final_norm(self) -> Tensors:
        return self._norm(self._decoder.family.final_norm, "head")

    def head_norm(self, template: str, layer: int) -> Floats:
        """The RMSNorm weight of one query or key head, [head_size]."""
        return self._norm_weight(template.format(i=layer), self._decoder.head_size)

    def post_norm(self, template: str, layer: int) -> Floats:
        """The weight of an RMSNorm behind attention or the MLP, [hidden]."""
        return self._norm_weight(template.format(i=layer), self._decoder.hidden_size)

    def product(self, layer: int, role: str) -> Tensors:
        """Weight [N, K] and bias [N] of `qkv`, `o`, `gate_up` or `fc`, or `down`, migrated."""
        d = self._decoder
        num_outputs, num_inputs = d.shape(role)
        names = [d.prefix + module.format(i=layer) for module in d.modules(role)]
        weight = self._matrix(names, num_outputs, num_inputs)
        bias: Floats | None = None
        if role in d.biases:
            bias = np.concatenate([self._checkpoint.read(f"{name}.bias") for name in names])
            if bias.shape != (num_outputs,):
                raise CheckpointError(f"{names[0]}.bias does not fit config.json: {num_outputs} values are expected.")
        if (scale := self._scales.get(f"layers.{layer}.{role}")) is not None:
            weight *= scale
        # The rows that make the next product's input: v for o, up for down.
        if role == "qkv" and (scale := self._scales.get(f"layers.{layer}.o")) is not None:
            per_kv_head = scale.reshape(d.num_kv_heads, -1, d.head_size)[:, 0].reshape(-1)  # [kv_heads * head_size]
            _divide_rows(weight, bias, slice(num_outputs - len(per_kv_head), None), per_kv_head)
        if role == "gate_up" and (scale := self._scales.get(f"layers.{layer}.down")) is not None:
            _divide_rows(weight, bias, slice(d.intermediate_size, None), scale)
        return weight, bias

    def _matrix(self, names: list[str], num_outputs: int, num_inputs: int) -> Floats:
        """The modules' weights, one above the other: [N, K]."""
        if len(names) == 1:
            shape = (num_inputs, num_outputs) if self._decoder.family.inputs_first else (num_outputs, num_inputs)
            weight = self._read(f"{names[0]}.weight", shape)
            return weight.T if self._decoder.family.inputs_first else weight
        fused = np.empty((num_outputs, num_inputs), np.float32)
        start = 0
        for name in names:
            part = self._checkpoint.read(f"{name}.weight")
            if part.shape[1:] != (num_inputs,) or start + len(part) > num_outputs:
                raise CheckpointError(f"{name}.weight has shape {part.shape}, which config.json's sizes do not give.")
            fused[start : start + len(part)] = part
            start += len(part)
        if start != num_outputs:
            raise CheckpointError(f"{', '.join(names)} have {start} rows together; config.json gives {num_outputs}.")
        return fused

    def _norm(self, module: str, product: str) -> Tensors:
        d = self._decoder
        weight = self._norm_weight(module, d.hidden_size)
        bias = self._read(f"{d.prefix}{module}.bias", (d.hidden_size,)) if d.family.norm == "layer" else None
        if (scale := self._scales.get(product)) is not None:
            weight /= scale
            if bias is not None:
                bias /= scale
        return weight, bias

    def _norm_weight(self, module: str, size: int) -> Floats:
        """What the norm multiplies by."""
        d = self._decoder
        weight = self._read(f"{d.prefix}{module}.weight", (size,))
        return weight + np.float32(d.family.norm_offset) if d.family.norm_offset else weight

    def _read(self, name: str, shape: tuple[int, ...]) -> Floats:
        tensor = self._checkpoint.read(name)
        if tensor.shape != shape:
            raise CheckpointError(f"{name} has shape {tensor.shape}; config.json gives {shape}.")
        return tensor

    def _check_scales(self) -> None:
        d = self._decoder
        sizes = {role: d.shape(role)[1] for role in d.roles}
        foldable = sizes if d.family.gated else sizes.keys() - {"down"}
        for product, scale in self._scales.items():
            role = product.rpartition(".")[2]
            if product not in d.products or role not in foldable:
                raise ValueError(f"the scale of {product} cannot be folded; those of {', '.join(sorted(foldable))} can")
            if scale.shape != (sizes[role],) or not np.all(scale > 0):
                raise ValueError(f"the scale of {product} must be {sizes[role]} positive numbers, not {scale.shape}")
            if role == "o" and np.ptp(scale.reshape(d.num_kv_heads, -1, d.head_size), axis=1).any():
                raise ValueError(f"the scale of {product} differs within a KV group: use share_over_groups")


def _divide_rows(weight: Floats, bias: Floats | None, rows: slice, scale: Floats) -> None:
    weight[rows] /= scale[:, None]
    if bias is not None:
        bias[rows] /= scale
