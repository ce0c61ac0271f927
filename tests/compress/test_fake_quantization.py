"""The fake-quantized network against the artifact that is built from the same levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.checkpoint import Checkpoint
from compress.constants import Rounded, meant, nearest
from compress.decoder import build
from compress.fake_quantization import FakeLinear, fake_quantize, levels_of
from compress.families import FAMILIES, Decoder, describe
from compress.precisions import FLOAT, W4, W4A8, W4A8_GROUP64, W4A8_ROTATED, W8, W8A8, W8A8_ROTATED, precision_of
from compress.quantization_aware import product_weight
from compress.rotation import rotate
from compress.treatment import Treat, Treatment
from compress.weights import Weights, share_over_groups
from proto.manifest import Recipe
from tests.compress.native_reference import run_native
from train.model import load_model

ODD = {"hidden_size": 72, "intermediate_size": 100, "vocab_size": 163, "head_dim": 16}
RECIPES = {
    "rotated w8a8": Recipe(name="r8", default=W8A8_ROTATED),
    "w8a8": Recipe(name="p8", default=W8A8),
    "rotated w4a8": Recipe(name="r4", default=W4A8_ROTATED, products={"head": W8A8_ROTATED}),
    "w4a8": Recipe(name="p4", default=W4A8, products={"head": W8A8}),
    "w4a8 of 64": Recipe(name="g4", default=W4A8_GROUP64, products={"head": W8A8, "layers.0.down": W8A8_ROTATED}),
}
WEIGHT_ONLY = {
    "w4": Recipe(name="w4", default=W4, products={"head": FLOAT}),
    "w4 with a head": Recipe(name="w4", default=W4, products={"head": W8}),
    "w8": Recipe(name="w8", default=W8, products={"head": FLOAT}),
}


def migration(decoder: Decoder) -> dict[str, Any]:
    random = np.random.default_rng(1)
    sizes = {role: decoder.shape(role)[1] for role in ("qkv", "o", decoder.up, "down")}
    if not decoder.family.gated:
        del sizes["down"]
    scales = {
        f"layers.{layer}.{role}": np.exp(0.3 * random.normal(size=size)).astype(np.float32)
        for layer in range(decoder.num_layers)
        for role, size in sizes.items()
    }
    return {name: share_over_groups(decoder, s) if name.endswith(".o") else s for name, s in scales.items()}


def fake(path: Path, recipe: Recipe, scales: dict[str, Any], *, int8_cache: bool):
    """The fake network, its parts by product, and the levels that they began with."""
    checkpoint = Checkpoint(path)
    decoder = describe(checkpoint)
    weights = Weights(checkpoint, decoder, scales)
    rounded: dict[str, Rounded] = {}
    for product in decoder.products:
        precision = precision_of(recipe, product)
        if precision != FLOAT:
            weight = product_weight(decoder, weights, product)
            rounded[product] = nearest(rotate(weight) if precision.rotated else weight, precision)
    network = load_model(path, dtype=torch.float32).network
    parts = fake_quantize(network, decoder, recipe, weights, rounded, int8_cache=int8_cache)
    return network, parts, rounded


def treated(scales: dict[str, Any], rounded: dict[str, Rounded], levels: dict[str, int] | None = None) -> Treat:
    return lambda layer: Treatment(scales, lambda product, _: rounded[product], levels or {})


def logits(network: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return network(torch.tensor([tokens])).logits[0].numpy()


def by_row(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The largest difference in each row, relative to the spread of what is expected."""
    return np.abs(found - expected).max(axis=1) / expected.std()


