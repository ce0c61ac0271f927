"""The shapes that a model may be cut to, and what each would cost.

Decoding for one request is bound by memory: each token reads every weight of the products once, and the keys and
values of its context. So the bytes read per token are the model of latency, with one byte for each weight and each
cached value, as in the w8a8 artifacts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from train.flags import option
from train.flops import Dimensions, parameters

CONTEXT = 1024  # cached positions that a token reads, in the cost of decoding
FFN_STEP = 64  # MLP widths are multiples of it: the inputs that the native operators take at a time
WIDTH_STEP = 8  # hidden widths are multiples of it, and of the number of heads, as transformers wants of a Llama
LEAST_SHARE = 0.5  # of each number is kept: beyond that a cut does not heal (Minitron: prune again after distilling)
GRID = (1.0, 0.9, 0.8, 0.7)  # shares of layers, heads and hidden width that are tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What the smaller model may cost, and numbers that are fixed."""

    ratio: float = option(0.0, "share of all parameters to remove, embeddings counted; 0: no limit", least=0, most=0.9)
    parameters: int = option(0, "parameters to keep at most; 0: no limit", least=0)
    latency: float = option(0.0, "share of the bytes read per decoded token to remove; 0: no limit", least=0, most=0.9)
    layers: int = option(0, "layers to keep; 0: free", least=0)
    hidden: int = option(0, "hidden width to keep; 0: free", least=0)
    ffn: int = option(0, "MLP channels to keep in each layer; 0: free", least=0)
    kv_groups: int = option(0, "KV heads to keep in each layer, each with its query heads; 0: free", least=0)

    @property
    def limited(self) -> bool:
        return bool(self.ratio or self.parameters or self.latency)

    def allows(self, shape: Dimensions, full: Dimensions) -> bool:
        return (
            (not self.ratio or total_parameters(shape) <= (1 - self.ratio) * total_parameters(full))
            and (not self.parameters or total_parameters(shape) <= self.parameters)
            and (not self.latency or bytes_per_token(shape) <= (1 - self.latency) * bytes_per_token(full))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions:
    """Settings of `python -m compress prune` besides the size."""

    text: Path | None = option(None, "text to measure on (default: Python's own docs)", parse=Path)
    window: int = option(512, "tokens of context", least=2)
    calibration_windows: int = option(24, "windows of text that importance is measured on", least=1)
    held_out_windows: int = option(4, "windows of held-out text that the result is measured on", least=1)


def bytes_per_token(shape: Dimensions) -> int:
    """Read to decode a token for one request: the weights of all products, and the cache."""
    return parameters(shape).active + 2 * shape.layers * shape.keys * CONTEXT


def total_parameters(shape: Dimensions) -> int:
    return parameters(shape).total


def candidates(full: Dimensions, size: Size, *, free_width: bool) -> list[Dimensions]:
    """The shapes to try, each as large as the limits allow: layers, heads and hidden width on a grid, the MLP's width
    being what is left. Without limits, the one that the fixed numbers give.

    Without `free_width`, heads and hidden width stay. Raises ValueError if nothing is asked for, or no shape will do.
    """
    fixed = {
        "layers": (size.layers, full.layers),
        "width": (size.hidden, full.width),
        "inner": (size.ffn, full.inner),
        "kv_heads": (size.kv_groups, full.kv_heads),
    }
    flags = {"layers": "--layers", "width": "--hidden", "inner": "--ffn", "kv_heads": "--kv-groups"}
    if not size.limited and not any(given for given, _ in fixed.values()):
        raise ValueError("nothing says how much to prune; give --ratio 0.25, --latency 0.3, --parameters or a shape")
    for name, (given, most) in fixed.items():
        if given > most:
            raise ValueError(f"{flags[name]} {given} is more than the model's {most}; give at most that")
    if not size.limited:
        chosen = _shaped(full, **{name: given or most for name, (given, most) in fixed.items()})
        _check_width(chosen)
        return [chosen]
    free = {name: [given] if given else _grid(most, name, full.heads) for name, (given, most) in fixed.items()}
    if not free_width:
        free |= {name: [given or most] for name, (given, most) in fixed.items() if name in ("width", "kv_heads")}
    found = []
    for layers, width, kv_heads in product(free["layers"], free["width"], free["kv_heads"]):
        shapes = (_shaped(full, layers=layers, width=width, kv_heads=kv_heads, inner=n) for n in free["inner"])
        if (widest := next((shape for shape in shapes if size.allows(shape, full)), None)) is not None:
            found += [widest] if width % widest.heads == 0 else []
    if not found:
        raise ValueError(
            f"no shape keeps {LEAST_SHARE:.0%} of each of layers, widths and heads and meets the limits; prune in two "
            "steps and distil between them, or give the shape itself with --layers, --ffn, --kv-groups and --hidden"
        )
    return [shape for shape in found if not any(_within(shape, other) for other in found if other != shape)]


def _grid(most: int, name: str, heads: int) -> list[int]:
    """The numbers to try, from the largest to the smallest."""
    if name == "inner":
        smaller = range((most - 1) // FFN_STEP * FFN_STEP, 0, -FFN_STEP)
        return [most, *(size for size in smaller if size >= LEAST_SHARE * most)]
    step = math.lcm(WIDTH_STEP, heads) if name == "width" else 1
    return sorted({most, *(max(step, round(share * most / step) * step) for share in GRID[1:])}, reverse=True)


def _check_width(shape: Dimensions) -> None:
    if shape.width % shape.heads:
        lower = shape.width // shape.heads * shape.heads
        raise ValueError(
            f"a hidden width of {shape.width} is no multiple of the {shape.heads} heads, which transformers asks for; "
            f"give --hidden {lower}"
        )


def _shaped(full: Dimensions, *, layers: int, width: int, inner: int, kv_heads: int) -> Dimensions:
    heads = kv_heads * (full.heads // full.kv_heads)
    windowed = round(full.windowed_layers * layers / full.layers)
    return replace(
        full, layers=layers, width=width, inner=inner, kv_heads=kv_heads, heads=heads, windowed_layers=windowed
    )


def _within(shape: Dimensions, other: Dimensions) -> bool:
    """Whether it is at most as large in every number."""
    return (
        shape.layers <= other.layers
        and shape.width <= other.width
        and shape.inner <= other.inner
        and shape.kv_heads <= other.kv_heads
    )
