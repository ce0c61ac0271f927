"""Parameters against the models that transformers makes, FLOPs against published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from train.errors import TrainError
from train.flops import Dimensions, dimensions, flops_per_token, parameters

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 24, "num_key_value_heads": 1}),
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"head_dim": 16, "attention_bias": True}),
    ("gemma3_text", {"head_dim": 16}),
    ("gpt2", {}),
    ("gpt2", {"n_inner": 48, "tie_word_embeddings": False}),
]
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "eos_token_id": 0}


def make_config(family: str, changes: dict[str, Any]) -> Any:
    base = {**GPT2, "bos_token_id": 0} if family == "gpt2" else SMALL
    return AutoConfig.for_model(family, **(base | changes))


@pytest.mark.parametrize(("family", "changes"), CONFIGS)
def test_parameters_are_those_of_the_model(family: str, changes: dict[str, Any]) -> None:
    config = make_config(family, changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = {name: value.numel() for name, value in model.named_parameters()}  # a tied table comes once
    counts = parameters(config)
    assert counts.total == sum(found.values())
    assert counts.layer == sum(size for name, size in found.items() if ".0." in name)
    tables = ("embed_tokens", "wte", "wpe")
    assert counts.embedding == sum(size for name, size in found.items() if name.split(".")[-2] in tables)
    products = [each for each in model.base_model.modules() if isinstance(each, torch.nn.Linear | Conv1D)]
    weights = sum(each.weight.numel() for each in products)
    assert counts.active == weights + config.vocab_size * config.hidden_size


def gpt2_small() -> Any:
    return AutoConfig.for_model("gpt2")


def test_gpt2_small_by_hand() -> None:
    counts = parameters(gpt2_small())
    assert counts.total == 124_439_808  # as everywhere
    assert counts.layer == 12 * 768**2 + 13 * 768
    assert counts.active == 12 * 12 * 768**2 + 50257 * 768
    assert flops_per_token(gpt2_small(), 1024) == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024


def test_chinchilla() -> None:
    """80 layers of 64 heads of 128: 1.4T tokens at a budget of 5.76e23 FLOPs (Hoffmann et al. 2022)."""
    chinchilla = Dimensions(
        family="gpt2", layers=80, width=8192, heads=64, kv_heads=64, head_size=128, inner=4 * 8192, vocabulary=32000,
        tied=True, gated=False,
    )  # fmt: skip
    extra = 80 * 8192**2  # the products of relative positions, which our families lack
    assert parameters(chinchilla).total + extra == pytest.approx(70e9, rel=0.01)
    per_token = flops_per_token(chinchilla, 2048) + 6 * extra
    assert per_token * 1.4e12 == pytest.approx(5.88e23, rel=0.05)  # 6ND, and 4 % for attention
    assert (per_token - 12 * 80 * 8192 * 2048) * 1.4e12 == pytest.approx(5.88e23, rel=0.01)


@pytest.mark.parametrize(
    ("family", "changes", "attended"),
    [
        ("llama", {}, 3 * 100),
        ("mistral", {"sliding_window": 8}, 3 * 8),
        ("mistral", {"sliding_window": None}, 3 * 100),
        ("mistral", {"sliding_window": 4096}, 3 * 100),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, 100 + 2 * 8),
        ("qwen3", {"head_dim": 8, "sliding_window": 8}, 3 * 100),  # not in use
    ],
)
def test_a_sliding_window_limits_attention(family: str, changes: dict[str, Any], attended: int) -> None:
    config = make_config(family, changes)
    extra = flops_per_token(config, 100) - 6 * parameters(config).active
    assert extra == 12 * 4 * 8 * attended


def test_the_same_from_dimensions() -> None:
    config = make_config("qwen3", {})
    assert parameters(dimensions(config)) == parameters(config)
    assert flops_per_token(dimensions(config), 64) == flops_per_token(config, 64)


def test_another_family_is_refused() -> None:
    with pytest.raises(TrainError, match="model_type 'bert' is not known; known are llama"):
        parameters(AutoConfig.for_model("bert"))
