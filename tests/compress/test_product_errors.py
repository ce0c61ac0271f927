"""What is measured of products as they are rounded."""

from __future__ import annotations

import numpy as np
import pytest

from compress.levels import round_by_group, round_to_nearest
from compress.precisions import FLOAT, W4A8, W8A8, W8A8_ROTATED
from compress.product_errors import ErrorMeter, measure
from compress.rotation import rotate
from proto.manifest import Recipe

RANDOM = np.random.default_rng(3)
WEIGHT = RANDOM.normal(size=(48, 64)).astype(np.float32)
INPUTS = RANDOM.normal(size=(40, 64)).astype(np.float32)
RECIPE = Recipe(name="w8a8", default=W8A8)


def test_fewer_bits_are_farther_off() -> None:
    eight = measure(WEIGHT, round_to_nearest(WEIGHT), W8A8, INPUTS)
    four = measure(WEIGHT, round_by_group(WEIGHT, 32), W4A8, INPUTS)
    assert eight.output is not None
    assert four.output is not None
    assert 0.001 < eight.weight < 0.01 < four.weight < 0.15
    assert 0.003 < eight.output < 0.02 < four.output < 0.15


def test_the_output_is_that_of_rounded_activations() -> None:
    """A weight that the grid holds exactly: what is left is the activations' part."""
    weight = np.repeat(RANDOM.integers(-127, 128, (48, 1)), 64, axis=1).astype(np.float32)
    weight[:, 0] = 127
    found = measure(weight, round_to_nearest(weight), W8A8, INPUTS)
    assert found.weight == pytest.approx(0, abs=1e-6)
    assert found.output is not None
    assert found.output > 1e-4
    assert measure(weight, round_to_nearest(weight), FLOAT, INPUTS).output == pytest.approx(0, abs=1e-5)


def test_rotation_is_part_of_the_product_not_of_its_error() -> None:
    """One huge channel spoils plain rows; rotated it is spread, as the weight's columns are."""
    inputs = INPUTS.copy()
    inputs[:, 5] *= 100
    plain = measure(WEIGHT, round_to_nearest(WEIGHT), W8A8, inputs)
    turned = rotate(WEIGHT)
    rotated = measure(turned, round_to_nearest(turned), W8A8_ROTATED, inputs)
    assert plain.output is not None
    assert rotated.output is not None
    assert rotated.output < plain.output < 0.1


def test_a_watched_hook_keeps_its_result_and_nearest_fills_in() -> None:
    own = round_to_nearest(2 * WEIGHT)
    meter = ErrorMeter(RECIPE)
    assert meter.watch(lambda product, weight: own, {"a": INPUTS})("a", WEIGHT) is own
    found = meter.watch(lambda product, weight: None)("b", WEIGHT)
    assert found is not None
    np.testing.assert_array_equal(found.levels, round_to_nearest(WEIGHT).levels)
    assert meter.watch()("c", WEIGHT) is not None
    assert meter.errors.keys() == {"a", "b", "c"}
    assert meter.errors["a"].weight == pytest.approx(1, abs=0.01)
    assert meter.errors["a"].output == pytest.approx(1, abs=0.01)
    assert meter.errors["b"] == meter.errors["c"] == measure(WEIGHT, round_to_nearest(WEIGHT), W8A8, None)


def test_inputs_are_migrated_as_the_weight_is() -> None:
    scale = RANDOM.uniform(0.5, 2, 64).astype(np.float32)
    meter = ErrorMeter(RECIPE)
    meter.watch(None, {"a": INPUTS}, {"a": scale})("a", WEIGHT * scale)
    expected = measure(WEIGHT * scale, round_to_nearest(WEIGHT * scale), W8A8, INPUTS / scale)
    assert meter.errors["a"].output == pytest.approx(expected.output)
