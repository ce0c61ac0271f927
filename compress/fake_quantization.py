"""The artifact's arithmetic in torch, so that the levels of its weights can be trained.

A network of transformers gets the products of the artifact: inputs rotated where the recipe says so and rounded to int8
by row, weights on the very grids that are exported (scale and zero are fixed, the levels are trained), int8 keys and
values as the native cache holds them, and the rounded embedding. Its logits are those of the native form, up to the
order of sums. Rounding has the gradient of the identity (Bengio et al. 2013, arXiv:1308.3432); where a level is clipped
there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress.checkpoint import Floats
from compress.constants import Rounded, is_float_embedding, meant
from compress.families import Decoder
from compress.levels import LEVELS, TINY, Weight4, Weight8, round_to_nearest
from compress.packing import DEPTH
from compress.precisions import W8A8, is_float, precision_of
from compress.rotation import MATRIX, rotate
from compress.weights import Tensors, Weights
from proto.manifest import Precision, Recipe

INT8_CACHE = "pawl_int8_cache"  # the name of our attention among transformers' own
INSIDE = 0.49  # of a step: within the half step that rounds to a level
HADAMARD = torch.from_numpy(MATRIX)


class RoundRows(torch.autograd.Function):
    """x [..., K] as symmetric int8 by row holds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp_min(TINY) / LEVELS
        return (x / step).round_().mul_(step)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


class OnGrid(torch.autograd.Function):
    """scale (level - zero) of the whole levels from `low` to `high` that are nearest to float ones."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, scale: Tensor, zero: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward((levels >= low - 0.5) & (levels <= high + 0.5), scale)
        return levels.round().clamp_(low, high).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inside, scale = ctx.saved_tensors
        return grad_outputs[0] * scale * inside, None, None, None, None


def round_rows(x: Tensor) -> Tensor:
    rounded: Tensor = RoundRows.apply(x)  # type: ignore[no-untyped-call]
    return rounded


def spread(x: Tensor) -> Tensor:
    """compress/rotation.py's `rotate`."""
    padded = pad(x, (0, -x.shape[-1] % DEPTH))
    turned: Tensor = padded.reshape(*padded.shape[:-1], -1, DEPTH) @ HADAMARD.to(x)
    return turned.flatten(-2)


class FakeInput(nn.Module):
    """What a product reads: x [..., K] rotated, then rounded, as the precision says."""

    def __init__(self, precision: Precision) -> None:
        super().__init__()
        self.rotated, self.rounded = precision.rotated, precision.activation_bits == 8

    def forward(self, x: Tensor) -> Tensor:
        x = spread(x) if self.rotated else x
        return round_rows(x) if self.rounded else x


class FakeLinear(nn.Module):
    """A product whose weight [N, K] is `scale (level - zero)`: `floating` are trained, the nearest whole ones are seen.

    They begin where they round to the levels given, as near as that allows to the weight that was rounded, so that
    levels which were nearly another go first. In levels, one learning rate suits all layers and grids.
    """

    def __init__(self, weight: Floats, bias: Floats | None, rounded: Rounded, precision: Precision) -> None:
        super().__init__()
        self.input = FakeInput(precision)
        self.num_inputs = weight.shape[1]
        group = precision.group or self.num_inputs
        scale, zero, self.low, self.high = grid_of(rounded, precision)
        levels = _by_group(rounded.levels.astype(np.float32), group)
        exact = _by_group(weight, group) / scale + zero
        start = np.clip(exact, levels - INSIDE, levels + INSIDE)
        self.floating = nn.Parameter(torch.from_numpy(start))  # [N, groups, group]
        self.bias = None if bias is None else nn.Parameter(torch.from_numpy(bias), requires_grad=False)
        self.register_buffer("scale", torch.from_numpy(scale))
        self.register_buffer("zero", torch.from_numpy(zero))

    def forward(self, x: Tensor) -> Tensor:
        weight = OnGrid.apply(self.floating, self.scale, self.zero, self.low, self.high)  # type: ignore[no-untyped-call]
        return linear(self.input(x), weight.flatten(1)[:, : self.num_inputs], self.bias)

    @torch.no_grad()
    def levels(self) -> Tensor:
        """[N, K], as whole floats."""
        return self.floating.round().clamp_(self.low, self.high).flatten(1)[:, : self.num_inputs]


def grid_of(rounded: Rounded, precision: Precision) -> tuple[Floats, Floats, float, float]:
    """Scale and zero, both [N, groups, 1], and the smallest and the largest level."""
    scale = rounded.scale.astype(np.float32).reshape(len(rounded.levels), -1, 1)
    if isinstance(rounded, Weight8):
        return scale, np.zeros_like(scale), -float(LEVELS), float(LEVELS)
    if isinstance(rounded, Weight4):
        scale = scale * rounded.step[..., None]
    return scale, rounded.zero[..., None].astype(np.float32), 0.0, 2.0**precision.weight_bits - 1


def _by_group(values: Floats, group: int) -> Floats:
    """[N, K] -> [N, ceil(K / group), group]; what fills up the last group is 0."""
    filled: Floats = np.pad(values, ((0, 0), (0, -values.shape[1] % group)))
    return filled.reshape(len(values), -1, group)


