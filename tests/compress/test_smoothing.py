"""Scale migration: the search, and what it may choose."""

from __future__ import annotations

import numpy as np
import pytest

from compress.checkpoint import Checkpoint
from compress.families import Decoder, describe
from compress.precisions import W8A8, W8A8_ROTATED
from compress.smoothing import output_error, search_layer, search_scale
from compress.weights import Weights, share_over_groups
from proto.manifest import Recipe

ALL_W8A8 = Recipe(name="plain", default=W8A8)
DOWN_ROTATED = Recipe(name="mixed", default=W8A8, products={"layers.1.down": W8A8_ROTATED})


@pytest.fixture
def llama(tiny) -> tuple[Checkpoint, Decoder]:
    checkpoint = Checkpoint(tiny("llama")[1])
    return checkpoint, describe(checkpoint)


def make_rows(size: int, *, outlier: int | None = None) -> np.ndarray:
    x = np.random.default_rng(5).normal(size=(96, size)).astype(np.float32)
    if outlier is not None:
        x[:, outlier] *= 60
    return x


def make_weight(size: int) -> np.ndarray:
    return np.random.default_rng(6).normal(size=(40, size)).astype(np.float32)


def unmigrated_error(x: np.ndarray, weight: np.ndarray) -> float:
    return output_error(x, weight, np.ones(x.shape[1], np.float32), x @ weight.T)


@pytest.mark.parametrize("outlier", [None, 0, 17])
@pytest.mark.parametrize("role", ["qkv", "o", "gate_up"])
def test_the_search_is_never_worse_than_no_migration(role: str, outlier: int | None, llama) -> None:
    x, weight = make_rows(64, outlier=outlier), make_weight(64)
    scale = search_scale(llama[1], f"layers.0.{role}", x, weight)
    assert (scale > 0).all()
    assert output_error(x, weight, scale, x @ weight.T) <= unmigrated_error(x, weight)


def test_without_a_strength_to_try_nothing_migrates(llama) -> None:
    x, weight = make_rows(64, outlier=3), make_weight(64)
    scale = search_scale(llama[1], "layers.0.qkv", x, weight, alphas=())
    np.testing.assert_array_equal(scale, np.ones(64, np.float32))


def test_an_outlier_channel_is_tamed(llama) -> None:
    x, weight = make_rows(64, outlier=17), make_weight(64)
    scale = search_scale(llama[1], "layers.0.qkv", x, weight)
    assert scale.argmax() == 17
    assert output_error(x, weight, scale, x @ weight.T) < 0.25 * unmigrated_error(x, weight)
    smoothed = np.abs(x / scale).max(axis=0)
    assert smoothed[17] / np.median(smoothed) < 0.2 * np.abs(x).max(axis=0)[17] / np.median(np.abs(x).max(axis=0))


def test_migration_changes_nothing_in_exact_arithmetic(llama) -> None:
    x, weight = make_rows(64, outlier=17), make_weight(64)
    scale = search_scale(llama[1], "layers.0.gate_up", x, weight)
    np.testing.assert_allclose((x / scale) @ (weight * scale).T, x @ weight.T, rtol=1e-3, atol=1e-3)


def test_query_heads_of_one_group_share_the_scales_of_o(llama) -> None:
    decoder = llama[1]
    assert decoder.num_heads > decoder.num_kv_heads
    scale = search_scale(decoder, "layers.1.o", make_rows(64, outlier=17), make_weight(64))
    assert len(np.unique(scale)) > 1
    np.testing.assert_array_equal(scale, share_over_groups(decoder, scale))


@pytest.mark.parametrize(
    ("family", "recipe", "migrated"),
    [
        ("llama", ALL_W8A8, {"qkv", "o", "gate_up", "down"}),
        ("llama", DOWN_ROTATED, {"qkv", "o", "gate_up"}),
        ("gpt2", ALL_W8A8, {"qkv", "o", "fc"}),
        ("llama", Recipe(name="rotated", default=W8A8_ROTATED), set()),
    ],
)
def test_a_layer_gets_the_scales_that_fold_and_are_of_use(
    family: str, recipe: Recipe, migrated: set[str], tiny
) -> None:
    checkpoint = Checkpoint(tiny(family)[1])
    decoder = describe(checkpoint)
    weights = Weights(checkpoint, decoder, {})
    roles = ("qkv", "o", decoder.up, "down")
    inputs = {f"layers.1.{role}": make_rows(weights.product(1, role)[0].shape[1], outlier=1) for role in roles}
    scales = search_layer(decoder, weights, 1, inputs, recipe)
    assert scales.keys() == {f"layers.1.{role}" for role in migrated}
    Weights(checkpoint, decoder, scales)  # refuses what cannot be folded
