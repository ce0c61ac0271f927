"""Costs: bytes against a real data file, seconds for every product of the graph that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from transformers import PreTrainedModel

from compress import speeds
from compress.candidates import STREAMS, native_precisions, offered, weight_bytes
from compress.checkpoint import Checkpoint
from compress.families import describe
from compress.precisions import W4A8, W8A8
from compress.recipes import make_recipe

Tiny = Callable[..., tuple[PreTrainedModel, Path]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("precision", native_precisions())
def test_bytes_are_those_of_the_data_file(family: str, precision, tiny: Tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    checkpoint = Checkpoint(tiny(family)[1])
    decoder = describe(checkpoint)
    recipe = speeds.uniform(decoder, precision, native_precisions())
    speeds.make_model(checkpoint, recipe, tmp_path)
    stored: dict[str, int] = {}
    for tensor in onnx.load(tmp_path / "model.native.onnx", load_external_data=False).graph.initializer:
        product, _, kind = tensor.name.rpartition(".")
        if product in decoder.products and kind != "bias":
            size = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            stored[product] = stored.get(product, 0) + size * int(np.prod(tensor.dims))
    used = {product: recipe.products.get(product, recipe.default) for product in decoder.products}
    assert stored == {product: weight_bytes(decoder, product, used[product]) for product in decoder.products}


def test_every_product_is_timed_at_every_precision_and_load(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speeds, "STEPS", 5)
    checkpoint = Checkpoint(tiny("llama", tie_word_embeddings=True)[1])
    decoder = describe(checkpoint)
    found = speeds.measure(checkpoint, decoder, [W4A8, W8A8], threads=1)
    for objective in STREAMS:
        four, eight = found.products[objective]
        assert four.keys() == {"qkv", "o", "gate_up", "down"}  # not the head, which is the embedding too
        assert eight.keys() == {*four, "head"}
        assert all(0 < seconds < 1 for seconds in (*four.values(), *eight.values()))
        assert found.rest[objective] >= 0
    assert not offered(decoder, "head", W4A8)
    assert found.rest_bytes > 0


def test_recipes_take_turns(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "STEPS", 5)
    checkpoint = Checkpoint(tiny("llama")[1])
    recipes = [make_recipe(name, describe(checkpoint)) for name in ("w8a8", "w4a8")]
    found = speeds.time_recipes(checkpoint, recipes, threads=1)
    assert [times.keys() for times in found] == [STREAMS.keys()] * 2
    assert all(0 < times["latency"] < times["throughput"] < 1 for times in found)
