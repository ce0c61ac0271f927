"""A checkpoint without some of its layers, heads, MLP channels and hidden channels, read as if they had never been.

All layers keep equally many of each, though not the same ones, since transformers has one width for all. What is left
computes what the whole would with the parts masked: RMSNorm takes its mean over fewer channels, so the weights of
norms grow by (hidden before / hidden after)^(1/2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import Checkpoint, CheckpointError, Floats
from compress.families import Decoder, Family

Indices = NDArray[np.int64]
ALL = "all"  # an axis of which nothing goes
NORM = "norm"  # an axis over hidden channels whose values grow as those go


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays, as sorted indices into the model as it was."""

    layers: list[int]
    hidden: Indices  # [hidden]
    inner: list[Indices]  # by kept layer, [inner]: channels between the products of the MLP
    groups: list[Indices]  # by kept layer, [KV heads]: each with the query heads that read it


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor comes from: its name in the whole checkpoint, by axis the indices that stay, and a factor."""

    name: str
    axes: tuple[Indices | None, ...]
    factor: np.float32 | None


class Module(NamedTuple):
    """What the axes of its weight and bias run over: `hidden`, `inner`, `keys`, `queries`, or one of the above."""

    name: str
    weight: tuple[str, ...]
    bias: tuple[str, ...] = ()


class PrunedCheckpoint(Checkpoint):
    """Reads the same files; nothing is kept, as in any checkpoint. Raises CheckpointError for what cannot be cut."""

    def __init__(self, whole: Checkpoint, decoder: Decoder, kept: Kept) -> None:
        """`decoder` describes the whole."""
        check_cut(decoder, kept)
        super().__init__(whole.path)
        self.config = smaller_config(self.config, decoder, kept)
        self._sources = dict(sources(super().names, decoder, kept))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._sources)

    def read(self, name: str) -> Floats:
        if name not in self._sources:
            return super().read(name)  # says what is wrong
        source = self._sources[name]
        tensor = super().read(source.name)
        for axis, indices in enumerate(source.axes[: tensor.ndim]):
            if indices is not None:
                tensor = tensor.take(indices, axis)
        if source.factor is not None:
            tensor *= source.factor
        return np.ascontiguousarray(tensor)

    def dtype(self, name: str) -> np.dtype[Any]:
        return super().dtype(self._sources[name].name)


def has_free_width(family: Family) -> bool:
    """Whether heads and hidden channels can go: not where the head size or the embedding's scale follows from them."""
    return len(family.qkv) == 3 and not family.scaled_embedding


def check_cut(decoder: Decoder, kept: Kept) -> None:
    """Raises CheckpointError if the family cannot lose what is to go."""
    cut = len(kept.hidden) < decoder.hidden_size or any(len(x) < decoder.num_kv_heads for x in kept.groups)
    if cut and not has_free_width(decoder.family):
        raise CheckpointError(
            f"{decoder.family.name} cannot lose heads or hidden channels, since its head size or the scale of its "
            "embedding follows from them; give --layers or --ffn"
        )


def smaller_config(config: Mapping[str, Any], decoder: Decoder, kept: Kept) -> dict[str, Any]:
    keys, groups = decoder.family.keys, len(kept.groups[0])
    small = {**config, keys["num_layers"]: len(kept.layers), keys["intermediate_size"]: len(kept.inner[0])}
    if has_free_width(decoder.family):
        small[keys["hidden_size"]] = len(kept.hidden)
        small[keys["num_heads"]] = groups * (decoder.num_heads // decoder.num_kv_heads)
        small["num_key_value_heads"] = groups
        small["head_dim"] = decoder.head_size  # no longer what hidden size and heads would give
    if len(set(decoder.windows)) > 1:  # layers of both kinds
        windows = [decoder.windows[layer] for layer in kept.layers]
        small["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
    elif config.get("layer_types"):
        small["layer_types"] = [config["layer_types"][layer] for layer in kept.layers]
    return small


def sources(names: frozenset[str], decoder: Decoder, kept: Kept) -> Iterator[tuple[str, Source]]:
    """(name in the pruned checkpoint, where it comes from), for every tensor that the family has."""
    d = decoder
    shared = {"hidden": kept.hidden, NORM: kept.hidden}
    grown = None if len(kept.hidden) == d.hidden_size else np.float32((d.hidden_size / len(kept.hidden)) ** 0.5)

    def tensors(old: str, new: str, module: Module, indices: Mapping[str, Indices]) -> Iterator[tuple[str, Source]]:
        for kind, axes in (("weight", module.weight), ("bias", module.bias)):
            if f"{old}.{kind}" in names:
                factor = grown if NORM in axes else None
                yield f"{new}.{kind}", Source(f"{old}.{kind}", tuple(map(indices.get, axes)), factor)

    for module in end_modules(d.family):
        name = d.prefix + module.name
        yield from tensors(name, name, module, shared)
    if not d.tied:
        yield from tensors(d.family.head, d.family.head, Module(d.family.head, (ALL, "hidden")), shared)
    for place, layer in enumerate(kept.layers):
        indices = {
            **shared,
            "inner": kept.inner[place],
            "keys": spread(kept.groups[place], d.head_size),
            "queries": spread(kept.groups[place], d.num_heads // d.num_kv_heads * d.head_size),
        }
        for module in layer_modules(d.family):
            old, new = (d.prefix + module.name.format(i=i) for i in (layer, place))
            yield from tensors(old, new, module, indices)


def end_modules(family: Family) -> list[Module]:
    """Those outside the layers, but for the head, which has no prefix."""
    tables = [family.embedding, *([family.positions] if family.positions else [])]
    return [*(Module(name, (ALL, "hidden")) for name in tables), Module(family.final_norm, (NORM,), ("hidden",))]


def layer_modules(family: Family) -> list[Module]:
    """With names that are templates over the layer `{i}`."""

    def product(name: str, outputs: str, inputs: str) -> Module:
        return Module(name, (inputs, outputs) if family.inputs_first else (outputs, inputs), (outputs,))

    rows = ("queries", "keys", "keys") if len(family.qkv) == 3 else (ALL,)
    norms = (family.attention_norm, family.mlp_norm, family.attention_post_norm, family.mlp_post_norm)
    return [
        *(Module(norm, (NORM,), ("hidden",)) for norm in norms if norm),
        *(Module(norm, (ALL,)) for norm in (family.q_norm, family.k_norm) if norm),
        *(product(name, outputs, "hidden") for name, outputs in zip(family.qkv, rows, strict=True)),
        *(product(name, "inner", "hidden") for name in family.up),
        product(family.o, "hidden", "queries"),
        product(family.down, "hidden", "inner"),
    ]


def spread(numbers: Indices, size: int) -> Indices:
    """[n] -> [n * size]: each number's `size` neighbouring places."""
    return (numbers[:, None] * size + np.arange(size)).reshape(-1)
