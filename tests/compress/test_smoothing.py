"""Scale migration in closed form: what it is for, and what may be folded."""

from __future__ import annotations

import numpy as np
import pytest

from compress.checkpoint import Checkpoint
from compress.families import describe
from compress.levels import LEVELS, dequantize, round_to_nearest
from compress.precisions import FLOAT, W4A8_ROTATED, W8A8_ROTATED
from compress.rotation import rotate
from compress.smoothing import STRENGTH, balance, balance_layer
from compress.weights import Weights
from proto.manifest import Recipe

SIZE = 128
DOWN_FLOAT = Recipe(name="mixed", default=W8A8_ROTATED, products={"layers.1.down": FLOAT})


def make_rows(size: int, seed: int = 5) -> np.ndarray:
    """Inputs [R, K] whose channels are of very different sizes, the first one by far the largest."""
    random = np.random.default_rng(seed)
    sizes = np.exp(random.normal(size=size))
    sizes[0] = 40
    return (random.normal(size=(96, size)) * sizes).astype(np.float32)


def make_weight(size: int) -> np.ndarray:
    random = np.random.default_rng(6)
    return (random.normal(size=(40, size)) * np.exp(0.5 * random.normal(size=size))).astype(np.float32)


def output_error(x: np.ndarray, weight: np.ndarray, scale: np.ndarray) -> float:
    """Squared error of the product of int8 x and weight, rotated, after migration by `scale`."""
    rows = rotate(x / scale)
    step = np.abs(rows).max(axis=1, keepdims=True) / LEVELS
    rounded = dequantize(round_to_nearest(rotate(weight * scale)), 0)
    return float(np.square(np.rint(rows / step) * step @ rounded.T - x @ weight.T).sum())


def scale_of(strength: float) -> np.ndarray:
    return balance(np.square(make_rows(SIZE)).sum(axis=0), np.square(make_weight(SIZE)).mean(axis=0), strength)


def test_rows_that_were_not_seen_are_much_nearer() -> None:
    x, weight = make_rows(SIZE, seed=7), make_weight(SIZE)
    x *= np.abs(make_rows(SIZE)).mean(axis=0) / np.abs(x).mean(axis=0)  # the same channels are large
    assert output_error(x, weight, scale_of(0.5)) < 0.35 * output_error(x, weight, np.ones(SIZE, np.float32))


@pytest.mark.parametrize("other", [0.0, 0.25, 0.75, 1.0])
def test_no_other_strength_is_better_for_8_bits(other: float) -> None:
    x, weight = make_rows(SIZE), make_weight(SIZE)
    assert output_error(x, weight, scale_of(STRENGTH[8])) < output_error(x, weight, scale_of(other))


def test_units_do_not_matter_and_the_scale_has_none() -> None:
    power, columns = np.square(make_rows(SIZE)).sum(axis=0), np.square(make_weight(SIZE)).mean(axis=0)
    scale = balance(power, columns, 0.5)
    np.testing.assert_allclose(balance(1e6 * power, 1e-6 * columns, 0.5), scale, rtol=1e-4)
    np.testing.assert_allclose(np.log(scale).mean(), 0, atol=1e-5)


def test_channels_that_are_dead_get_a_finite_scale() -> None:
    power, columns = np.square(make_rows(SIZE)).sum(axis=0), np.square(make_weight(SIZE)).mean(axis=0)
    power[3] = columns[5] = 0
    for dead in (balance(power, columns, 0.5), balance(0 * power, 0 * columns, 0.5)):
        assert np.isfinite(dead).all()
        assert (dead > 0).all()


@pytest.mark.parametrize(
    ("family", "recipe", "migrated"),
    [
        ("llama", Recipe(name="eight", default=W8A8_ROTATED), {"qkv", "o", "gate_up", "down"}),
        ("llama", Recipe(name="four", default=W4A8_ROTATED), {"qkv", "o", "gate_up", "down"}),
        ("llama", DOWN_FLOAT, {"qkv", "o", "gate_up"}),
        ("gpt2", Recipe(name="eight", default=W8A8_ROTATED), {"qkv", "o", "fc"}),
    ],
)
def test_a_layer_gets_the_scales_that_fold_and_are_of_use(
    family: str, recipe: Recipe, migrated: set[str], tiny
) -> None:
    checkpoint = Checkpoint(tiny(family)[1])
    decoder = describe(checkpoint)
    weights = Weights(checkpoint, decoder, {})
    rows = {f"layers.1.{role}": make_rows(decoder.shape(role)[1]) for role in ("qkv", "o", decoder.up, "down")}
    moments = {product: x.T @ x for product, x in rows.items()}
    scales = balance_layer(decoder, weights, 1, moments, recipe)
    assert scales.keys() == {f"layers.1.{role}" for role in migrated}
    assert all(len(np.unique(scale)) > 1 for scale in scales.values())
    Weights(checkpoint, decoder, scales)  # refuses what cannot be folded
