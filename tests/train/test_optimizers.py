from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.train.small import LEARNING_RATE, make, optimize, take_step
from train.errors import TrainError
from train.muon import Muon
from train.optimizers import OptimizerOptions, make_optimizers


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    chosen = set(parameters)
    return {name.removeprefix("layers.0.") for name, parameter in model.named_parameters() if parameter in chosen}


def test_who_updates_what() -> None:
    model, optimizers = make()
    model.layers = model.layers[:1]
    muon, adamw = optimizers.members
    assert isinstance(muon, Muon)
    assert names_of(model, muon.param_groups[0]["params"]) == {"up.weight", "down.weight", "key.weight", "gate.weight"}
    (rest,) = adamw.param_groups
    assert names_of(model, rest["params"]) == {
        "embedding.weight", "head.weight", "norm.weight", "norm.bias", "up.bias"
    }  # fmt: skip
    assert rest["weight_decay"] == 0
    assert rest["fused"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_trained_parameter_has_one_owner(optimizer: str) -> None:
    model, _ = make()
    model.head.requires_grad_(False)
    optimizers = optimize(model, optimizer)
    owned = [p for member in optimizers.members for group in member.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned))
    assert set(owned) == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_decay_shrinks_matrices_of_layers_only(optimizer: str) -> None:
    model, optimizers = make(optimizer=optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    for name, parameter in model.named_parameters():
        decays = name.startswith("layers.") and parameter.ndim == 2
        factor = 1 - LEARNING_RATE * OptimizerOptions().weight_decay if decays else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_a_factor_of_each_peak_rate() -> None:
    _, optimizers = make()
    optimizers.members[0].param_groups[0]["initial_lr"] = 3.0
    for factor in (0.5, 0.25):  # of the peak, not of the rate before
        optimizers.set_lr(factor)
        assert [group["lr"] for member in optimizers.members for group in member.param_groups] == [
            3.0 * factor, LEARNING_RATE * factor
        ]  # fmt: skip


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_state_loads_exactly(optimizer: str) -> None:
    model, optimizers = make(optimizer=optimizer)
    for step in range(3):
        take_step(model, optimizers, step)
    copy, _ = make(seed=1)
    copy.load_state_dict(model.state_dict())
    resumed = optimize(copy, optimizer)
    state = {}
    for name, value in optimizers.state_dict().items():
        state[name] = resumed.empty(name, value.size(), value.dtype)
        assert state[name].device == value.device
        state[name].copy_(value)
    resumed.load_state_dict(state)
    for step in range(3, 5):
        take_step(model, optimizers, step)
        take_step(copy, resumed, step)
    for mine, other in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_loading_forgets_what_was() -> None:
    model, optimizers = make()
    take_step(model, optimizers, 0)
    assert optimizers.state_dict()
    optimizers.load_state_dict({})
    assert not optimizers.state_dict()


def test_what_cannot_be() -> None:
    model, optimizers = make()
    with pytest.raises(TrainError, match=r"head\.bias\.exp_avg"):
        optimizers.load_state_dict({"head.bias.exp_avg": torch.zeros(1)})
    with pytest.raises(TrainError, match=r"'sgd' is none of adamw, muon"):
        make_optimizers(model.named_parameters(), 0.1, OptimizerOptions(optimizer="sgd"))
    model.requires_grad_(False)
    with pytest.raises(TrainError, match="frozen"):
        optimize(model)
