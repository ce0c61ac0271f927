"""Bytes while training, against what torch really keeps, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from train.flops import dimensions, layer_matrices, parameters
from train.memory import NF4, Layout, activations, activations_per_token, layouts, logits, lora_parameters

SMALL = {
    "vocab_size": 64,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", SMALL),
    ("llama", SMALL | {"head_dim": 32, "num_key_value_heads": 3}),
    ("mistral", SMALL),
    ("qwen2", SMALL),
    ("qwen3", SMALL | {"head_dim": 64}),
    ("gemma3_text", SMALL | {"head_dim": 64}),
    ("gpt2", {"vocab_size": 64, "n_embd": 192, "n_head": 3, "n_inner": 512, "bos_token_id": 0, "eos_token_id": 0}),
]


def config_of(family: str, settings: dict[str, Any], layers: int) -> Any:
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    return AutoConfig.for_model(family, **settings, **still, **{"n_layer" if still else "num_hidden_layers": layers})


def kept_bytes(config: Any, rows: int, length: int) -> int:
    """What the forward pass saves, but for parameters and their bfloat16 copies."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # the tensors too, or their memory would be used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and tuple(tensor.shape) not in shapes:
            kept[place] = tensor
        return tensor

    tokens = torch.zeros(rows, length, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model.base_model(tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("family", "settings"), CONFIGS)
def test_activations_are_what_torch_keeps(family: str, settings: dict[str, Any]) -> None:
    few, more = (kept_bytes(config_of(family, settings, layers), 2, 37) for layers in (1, 3))
    measured = (more - few) / 2 / (2 * 37)
    assert activations_per_token(dimensions(config_of(family, settings, 1))) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(("family", "settings"), CONFIGS)
def test_adapters_are_on_all_products_of_the_layers(family: str, settings: dict[str, Any]) -> None:
    config = config_of(family, settings, 2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).base_model
    products = [each for each in model.modules() if isinstance(each, torch.nn.Linear | Conv1D)]
    assert lora_parameters(dimensions(config), 5) == sum(5 * sum(each.weight.shape) for each in products)


def by_name(made: list[Layout], *, recomputed: bool) -> dict[str, Layout]:
    return {each.name: each for each in made if each.recomputed is recomputed}


def test_gpt2_small_by_hand() -> None:
    """124,439,808 parameters, of which 12 x 12 x 768^2 in the layers' products; 8 rows of 1024 tokens."""
    shape = dimensions(AutoConfig.for_model("gpt2"))
    matrices = 84_934_656
    assert shape.layers * layer_matrices(shape) == matrices
    made = layouts(shape, tokens=8192, devices=1, lora_rank=8)
    assert [each.name for each in made] == ["adamw", "muon", "LoRA", "QLoRA"] * 2
    kept = by_name(made, recomputed=False)
    adamw, muon, lora, qlora = kept["adamw"], kept["muon"], kept["LoRA"], kept["QLoRA"]
    assert adamw.gradients == 4 * 124_439_808
    assert adamw.weights == 4 * 124_439_808 + 2 * (matrices + 50257 * 768)
    assert (adamw.optimizer, muon.optimizer) == (8 * 124_439_808, 8 * 124_439_808 - 4 * matrices)
    assert adamw.activations == 8192 * 12 * (24 * 768 + 40 * 768)
    assert by_name(made, recomputed=True)["adamw"].activations == 8192 * (64 * 768 + 11 * 4 * 768)
    adapters = 12 * 8 * (4 * 768 + 2 * 768 + 2 * 5 * 768)
    assert (lora.gradients, lora.optimizer) == (4 * adapters, 8 * adapters)
    assert lora.weights == 4 * (124_439_808 + adapters)
    assert qlora.weights == NF4 * matrices + 4 * (124_439_808 - matrices) + 4 * adapters
    assert adamw.total == sum((adamw.weights, adamw.gradients, adamw.optimizer, adamw.activations, adamw.logits))
    assert [kept[name].arithmetic for name in ("adamw", "LoRA")] == [1.0, pytest.approx(4 / 6)]
    again = by_name(made, recomputed=True)
    assert [again[name].arithmetic for name in ("adamw", "LoRA")] == [pytest.approx(8 / 6), pytest.approx(6 / 6)]


def test_sharded_over_eight() -> None:
    shape = dimensions(AutoConfig.for_model("gpt2"))
    counts = parameters(shape)
    kept = by_name(layouts(shape, tokens=64, devices=8, lora_rank=8), recomputed=False)
    shared = kept["FSDP, adamw"]
    assert (shared.devices, kept["adamw"].devices) == (8, 1)
    assert shared.optimizer == counts.total
    assert shared.gradients == counts.total / 2 + 4 * counts.layer
    tables = counts.total - 12 * counts.layer
    assert shared.weights == counts.total / 2 + 4 * (tables + 2 * counts.layer)


def test_logits_in_chunks_do_not_grow_with_the_rows() -> None:
    shape = dimensions(AutoConfig.for_model("gpt2"))
    assert logits(shape, 100, chunked=False) == 8 * 100 * 50257
    assert logits(shape, 100) == 4 * 100 * 50257
    assert logits(shape, 10_000) == logits(shape, 100_000) == 4 * 2**25
    assert activations(shape, 100, recomputed=True) < activations(shape, 100, recomputed=False)
