"""Bytes on each device while training, by layout: what `python -m train run` keeps, in bfloat16 products.

Parameters, gradients and the optimizer's states are float32. Activations are counted as by Korthikanti et al. (2022,
section 4), for the blocks of transformers: their 34 bytes a token, unit of width and layer are of a model that is all
16 bit and has dropout; here the residual stream and the norms are float32. Fragmentation is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.flops import Dimensions, layer_matrices, parameters
from train.head_loss import CHUNK_LOGITS

FLOAT32, BFLOAT16 = 4, 2
NF4 = 0.5 + 4 / 64  # 4 bits, and a float32 scale for each 64
OPTIMIZER_STATES = {"adamw": 8, "muon": 4}  # bytes a parameter; Muon has the layers' matrices, AdamW the rest
RECOMPUTING = 4 / 3  # of the arithmetic: the forward pass again
FROZEN = 2 / 3  # no gradients of weights


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to train, in bytes on each device. `arithmetic` is relative to 6N and `devices` what it runs on."""

    name: str
    devices: int
    recomputed: bool
    arithmetic: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def layouts(shape: Dimensions, *, tokens: int, devices: int, lora_rank: int) -> list[Layout]:
    """Each with its activations kept and recomputed. `tokens` are those of a micro-batch on one device."""
    made = []
    head = logits(shape, tokens)
    for recomputed in (False, True):
        kept = activations(shape, tokens, recomputed=recomputed)
        again = RECOMPUTING if recomputed else 1.0
        for optimizer in OPTIMIZER_STATES:
            whole = _whole(shape, optimizer)
            made.append(Layout(optimizer, 1, recomputed, again, *whole, kept, head))
        for optimizer in OPTIMIZER_STATES if devices > 1 else ():
            shared = _sharded(shape, optimizer, devices)
            made.append(Layout(f"FSDP, {optimizer}", devices, recomputed, again, *shared, kept, head))
        for name, precision in (("LoRA", FLOAT32), ("QLoRA", NF4)):
            adapters = lora_parameters(shape, lora_rank)
            frozen = _frozen(shape, precision)
            states = OPTIMIZER_STATES["adamw"] * adapters
            arithmetic = FROZEN + again - 1
            weights = frozen + FLOAT32 * adapters
            made.append(Layout(name, 1, recomputed, arithmetic, weights, FLOAT32 * adapters, states, kept, head))
    return made


def activations(shape: Dimensions, tokens: int, *, recomputed: bool) -> float:
    """Of all layers, or of one and the inputs of the others."""
    layer = activations_per_token(shape)
    if not recomputed:
        return float(tokens * shape.layers * layer)
    return float(tokens * (layer + (shape.layers - 1) * FLOAT32 * shape.width))


def activations_per_token(shape: Dimensions) -> int:
    """Bytes that one layer keeps for its backward pass, with fused attention, for each token.

    RMSNorm keeps its input, the normalized values, both float32, and what the products take; SiLU and the gate four
    inner widths in bfloat16. GELU's approximation in transformers is not fused and keeps five.
    """
    if shape.layer_norm:
        return 16 * shape.width + 4 * shape.queries + 4 * shape.keys + 10 * shape.inner
    # Gemma's norms multiply before they round: theirs is one more float32 tensor, and their output of 16 bits one less.
    width, of_heads = (42, 8) if shape.post_norms else (26, 6)
    head_norms = of_heads * (shape.queries + shape.keys) if shape.head_norms else 0
    return width * shape.width + 4 * shape.queries + 4 * shape.keys + 8 * shape.inner + head_norms


def logits(shape: Dimensions, tokens: int, *, chunked: bool = True) -> float:
    """In float32, with their gradients; chunked, they share their memory (see train/head_loss.py)."""
    whole = tokens * shape.vocabulary
    return float(min(whole, max(CHUNK_LOGITS, shape.vocabulary)) * FLOAT32 if chunked else 2 * whole * FLOAT32)


def lora_parameters(shape: Dimensions, rank: int) -> int:
    """Adapters on all products of all layers."""
    attention = shape.width + shape.queries + 2 * shape.keys + (shape.queries + shape.width)
    if shape.family != "gpt2":  # where q, k and v are three products
        attention += 2 * shape.width
    mlp = (3 if shape.gated else 2) * (shape.width + shape.inner)
    return shape.layers * rank * (attention + mlp)


def _whole(shape: Dimensions, optimizer: str) -> tuple[float, float, float]:
    """Weights with their bfloat16 copies, which autocast keeps for a micro-batch; gradients; states."""
    counts = parameters(shape)
    return (
        FLOAT32 * counts.total + BFLOAT16 * counts.active,
        FLOAT32 * counts.total,
        _states(shape, optimizer),
    )


def _sharded(shape: Dimensions, optimizer: str, devices: int) -> tuple[float, float, float]:
    """A share of all, and whole: the tables and two layers, one at work and one on its way, with one's gradients."""
    counts = parameters(shape)
    tables = counts.total - shape.layers * counts.layer
    return (
        FLOAT32 * (counts.total / devices + tables + 2 * counts.layer),
        FLOAT32 * (counts.total / devices + counts.layer),
        _states(shape, optimizer) / devices,
    )


def _states(shape: Dimensions, optimizer: str) -> float:
    matrices = shape.layers * layer_matrices(shape)
    others = parameters(shape).total - matrices
    return float(OPTIMIZER_STATES[optimizer] * matrices + OPTIMIZER_STATES["adamw"] * others)


def _frozen(shape: Dimensions, precision: float) -> float:
    """The layers' matrices in `precision`, the rest in float32."""
    matrices = shape.layers * layer_matrices(shape)
    return precision * matrices + FLOAT32 * (parameters(shape).total - matrices)