@pytest.mark.parametrize(
    ("name", "family", "overrides"),
    [
        *(("rotated w8a8", family, {}) for family in FAMILIES),
        *(("w4a8", family, {"tie_word_embeddings": True}) for family in FAMILIES),
        *((name, "llama", ODD | {"tie_word_embeddings": True, "attention_bias": True}) for name in RECIPES),
    ],
)
def test_logits_are_those_of_the_native_form(name, family, overrides, tiny, tokens, tmp_path):
    """To 1e-4, until a value halfway between two levels is rounded differently: then that row and those after it are
    some 1e-2 off, in so small a model. Other arithmetic (float keys, say) is seen in all rows."""
    _, path = tiny(family, **overrides)
    recipe = RECIPES[name]
    scales = migration(describe(Checkpoint(path)))
    network, _, rounded = fake(path, recipe, scales, int8_cache=True)
    build(Checkpoint(path), tmp_path, recipe, treat=treated(scales, rounded))
    expected = run_native(tmp_path, tokens, list(range(30)), cache=np.zeros(1))["logits"]
    far = by_row(logits(network, tokens), expected)
    assert np.median(far[:4]) < 1e-4
    assert far.max() < 0.1
    plain, _, _ = fake(path, recipe, scales, int8_cache=False)
    assert np.median(by_row(logits(plain, tokens), expected)) > 1e-3


@pytest.mark.parametrize("name", ["rotated w8a8", "w8a8"])
def test_logits_are_those_of_the_portable_form(name, tiny, make_graph, tokens):
    _, path = tiny("qwen2", tie_word_embeddings=True)
    scales = migration(describe(Checkpoint(path)))
    network, _, rounded = fake(path, RECIPES[name], scales, int8_cache=False)
    graph = make_graph(path, RECIPES[name], treat=treated(scales, rounded))
    far = by_row(logits(network, tokens), graph.logits(tokens))
    assert np.median(far[:4]) < 1e-4
    assert far.max() < 0.1


@pytest.mark.parametrize("name", WEIGHT_ONLY)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_weight_only_products(name, tied, tiny, make_graph, tokens):
    """Which leave activations as they are at accuracy level 0; the head's inputs are always rounded by blocks."""
    _, path = tiny("llama", **ODD, tie_word_embeddings=tied)
    network, parts, rounded = fake(path, WEIGHT_ONLY[name], {}, int8_cache=False)
    graph = make_graph(path, WEIGHT_ONLY[name], treat=treated({}, rounded, dict.fromkeys(rounded, 0)))
    assert by_row(logits(network, tokens), graph.logits(tokens)).max() < (0.1 if name.endswith("head") else 1e-3)
    assert len(parts) == 8


def test_a_mixed_recipe_leaves_float_products_float(tiny, tokens):
    _, path = tiny("gpt2")
    recipe = Recipe(name="one", default=FLOAT, products={"layers.1.down": W8A8})
    network, parts, _ = fake(path, recipe, {}, int8_cache=False)
    assert parts.keys() == {"layers.1.down"}
    assert np.median(by_row(logits(network, tokens), logits(load_model(path, dtype=torch.float32).network, tokens))) > 0


@pytest.mark.parametrize("name", [*RECIPES, *WEIGHT_ONLY])
def test_levels_begin_as_they_were_rounded(name, tiny):
    _, parts, rounded = fake(tiny("llama", **ODD)[1], {**RECIPES, **WEIGHT_ONLY}[name], {}, int8_cache=True)
    assert len(parts) == 8
    for product, modules in parts.items():
        found = levels_of(modules, rounded[product])
        for one, other in zip(found, rounded[product], strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("precision", [W8A8, W4A8, W4])
def test_gradients_pass_through_rounding_and_stop_at_the_ends(precision):
    weight = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    rounded = nearest(weight, precision)
    product = FakeLinear(weight, None, rounded, precision)
    with torch.no_grad():
        product.floating[0, 0, :2] = torch.tensor([product.low - 2, product.high + 2])
    x = torch.randn(5, 40, requires_grad=True)
    product(x).sum().backward()
    levels = rounded.levels.copy()
    levels[0, :2] = product.low, product.high
    exact = torch.from_numpy(meant(rounded._replace(levels=levels), precision))
    torch.testing.assert_close(x.grad, exact.sum(0).expand(5, 40))
    by_level = product.input(x).sum(0).detach().expand(3, 40)
    expected = by_level * product.scale.expand_as(product.floating).flatten(1)[:, :40]
    expected[0, :2] = 0
    torch.testing.assert_close(product.floating.grad.flatten(1)[:, :40], expected)
