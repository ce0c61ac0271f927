"""Calibration, against the activations that transformers' modules see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compress.calibration import KV_MARGIN, Calibration
from compress.checkpoint import Checkpoint
from compress.families import describe

CLOSE = {"rtol": 1e-3, "atol": 1e-3}
MODULES = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.up_proj", "down": "mlp.down_proj"}


@pytest.fixture
def seen(tiny: Any, tokens: list[int]) -> tuple[Checkpoint, list[list[int]], dict[str, np.ndarray], list[Any]]:
    """(checkpoint, windows, product -> its inputs over all windows, by window the caches)."""
    model, path = tiny("llama")
    windows = [tokens, tokens[7:25]]
    inputs: dict[str, list[np.ndarray]] = {}
    modules = {f"layers.{i}.{role}": f"model.layers.{i}.{module}" for i in range(2) for role, module in MODULES.items()}
    handles = [
        model.get_submodule(module).register_forward_pre_hook(
            lambda _, x, product=product: inputs.setdefault(product, []).append(x[0][0].numpy())
        )
        for product, module in (modules | {"head": "lm_head"}).items()
    ]
    with torch.no_grad():
        caches = [model(torch.tensor([window]), use_cache=True).past_key_values for window in windows]
    for handle in handles:
        handle.remove()
    return Checkpoint(path), windows, {product: np.concatenate(x) for product, x in inputs.items()}, caches


def test_moments_and_peaks_are_those_of_the_whole_text(seen):
    checkpoint, windows, inputs, caches = seen
    calibration = Calibration(checkpoint, describe(checkpoint), windows, threads=1)
    for layer in range(2):
        found = calibration.next_layer()
        assert found.moments.keys() == {f"layers.{layer}.{role}" for role in MODULES}
        for product, moment in found.moments.items():
            np.testing.assert_allclose(moment, inputs[product].T @ inputs[product], **CLOSE, err_msg=product)
        for steps, kind in zip(found.kv_scales, ("keys", "values"), strict=True):
            whole = np.concatenate([getattr(cache.layers[layer], kind)[0].numpy() for cache in caches], axis=1)
            np.testing.assert_allclose(steps, KV_MARGIN * np.abs(whole).max(axis=1) / 127, **CLOSE)


def test_some_rows_of_every_window_are_kept(seen, monkeypatch):
    monkeypatch.setattr("compress.calibration.ROWS", 10)
    checkpoint, windows, inputs, _ = seen
    calibration = Calibration(checkpoint, describe(checkpoint), windows, threads=1)
    calibration.next_layer()  # in which the inputs of a token are the same wherever it stands
    for product, rows in calibration.next_layer().inputs.items():
        assert rows.shape == (10, inputs[product].shape[1])
        distances = np.abs(rows[:, None] - inputs[product]).max(axis=-1)  # [kept, all]
        assert distances.min(axis=1).max() < 1e-3
        found = distances.argmin(axis=1)
        assert len(set(found)) == 10, "no row twice"
        assert sum(found < len(windows[0])) == 5


def test_fewer_rows_than_wanted_are_all(seen):
    checkpoint, windows, inputs, _ = seen
    found = Calibration(checkpoint, describe(checkpoint), windows, threads=1).next_layer()
    assert {len(rows) for rows in found.inputs.values()} == {len(inputs["layers.0.qkv"])}


def test_the_heads_moment_is_behind_the_final_norm(seen):
    checkpoint, windows, inputs, _ = seen
    calibration = Calibration(checkpoint, describe(checkpoint), windows, threads=1)
    for _ in range(2):
        calibration.next_layer()
    expected = inputs["head"].T @ inputs["head"]
    np.testing.assert_allclose(calibration.head_moment(), expected, **CLOSE)
