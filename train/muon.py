"""Muon (Jordan et al. 2024): each step moves a matrix along its momentum made orthogonal.

torch has Muon too, but multiplies in bfloat16 always, one matrix at a time, and every process all of them. Here
matrices of one shape are multiplied together, in a type that the processor multiplies in hardware (float32 is five
times as fast as emulated bfloat16), and under FSDP2 each process orthogonalises its share of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from train.errors import TrainError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steep at zero, singular values end between 0.7 and 1.2
ITERATIONS = 5
MIN_NORM = 1e-7
RMS = 0.2  # of an AdamW update, which Muon's is scaled to (Moonlight, 2025), so that one learning rate serves both
MATRICES_AT_ONCE = 16  # a process; bounds the working memory


class Muon(torch.optim.Optimizer):
    """For matrices [rows, columns], whole or sharded on dim 0 (FSDP2). Weight decay is decoupled.

    State and formula are those of torch.optim.Muon(adjust_lr_fn="match_rms_adamw").
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Raises TrainError for matrices that are divided otherwise."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for parameters in alike.values():
                axis = _shard_axis(parameters[0])
                at_once = MATRICES_AT_ONCE * (axis.size() if axis else 1)
                for start in range(0, len(parameters), at_once):
                    self._update(parameters[start : start + at_once], axis, group)

    def _update(self, parameters: list[Tensor], axis: dist.ProcessGroup | None, group: dict[str, Any]) -> None:
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            gradient, momentum = _local(parameter.grad), _local(state["momentum_buffer"])
            momentum.lerp_(gradient, 1 - group["momentum"])
            updates.append(gradient.lerp(momentum, group["momentum"]))  # Nesterov's
        stack = torch.stack(updates).to(product_dtype(updates[0].device))
        rows, columns = parameters[0].shape
        directions = orthogonalize_shards(stack, rows, axis) if axis else orthogonalize(stack)
        shrink = 1 - group["lr"] * group["weight_decay"]
        rate = group["lr"] * RMS * math.sqrt(max(rows, columns))
        for parameter, direction in zip(parameters, directions, strict=True):
            _local(parameter).mul_(shrink).add_(direction, alpha=-rate)


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if native else torch.float32


def orthogonalize(matrices: Tensor) -> Tensor:
    """[matrices, rows, columns] -> the same with all singular values near 1, by Newton and Schulz's iteration."""
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=MIN_NORM)  # the spectral norm is then at most 1
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalize_shards(shards: Tensor, rows: int, axis: dist.ProcessGroup) -> Tensor:
    """[matrices, own rows, columns] -> the same rows of the orthogonal matrices, each [rows, columns].

    Process i makes whole and orthogonalises matrices i, i + processes, ...: one exchange there, one back.
    """
    count, own, columns = shards.shape
    processes, rank = axis.size(), axis.rank()
    most = -(-rows // processes)
    heights = [max(0, min(most, rows - part * most)) for part in range(processes)]  # as torch.chunk, and so FSDP2
    counts = [len(range(part, count, processes)) for part in range(processes)]
    assert own == heights[rank], f"{own} rows in process {rank}, not {heights[rank]}"
    given = [matrices * own * columns for matrices in counts]
    taken = [counts[rank] * height * columns for height in heights]

    outgoing = torch.cat([shards[part::processes].flatten() for part in range(processes)])
    incoming = outgoing.new_empty(sum(taken))
    dist.all_to_all_single(incoming, outgoing, taken, given, group=axis)
    pieces = zip(torch.split(incoming, taken), heights, strict=True)
    whole = orthogonalize(torch.cat([piece.view(counts[rank], height, columns) for piece, height in pieces], dim=1))
    outgoing, incoming = torch.cat([piece.flatten() for piece in torch.split(whole, heights, dim=1)]), outgoing
    dist.all_to_all_single(incoming, outgoing, given, taken, group=axis)
    result = torch.empty_like(shards)
    for part, piece in enumerate(torch.split(incoming, given)):
        result[part::processes] = piece.view(counts[part], own, columns)
    return result


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_axis(parameter: Tensor) -> dist.ProcessGroup | None:
    """The processes between which the rows are divided, if they are. Raises TrainError for other divisions."""
    if not isinstance(parameter, DTensor):
        return None
    divided = [axis for axis, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    if not divided:
        return None
    if len(divided) > 1 or parameter.placements[divided[0]] != Shard(0):
        raise TrainError(f"Muon takes matrices divided by rows once, not {parameter.placements}; use AdamW")
    return parameter.device_mesh.get_group(divided[0])
