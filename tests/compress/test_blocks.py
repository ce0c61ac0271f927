"""Weight-only grids, and the portable graph over them, against numpy and transformers."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from compress.accuracy_levels import FLOAT_PRODUCT, INT8_PRODUCT, accuracy_level, choose, round_inputs
from compress.blocks import (
    WeightBlocks,
    dequantize_blocks,
    pack_blocks,
    round_blocks,
    round_blocks_compensating,
)
from compress.checkpoint import Checkpoint
from compress.decoder import build
from compress.families import describe
from compress.precisions import W4, W8, WEIGHT_ONLY
from compress.recipes import make_recipe
from compress.treatment import Treatment
from compress.weights import Weights
from proto.manifest import GRAPH, NATIVE_GRAPH, Precision, Recipe
from tests.compress.conftest import CONFIGS, WEIGHT

random = np.random.default_rng(3)


def by_block(precision: Precision, block: int) -> Precision:
    return msgspec.structs.replace(precision, group=block)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_every_weight_is_within_half_a_step_of_a_whole_range(bits: int, block: int) -> None:
    weight = random.normal(size=(40, 96)).astype(np.float32)
    weight[3] = 0
    weight[4] = 5
    weight[5] *= 1e-6
    found = round_blocks(weight, block, bits)
    assert found.levels.max() <= 2**bits - 1
    steps = np.repeat(found.scale.astype(np.float32), block, axis=1)[:, :96]
    error = np.abs(dequantize_blocks(found, block) - weight)
    np.testing.assert_array_equal(dequantize_blocks(found, block)[3], 0)
    if bits == 8:  # nothing is clipped; the zero is rounded too, and float16 scales below 2^-14 are coarse
        assert np.all(error[:5] <= 1.01 * steps[:5])
    else:
        assert np.square(error).mean() < np.square(steps / 2).mean()


def test_8_bits_are_16_times_as_fine() -> None:
    weight = random.normal(size=(64, 128)).astype(np.float32)
    four, eight = (np.abs(dequantize_blocks(round_blocks(weight, 32, bits), 32) - weight).mean() for bits in (4, 8))
    assert 14 < four / eight < 20


def test_important_inputs_are_rounded_better() -> None:
    weight = random.normal(size=(256, 64)).astype(np.float32)
    importance = np.ones(64, np.float32)
    importance[:8] = 100
    plain, weighted = (dequantize_blocks(round_blocks(weight, 32, 4, i), 32) - weight for i in (None, importance))
    assert np.square(weighted[:, :8]).mean() < np.square(plain[:, :8]).mean()
    assert np.square(weighted).mean() > np.square(plain).mean()


@pytest.mark.parametrize("bits", [4, 8])
def test_compensating_makes_errors_cancel_on_correlated_inputs(bits: int) -> None:
    x = random.normal(size=(512, 16)) @ random.normal(size=(16, 96)) + 0.1 * random.normal(size=(512, 96))
    x = x.astype(np.float32)
    weight = random.normal(size=(64, 96)).astype(np.float32)

    def error(found: WeightBlocks) -> float:
        return float(np.square(x @ (dequantize_blocks(found, 32) - weight).T).mean())

    compensated = round_blocks_compensating(weight, x.T @ x, 32, bits)
    assert error(compensated) < 0.5 * error(round_blocks(weight, 32, bits))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "block"), [(64, 32), (96, 32), (96, 64), (40, 32)])
def test_packing_keeps_every_level_and_zero(bits: int, inputs: int, block: int) -> None:
    blocks = -(-inputs // block)
    levels, zeros = (random.integers(0, 2**bits, (5, size)).astype(np.uint8) for size in (inputs, blocks))
    packed, zero = pack_blocks(WeightBlocks(levels, np.ones((5, blocks), np.float16), zeros), block, bits)
    assert (packed.shape, zero.shape) == ((5, blocks, block * bits // 8), (5, -(-blocks * bits // 8)))
    flat = packed.reshape(5, -1)
    if bits == 4:
        flat, zero = (np.stack([x & 15, x >> 4], axis=-1).reshape(5, -1) for x in (flat, zero))
    np.testing.assert_array_equal(flat[:, :inputs], levels)
    np.testing.assert_array_equal(zero[:, :blocks], zeros)


@pytest.mark.parametrize("precision", WEIGHT_ONLY, ids=str)
def test_the_operator_computes_what_the_levels_mean(precision: Precision, run_product) -> None:
    x = random.normal(size=(3, 5, WEIGHT.shape[1])).astype(np.float32)
    exact = dequantize_blocks(round_blocks(WEIGHT, precision.group, precision.weight_bits), precision.group)
    rounded = round_inputs(x.reshape(-1, WEIGHT.shape[1]), precision.group).reshape(x.shape)
    np.testing.assert_allclose(run_product(x, precision, accuracy_level=FLOAT_PRODUCT), x @ exact.T, atol=1e-4)
    int8 = run_product(x, precision, accuracy_level=INT8_PRODUCT)
    np.testing.assert_allclose(int8, rounded @ exact.T, atol=2e-3 * np.abs(x @ exact.T).max())
    assert np.abs(int8 - x @ exact.T).max() > 1e-4


def test_float_inputs_where_int8_would_cost_quality() -> None:
    weight = random.normal(size=(64, 128)).astype(np.float32)
    even = random.normal(size=(256, 128)).astype(np.float32)
    assert accuracy_level(even, weight, 32) == INT8_PRODUCT
    uneven = even.copy()
    uneven[:, ::32] *= 1e4  # one of each block, which meets weights of 0
    weight[:, ::32] = 0
    assert accuracy_level(uneven, weight, 32) == FLOAT_PRODUCT
    assert accuracy_level(np.zeros_like(even), weight, 32) == INT8_PRODUCT


def test_levels_are_chosen_for_weight_only_products_alone(tiny) -> None:
    checkpoint = Checkpoint(tiny("llama")[1])
    decoder = describe(checkpoint)
    weights = Weights(checkpoint, decoder, {})
    recipe = Recipe(name="mixed", default=W4, products={"layers.0.o": Precision(weight_bits=8, activation_bits=8)})
    inputs = {
        f"layers.0.{role}": np.ones((4, decoder.shape(role)[1]), np.float32) for role in ("qkv", "o", "gate_up", "down")
    }
    assert choose(decoder, weights, 0, inputs, recipe) == dict.fromkeys(inputs.keys() - {"layers.0.o"}, INT8_PRODUCT)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("recipe", ["w4", "w8"])
def test_the_graph_is_the_model_with_rounded_weights(
    recipe: str, family: str, tied: bool, tiny, make_graph, reference, tokens
) -> None:
    """Whole, in chunks, and with all activations as they are."""
    model, path = tiny(family, tie_word_embeddings=tied)
    decoder = describe(Checkpoint(path))
    chosen = make_recipe(recipe, decoder)
    levels = dict.fromkeys(decoder.products, FLOAT_PRODUCT)
    graph = make_graph(path, chosen, treat=lambda layer: Treatment(accuracy_levels=levels))
    whole = graph.logits(tokens)
    parts = [graph.logits(tokens[:20]), graph.logits(tokens[20:], past=20)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-3)
    expected = reference(model, tokens)
    error = np.linalg.norm(whole - expected) / np.linalg.norm(expected)
    assert error < {"w4": 0.35, "w8": 0.03}[recipe]


def test_a_graph_that_runs_anywhere_and_no_other(tiny, tmp_path: Path) -> None:
    """Blocks of 64 inputs and of 128, where the model has 96 and 64: the last one is filled up."""
    _, path = tiny("llama", tie_word_embeddings=True)
    checkpoint = Checkpoint(path)
    products = {"head": by_block(W8, 128), "layers.0.down": by_block(W4, 64)}
    build(
        checkpoint,
        tmp_path,
        Recipe(name="mixed", default=W4, products=products),
        treat=lambda layer: Treatment(accuracy_levels={"layers.0.o": 0, "layers.1.o": 4}),
    )
    assert not (tmp_path / NATIVE_GRAPH).exists()
    nodes = {node.output[0]: node for node in onnx.load(tmp_path / GRAPH, load_external_data=False).graph.node}
    sizes = {
        name: {a.name: a.i for a in nodes[name].attribute}
        for name in ("layers.0.o", "layers.1.o", "layers.0.down", "logits")
    }
    assert sizes["layers.0.o"] == {"N": 64, "K": 64, "bits": 4, "block_size": 32, "accuracy_level": 0}
    assert sizes["layers.1.o"]["accuracy_level"] == 4
    assert (sizes["layers.0.down"]["block_size"], sizes["layers.0.down"]["K"]) == (64, 96)
    assert (sizes["logits"]["bits"], sizes["logits"]["block_size"]) == (8, 128)


def test_a_tied_head_of_4_bits_is_refused(tiny, make_graph) -> None:
    _, path = tiny("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="gives the head 4-bit weights, which are the embedding too"):
        make_graph(path, Recipe(name="w4 head", default=W4))
