"""Quantization-aware distillation: the artifact comes nearer to the model, and is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from compress.checkpoint import Checkpoint
from compress.constants import Rounded
from compress.decoder import build
from compress.families import describe
from compress.precisions import W4A8_ROTATED, W8A8_ROTATED
from compress.quantization_aware import distill_levels
from compress.treatment import Treat, Treatment, leave
from proto.manifest import Recipe, load
from tests.compress.conftest import VOCAB, Run
from tests.compress.native_reference import run_native

RECIPE = Recipe(name="r4", default=W4A8_ROTATED, products={"head": W8A8_ROTATED})


def windows(number: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, VOCAB, (number, 32)).tolist()


def kl(model: Any, directory: Path, text: list[list[int]]) -> float:
    """Of the artifact's native form, a token."""
    total = 0.0
    for window in text:
        found = torch.from_numpy(run_native(directory, window, list(range(32)), cache=np.zeros(1))["logits"])
        with torch.no_grad():
            expected = model(torch.tensor([window])).logits[0]
        total += float(kl_div(log_softmax(found, -1), log_softmax(expected, -1), log_target=True, reduction="sum"))
    return total / (32 * len(text))


def artifact(path: Path, directory: Path, treat: Treat) -> Path:
    directory.mkdir()
    build(Checkpoint(path), directory, RECIPE, treat=treat)
    return directory


def distilled(path: Path, windows: list[list[int]], steps: int) -> dict[str, Rounded]:
    checkpoint = Checkpoint(path)
    return distill_levels(checkpoint, describe(checkpoint), RECIPE, leave, windows, steps=steps, threads=1)


def test_the_artifact_comes_nearer_to_the_model_on_other_text(tiny, tmp_path):
    model, path = tiny("llama", tie_word_embeddings=True)
    trained = distilled(path, windows(192, 1), 48)
    text = windows(4, 2)
    before = kl(model, artifact(path, tmp_path / "before", leave), text)
    hook = lambda product, _: trained[product]  # noqa: E731
    after = kl(model, artifact(path, tmp_path / "after", lambda _: Treatment(hook=hook)), text)
    assert after < 0.9 * before


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_levels_move_on_grids_that_stay(family, tiny):
    _, path = tiny(family)
    before, after = (distilled(path, windows(4, 1), steps) for steps in (0, 3))
    assert after.keys() == before.keys() == set(describe(Checkpoint(path)).products)
    for product, was in before.items():
        now = after[product]
        for name, value in now._asdict().items():
            same = np.array_equal(value, getattr(was, name))
            assert same == (name != "levels" or product == "head"), (product, name)
        assert now.levels.dtype == was.levels.dtype
        assert np.abs(now.levels.astype(int) - was.levels).max() <= 1


def test_the_command_writes_what_was_trained(quantize: Run, tmp_path: Path) -> None:
    flags = ["--recipe", "w4a8", "--force"]
    assert quantize(tmp_path / "plain", *flags) == 0
    assert quantize(tmp_path / "trained", *flags, "--distill-steps", "12") == 0
    plain, trained = (load(tmp_path / name) for name in ("plain", "trained"))
    assert trained.gate.metrics["kl"] < plain.gate.metrics["kl"]
    assert trained.files["model.native.onnx"] == plain.files["model.native.onnx"]
    before, after = (found.files["model.onnx.data"] for found in (plain, trained))
    assert after.size_bytes == before.size_bytes
    assert after.sha256 != before.sha256


def test_without_integer_weights_there_is_nothing_to_train(
    quantize: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tmp_path / "out", "--recipe", "fp32", "--distill-steps", "1") == 2
    assert "--distill-steps trains integer weights, and recipe fp32 has none; leave it out" in capsys.readouterr().err
