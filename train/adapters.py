"""Low-rank adapters (LoRA, Hu et al. 2022) on every product of every block, by peft.

On all of them, at about ten times the learning rate of full finetuning, they match it where data is small (Schulman et
al. 2025, "LoRA Without Regret"). On a base in 4 bits that is QLoRA (Dettmers et al. 2023): load the model with
`quantization="nf4"`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from train.errors import TrainError
from train.flags import option
from train.model import Model

NAME = "default"  # peft's, of the only adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    rank: int = option(16, "of the adapters", least=1)
    alpha: int = option(32, "adapters are scaled by it over the rank, which so leaves the learning rate alone", least=1)
    dropout: float = option(0.0, "share of the adapters' inputs that is left out", least=0, most=0.99)


def attach(model: Model, options: LoraOptions) -> None:
    """Freeze the model and put float32 adapters on its blocks; a classifier's head still trains. They begin as zero."""
    from peft import LoraConfig, LoraModel  # three seconds, which runs without adapters need not wait

    network = model.network
    blocks = {id(module) for module in model.layers.modules()}
    targets = [
        name
        for name, module in network.named_modules()
        if id(module) in blocks and isinstance(module, nn.Linear | Conv1D)
    ]
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        fan_in_fan_out=isinstance(network.get_submodule(targets[0]), Conv1D),
    )
    LoraModel(network, config, NAME)
    if model.is_classifier:
        model.head.requires_grad_(True)


@contextmanager
def disabled(model: Model) -> Iterator[None]:
    """Within, the model is as it was before `attach`, and without dropout. Raises TrainError if it has no adapters."""
    layers = list(_adapted(model.network).values())
    if not layers:
        raise TrainError("the model has no adapters to leave out; give a reference model")
    training = model.training
    model.eval()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        model.train(training)


def merge(model: Model) -> PreTrainedModel:
    """A plain transformers model with the adapters, if any, added to its weights, which shares the other parameters.

    What is divided over processes is gathered in each, so all must call it. The model itself
    stays as it is. A quantized base is taken as what its codes mean, in the parameters' type.
    """
    network = model.network
    config = copy.deepcopy(network.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        merged: Any = type(network)(config)
    adapted = _adapted(network)
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        holder, _, leaf = name.rpartition(".")
        holder, of_base, _ = holder.partition(".base_layer")
        if of_base and leaf == "weight":
            value = nn.Parameter(_merged_weight(adapted[holder], model.head.weight.dtype), requires_grad=False)
        elif isinstance(value, DTensor):
            value = nn.Parameter(value.full_tensor().detach(), requires_grad=False)
        if of_base or (holder not in adapted and ".lora_" not in name):
            setattr(merged.get_submodule(holder), leaf, value)
    merged.tie_weights()
    plain: PreTrainedModel = merged
    return plain


def _adapted(network: PreTrainedModel) -> dict[str, Any]:
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}


def _merged_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    base = layer.get_base_layer()
    weight = base.weight
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        from peft.utils.integrations import dequantize_bnb_weight

        weight = dequantize_bnb_weight(weight, state=getattr(base, "state", None))
    update = layer.scaling[NAME] * (_whole(layer.lora_B[NAME].weight) @ _whole(layer.lora_A[NAME].weight))
    if isinstance(base, Conv1D):
        update = update.T
    total: Tensor = _whole(weight).float() + update.float()
    return total.detach().to(dtype)


def _whole(weight: Tensor) -> Tensor:
    """Of all processes: under FSDP each must call it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