def fake_quantize(
    network: PreTrainedModel,
    decoder: Decoder,
    recipe: Recipe,
    weights: Weights,
    rounded: Mapping[str, Rounded],
    *,
    int8_cache: bool,
) -> dict[str, list[FakeLinear]]:
    """Give the network the artifact's arithmetic, in place; the parts of each trained product, one above the other.

    `network` is the checkpoint that `weights` read, with their migration; `rounded` has every product that is not
    float. Nothing but the layers' weights is trained.
    """
    network.requires_grad_(False)
    modules = {"qkv": decoder.family.qkv, "o": (decoder.family.o,), decoder.up: decoder.family.up}
    modules["down"] = (decoder.family.down,)
    prefix = decoder.family.prefixes[0]
    trained: dict[str, list[FakeLinear]] = {}
    for layer in range(decoder.num_layers):
        for norm, tensors in (
            (decoder.family.attention_norm, weights.attention_norm(layer)),
            (decoder.family.mlp_norm, weights.mlp_norm(layer)),
        ):
            _fill_norm(network.get_submodule(prefix + norm.format(i=layer)), tensors, decoder)
        for role, templates in modules.items():
            product = f"layers.{layer}.{role}"
            precision = precision_of(recipe, product)
            names = [prefix + template.format(i=layer) for template in templates]
            made = _products(weights.product(layer, role), rounded.get(product), precision, _sizes(network, names))
            for name, part in zip(names, made, strict=True):
                network.set_submodule(name, part)
            if not is_float(precision):
                trained[product] = [part for part in made if isinstance(part, FakeLinear)]
    _fake_ends(network, decoder, recipe, weights, rounded.get("head"))
    if int8_cache:
        network.set_attn_implementation(INT8_CACHE)
    return trained


def levels_of(parts: list[FakeLinear], before: Rounded) -> Rounded:
    """What was trained, on the grid that it was trained on."""
    levels = torch.cat([part.levels() for part in parts]).cpu().numpy()
    return before._replace(levels=levels.astype(before.levels.dtype))


def _sizes(network: PreTrainedModel, names: list[str]) -> list[int]:
    """Outputs of each module."""
    found: list[Any] = [network.get_submodule(name) for name in names]
    return [module.nf if hasattr(module, "nf") else module.out_features for module in found]  # GPT-2's Conv1D: nf


def _products(tensors: Tensors, rounded: Rounded | None, precision: Precision, sizes: list[int]) -> list[nn.Module]:
    """The modules in place of those that are fused into one product, with so many outputs each."""
    weight, bias = tensors
    if precision.rotated:
        weight = rotate(weight)
    made: list[nn.Module] = []
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        part_bias = None if bias is None else bias[rows].copy()
        if rounded is None:
            plain = nn.Linear(weight.shape[1], size, bias=bias is not None)
            made.append(_fill(plain, weight[rows], part_bias).requires_grad_(False))
        else:
            part = rounded._replace(**{name: values[rows] for name, values in rounded._asdict().items()})
            made.append(FakeLinear(weight[rows], part_bias, part, precision))
        start += size
    return made


def _fake_ends(
    network: PreTrainedModel, decoder: Decoder, recipe: Recipe, weights: Weights, head: Rounded | None
) -> None:
    """The embedding and the head as the artifact holds them. What the head reads is made behind the final norm, so that
    logits stay the product of hidden states and a matrix, as train/model.py wants it."""
    family, precision = decoder.family, precision_of(recipe, "head")
    prefix = family.prefixes[0]
    norm = network.get_submodule(prefix + family.final_norm)
    _fill_norm(norm, weights.final_norm(), decoder)
    embedding: Any = network.get_submodule(prefix + family.embedding)
    if head is not None:
        matrix = meant(head, precision)
        network.set_submodule(prefix + family.final_norm, nn.Sequential(norm, FakeInput(precision)))
        lm_head = nn.Linear(matrix.shape[1], len(matrix), bias=False)
        whole: Any = network
        whole.set_output_embeddings(_fill(lm_head, matrix).requires_grad_(False))
        if decoder.tied:
            looked_up = rotate(matrix)[:, : decoder.hidden_size] if precision.rotated else matrix
            embedding.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(looked_up)), requires_grad=False)
    if not decoder.tied and not is_float_embedding(recipe):
        _fill(embedding, meant(round_to_nearest(weights.embedding()), W8A8))


def _fill_norm(module: nn.Module, tensors: Tensors, decoder: Decoder) -> None:
    weight, bias = tensors
    _fill(module, weight - decoder.family.norm_offset, bias)


def _fill(module: nn.Module, weight: Floats, bias: Floats | None = None) -> nn.Module:
    filled: Any = module
    filled.weight.data = torch.from_numpy(np.ascontiguousarray(weight))
    if bias is not None:
        filled.bias.data = torch.from_numpy(bias)
    return module


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    """transformers' attention over keys (after the rotary embedding) and values [rows, heads, length, head_size], each
    rounded by position and head, the keys while they are rotated."""
    key = spread(round_rows(spread(key)))[..., : key.shape[-1]]
    attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, round_rows(value), mask, **named)
    return attended


AttentionInterface.register(INT8_CACHE, _attend)
AttentionMaskInterface.register(INT8_CACHE, sdpa_mask)
