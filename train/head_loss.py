"""Losses on the logits of a language-model head, without the logits of all positions at once.

The head of a small model is wide: 2,048 positions by 49,152 tokens are 400 MB in float32, and autograd keeps them more
than once. Here the positions are taken in chunks. Where the loss is a sum, its gradients are made with it, in the same
pass (as in Liger Kernel, Hsu et al. 2024), so that nothing is computed twice; where the gradient waits for what is made
of each position's loss (DPO, KTO), the logits are computed again in the backward pass.

torch's own `linear_cross_entropy` does the same for cross-entropy alone. On CPU it multiplies bfloat16 as float32 and
adds up the loss in bfloat16 (23,040 for 23,058.6 over 2,048 positions), and it was slower in float32 too: on 2 cores at
[2048, 576] by [49152, 576], forward and backward took 2.8 s with its best chunk (11.3 s with its default of 16
positions) against 2.1 to 2.4 s here and 3.1 s for plain logits, with 0.2 GB of memory against 1.1 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 2**25  # logits of one chunk: 134 MB in float32; larger chunks gain little, smaller ones lose much

# (logits [n, vocab] in float32, which positions they are) -> their losses [n], and d loss / d logits [n, vocab], for
# which the logits' memory may be used.
Score = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The type that the head's products are made in: autocast's, if it is on."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def log_softmax_(logits: Tensor) -> Tensor:
    """Log-probabilities, in the logits' own memory on CPU, where fresh pages cost as much as the arithmetic."""
    return torch.log_softmax(logits, -1, out=logits) if logits.is_cpu else torch.log_softmax(logits, -1)


def cross_entropy(targets: Tensor) -> Score:
    """Score of `targets` [positions] int64."""

    def score(logits: Tensor, where: slice) -> tuple[Tensor, Tensor]:
        wanted = targets[where, None]
        gradient = log_softmax_(logits)
        losses = -gradient.gather(1, wanted)[:, 0]
        gradient.exp_().scatter_add_(1, wanted, gradient.new_full(wanted.shape, -1.0))
        return losses, gradient

    return score


def total_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, score: Score) -> Tensor:
    """The sum of `score` over the positions, float32.

    hidden [positions, width], weight [vocab, width], bias [vocab]. Without positions it is 0, with gradients of zero.
    """
    total: Tensor = _Total.apply(hidden, weight, bias, score, product_dtype(hidden))  # type: ignore[no-untyped-call]
    return total


def log_probabilities(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log p(target) at each position, [positions] float32; shapes as in `total_loss`."""
    score = cross_entropy(targets)
    losses: Tensor = _EachPosition.apply(hidden, weight, bias, score, product_dtype(hidden))  # type: ignore[no-untyped-call]
    return -losses


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _products(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    score: Score,
    dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
    scale: Tensor | None = None,
) -> tuple[Tensor, Gradients]:
    """The losses [positions], and those gradients of their sum (or of losses @ scale) that are wanted."""
    wide = torch.promote_types(dtype, torch.float32)
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
    grad_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if wanted[2] else None
    losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    rows, columns = hidden.to(dtype), weight.to(dtype)
    step = max(1, CHUNK_LOGITS // len(weight))
    # Autocast would cast what is float32 on purpose.
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), step):
            where = slice(start, start + step)
            logits = (rows[where] @ columns.T).to(wide)
            if bias is not None:
                logits += bias
            losses[where], gradient = score(logits, where)
            if scale is not None:
                gradient *= scale[where, None]
            narrow = gradient.to(dtype)
            if grad_hidden is not None:
                grad_hidden[where] = narrow @ columns
            if grad_weight is not None and dtype == wide:
                grad_weight.addmm_(narrow.T, rows[where])
            elif grad_weight is not None:
                grad_weight += narrow.T @ rows[where]
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
    return losses, (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, score: Score, dtype: torch.dtype
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        losses, gradients = _products(hidden, weight, bias, score, dtype, wanted)
        ctx.save_for_backward(*gradients)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        return *(None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors), None, None


class _EachPosition(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, score: Score, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.score, ctx.dtype = score, dtype
        return _products(hidden, weight, bias, score, dtype, (False, False, False))[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        _, gradients = _products(hidden, weight, bias, ctx.score, ctx.dtype, wanted, grad_outputs[0])
        return *gradients, None, None
