"""Which optimizer updates which parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.errors import TrainError
from train.flags import option
from train.muon import Muon

OPTIMIZERS = ("adamw", "muon")
_IN_A_LAYER = re.compile(r"\.\d+\.")  # model.layers.3.mlp.up_proj.weight


@dataclass(frozen=True, slots=True)
class OptimizerOptions:
    optimizer: str = option("adamw", "of the matrices in the layers; the rest is AdamW's always", choices=OPTIMIZERS)
    weight_decay: float = option(0.1, "of the matrices in the layers, times the learning rate", least=0, most=1)
    momentum: float = option(0.95, "Muon's", least=0, most=1)
    beta1: float = option(0.9, "AdamW's, of the mean gradient", least=0, most=1)
    beta2: float = option(0.95, "AdamW's, of the mean squared gradient", least=0, most=1)
    epsilon: float = option(1e-8, "AdamW's", least=0)


class Optimizers:
    """Several optimizers as one. `named` are the trained parameters; each is in one group of one member.

    Under FSDP2, make them after `fully_shard`, which replaces the parameters.
    """

    def __init__(self, members: Iterable[torch.optim.Optimizer], named: Mapping[str, nn.Parameter]) -> None:
        self.members = list(members)
        self._named = dict(named)
        self._owner = {p: member for member in self.members for group in member.param_groups for p in group["params"]}
        for group in self._groups():
            group["initial_lr"] = group["lr"]

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad()

    def set_lr(self, factor: float) -> None:
        """All groups to `factor` of their own peak rate."""
        for group in self._groups():
            group["lr"] = group["initial_lr"] * factor

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, by `PARAMETER.KEY`. Rates and decay are options, not state."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._named.items()
            for key, value in self._owner[parameter].state[parameter].items()
        }

    def empty(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor to load `name` of a state dict into, on the parameter's device and sharded as it is.

        Raises TrainError for a parameter that is not trained.
        """
        parameter = self._parameter(name)
        if isinstance(parameter, DTensor) and parameter.shape == size:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(size, dtype=dtype, device=parameter.device)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the tensors over, not copies of them. Raises TrainError for a parameter that is not trained."""
        for member in self.members:
            member.state.clear()
        for name, value in state.items():
            parameter = self._parameter(name)
            self._owner[parameter].state[parameter][name.rpartition(".")[2]] = value

    def _groups(self) -> Iterable[dict[str, float]]:
        return (group for member in self.members for group in member.param_groups)

    def _parameter(self, name: str) -> nn.Parameter:
        parameter = self._named.get(name.rpartition(".")[0])
        if parameter is None:
            raise TrainError(f"there is optimizer state {name}, but no such parameter is trained; train what it was of")
        return parameter


def make_optimizers(
    named_parameters: Iterable[tuple[str, nn.Parameter]], learning_rate: float, options: OptimizerOptions
) -> Optimizers:
    """The matrices inside the layers to Muon or AdamW, with weight decay; embeddings, head, norms and biases to AdamW.

    `learning_rate` is the peak, for AdamW; Muon's updates are scaled to the size of AdamW's, so it serves both.
    Parameters that need no gradient are left out. Raises TrainError if none is left, or for an unknown optimizer.
    """
    if options.optimizer not in OPTIMIZERS:
        raise TrainError(f"optimizer {options.optimizer!r} is none of {', '.join(OPTIMIZERS)}")
    named = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
    if not named:
        raise TrainError("no parameter is to be trained; all are frozen")
    matrices = [p for name, p in named.items() if p.ndim > 1 and _IN_A_LAYER.search(name)]
    in_layers = set(matrices)
    others = [p for p in named.values() if p not in in_layers]
    by_muon = [p for p in matrices if p.ndim == 2] if options.optimizer == "muon" else []
    taken = set(by_muon)
    groups = [
        {"params": [p for p in matrices if p not in taken], "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    members: list[torch.optim.Optimizer] = []
    if by_muon:
        members.append(Muon(by_muon, learning_rate, options.momentum, options.weight_decay))
    if groups := [group for group in groups if group["params"]]:
        betas = (options.beta1, options.beta2)
        members.append(torch.optim.AdamW(groups, learning_rate, betas, options.epsilon, fused=True))
    return Optimizers(members, named)
