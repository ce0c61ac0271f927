"""The decoder graph in int8: products, embeddings, caches and migration, on every family."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from compress.checkpoint import Checkpoint
from compress.constants import write_layer, write_positions
from compress.families import FAMILIES, describe
from compress.levels import round_to_nearest
from compress.precisions import FLOAT
from compress.section import Layer
from compress.stream import FULL
from compress.treatment import Treatment
from compress.weight_memory import WeightMemory
from compress.weights import Weights, share_over_groups
from proto.manifest import Precision, Recipe

W8A8 = Recipe(name="w8a8", default=Precision(weight_bits=8, activation_bits=8))
ROTATED = Recipe(name="rotated", default=Precision(weight_bits=8, activation_bits=8, rotated=True))


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference, relative to the spread of what is expected."""
    return float(np.sqrt(np.square(found - expected).mean()) / expected.std())


def round_weights(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with the matrices that the graph holds in int8 rounded, activations being float."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "wpe" not in name:
            conv1d = ".h." in name  # [in, out]
            matrix = parameter.data.T if conv1d else parameter.data
            levels, scale = round_to_nearest(matrix.numpy().copy())
            rounded = torch.from_numpy(levels * scale[:, None])
            parameter.data = rounded.T if conv1d else rounded
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_graphs_are_near_the_model_with_rounded_weights(family, tied, tiny, make_graph, reference, tokens):
    model, path = tiny(family, tie_word_embeddings=tied)
    expected = reference(round_weights(model), tokens)
    assert 1e-3 < distance(make_graph(path, W8A8).logits(tokens), expected) < 0.1
    assert 1e-3 < distance(make_graph(path, ROTATED).logits(tokens), expected) < 0.1


def test_a_product_can_have_its_own_precision(tiny, make_graph, reference, tokens):
    model, path = tiny("llama", tie_word_embeddings=True)
    expected = reference(model, tokens)
    raised = {product: FLOAT for product in describe(Checkpoint(path)).products if product != "layers.1.down"}
    one = make_graph(path, Recipe(name="one", default=W8A8.default, products=raised)).logits(tokens)
    assert 1e-4 < distance(one, expected) < distance(make_graph(path, W8A8).logits(tokens), expected)


@pytest.mark.parametrize("recipe", [W8A8, ROTATED], ids=["plain", "rotated"])
def test_int8_decode_is_the_same_alone_and_in_company(recipe, tiny, make_graph, tokens):
    _, path = tiny("llama", tie_word_embeddings=True)
    graph = make_graph(path, recipe, slots=3)
    alone = make_graph(path, recipe, slots=1)
    lengths = [4, 15, 9]
    for slot, length in enumerate(lengths):
        graph.logits(tokens[:length], slot=slot)
    alone.logits(tokens[:15])
    (together,) = graph.run(np.array([[tokens[length]] for length in lengths]), [length + 1 for length in lengths])
    np.testing.assert_array_equal(together[1], alone.logits(tokens[15:16], past=15)[0])


def make_scales(decoder) -> dict[str, np.ndarray]:
    """A random scale for every product whose input can be divided by one."""
    random = np.random.default_rng(3)
    sizes = {"qkv": decoder.hidden_size, "o": decoder.num_heads * decoder.head_size, decoder.up: decoder.hidden_size}
    if decoder.family.gated:
        sizes["down"] = decoder.intermediate_size
    scales = {
        f"layers.{layer}.{role}": np.exp(random.normal(size=size)).astype(np.float32)
        for layer in range(decoder.num_layers)
        for role, size in sizes.items()
    }
    return {name: share_over_groups(decoder, s) if name.endswith(".o") else s for name, s in scales.items()}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [*((family, {}) for family in FAMILIES), ("llama", {"attention_bias": True, "mlp_bias": True})],
)
def test_migration_changes_nothing_in_float(family, overrides, tiny, make_graph, reference, tokens):
    model, path = tiny(family, **overrides)
    scales = make_scales(describe(Checkpoint(path)))

    def treat(layer: int | None) -> Treatment:
        return Treatment(
            {product: scale for product, scale in scales.items() if product.startswith(f"layers.{layer}.")}
        )

    migrated = make_graph(path, treat=treat).logits(tokens)
    np.testing.assert_allclose(migrated, make_graph(path).logits(tokens), rtol=0, atol=1e-3)
    np.testing.assert_allclose(migrated, reference(model, tokens), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_migration_divides_the_inputs_of_products(family, tiny):
    checkpoint = Checkpoint(tiny(family)[1])
    decoder = describe(checkpoint)
    scales = make_scales(decoder)
    hidden = np.random.default_rng(4).normal(size=(9, decoder.hidden_size)).astype(np.float32)

    def inputs(scales: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        memory, weights = WeightMemory(), Weights(checkpoint, decoder, scales)
        write_positions(memory, decoder, weights, len(hidden))
        write_layer(memory, decoder, weights, FULL, 1, None)
        return Layer(memory, decoder, FULL, 1, threads=1).run(hidden).inputs

    before, divided = inputs({}), inputs(scales)
    for product, x in before.items():
        np.testing.assert_allclose(divided[product] * scales.get(product, 1), x, rtol=1e-3, atol=1e-3, err_msg=product)


@pytest.mark.parametrize(
    ("family", "product", "size", "message"),
    [
        ("gpt2", "layers.0.down", 256, "cannot be folded; those of fc, o, qkv can"),
        ("llama", "head", 64, "cannot be folded"),
        ("llama", "layers.2.qkv", 64, "cannot be folded"),
        ("llama", "layers.0.qkv", 32, "must be 64 positive numbers"),
        ("llama", "layers.0.o", 64, "use share_over_groups"),
    ],
)
def test_scales_that_cannot_be_folded_are_refused(family, product, size, message, tiny):
    checkpoint = Checkpoint(tiny(family)[1])
    with pytest.raises(ValueError, match=message):
        Weights(checkpoint, describe(checkpoint), {product: np.arange(1, size + 1, dtype=np.float32)})


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_caches_are_near_float_caches(family, by_channel, tiny, make_graph, reference, tokens):
    model, path = tiny(family)
    plain = make_graph(path)
    plain.logits(tokens)
    axes = (0, 2) if by_channel else None  # caches are [slots, kv_heads, capacity, head_size]
    steps = [np.atleast_1d(np.abs(cache).max(axis=axes) / 127) for cache in plain.caches.values()]
    pairs = {**dict(enumerate(zip(steps[::2], steps[1::2], strict=True))), None: None}
    graph = make_graph(path, treat=lambda layer: Treatment(kv_scales=pairs[layer]))
    expected = reference(model, tokens)
    whole = graph.logits(tokens)
    assert next(iter(graph.caches.values())).dtype == np.int8
    parts = [graph.logits(tokens[:20]), graph.logits(tokens[20:29], past=20), graph.logits(tokens[29:], past=29)]
    assert distance(whole, expected) < 0.03
    assert distance(np.concatenate(parts), expected) < 0.03
