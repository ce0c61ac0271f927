"""Sensitivities against what they estimate: the KL of the model with one product alone perturbed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from compress import perturbation, sensitivity
from compress.calibration import Calibration
from compress.checkpoint import Checkpoint
from compress.families import Decoder, describe
from compress.perturbation import Perturbation, perturb_head, perturb_layer
from compress.precisions import W4A8, W4A8_ROTATED, W8A8, W8A8_ROTATED
from compress.sensitivity import measure
from proto.manifest import Precision
from tests.compress.conftest import VOCAB

WINDOWS = 32
Tiny = Callable[..., tuple[PreTrainedModel, Path]]


def windows(number: int, length: int = 24) -> list[list[int]]:
    return np.random.default_rng(1).integers(0, VOCAB, (number, length)).tolist()


def perturbations(source: Path, precisions: list[Precision]) -> dict[str, list[Perturbation]]:
    checkpoint = Checkpoint(source)
    decoder = describe(checkpoint)
    walk = Calibration(checkpoint, decoder, windows(8, 32), threads=1)
    found: dict[str, list[Perturbation]] = {}
    for layer in range(decoder.num_layers):
        found |= perturb_layer(checkpoint, decoder, layer, walk.next_layer(), precisions)
    return found | {"head": perturb_head(checkpoint, decoder, walk.head_moment(), precisions)}


def exact_kl(model: PreTrainedModel, decoder: Decoder, product: str, error: Perturbation) -> float:
    """Run the model with the product's input and weight errors added."""
    texts = torch.tensor(windows(WINDOWS))
    hooks = []
    with torch.no_grad():
        expected = torch.log_softmax(model(texts).logits, -1)
        if product == "head":
            modules = [model.get_output_embeddings()]
        else:
            _, layer, role = product.split(".")
            modules = [model.base_model.get_submodule(name.format(i=layer)) for name in decoder.modules(role)]
        start = 0
        for module in modules:
            weight = module.weight.T if decoder.family.inputs_first and product != "head" else module.weight
            dw = torch.from_numpy(error.weight_error[start : start + len(weight)])
            start += len(weight)

            def add(module, inputs, output, weight=weight, dw=dw):  # type: ignore[no-untyped-def]
                x = inputs[0]
                dx = torch.from_numpy(error.input_error(x.reshape(-1, x.shape[-1]).numpy())).reshape(x.shape)
                return output + dx @ (weight + dw).T + x @ dw.T

            hooks.append(module.register_forward_hook(add))
        found = torch.log_softmax(model(texts).logits, -1)
        for hook in hooks:
            hook.remove()
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.fixture
def whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturbation, "SAMPLED_ROWS", 1 << 20)


@pytest.mark.usefixtures("whole_weights")
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_sensitivities_are_the_kl_of_a_product_alone(family: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = tiny(family)
    decoder = describe(Checkpoint(source))
    monkeypatch.setattr(sensitivity, "DRAWS", 16)  # the mean of squares takes many to be near
    found = perturbations(source, [W8A8, W4A8_ROTATED])
    measured = measure(source, decoder, found, windows(WINDOWS), threads=1)
    assert measured.keys() == set(decoder.products)
    for product, perturbed in found.items():
        for value, error in zip(measured[product], perturbed, strict=True):
            in_order = error._replace(weight_error=error.weight_error[np.argsort(error.rows)])
            exact = exact_kl(model, decoder, product, in_order)
            assert value == pytest.approx(exact, rel=0.3), (product, error.precision)


@pytest.mark.usefixtures("whole_weights")
def test_a_sample_of_the_rows_stands_for_all(tiny: Tiny) -> None:
    _, source = tiny("llama")
    decoder = describe(Checkpoint(source))
    found = perturbations(source, [W4A8])
    sampled = {
        product: [p._replace(rows=p.rows[: len(p.rows) // 2], weight_error=p.weight_error[: len(p.rows) // 2])]
        for product, (p,) in found.items()
        if product != "head"
    }
    whole = measure(source, decoder, found, windows(16), threads=1)
    part = measure(source, decoder, sampled | {"head": found["head"]}, windows(16), threads=1)
    assert part["head"] == whole["head"]
    assert sum(map(sum, part.values())) == pytest.approx(sum(map(sum, whole.values())), rel=0.3)
    assert part != whole


def test_a_product_whose_inputs_have_an_outlier_stands_out(tiny: Tiny, tmp_path: Path) -> None:
    """One input that is large and does next to nothing takes the steps of all others; a GELU lets none migrate."""
    model, _ = tiny("gpt2")
    bad = tmp_path / "bad"
    model.save_pretrained(bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.bias"][5] = 300.0
    tensors["transformer.h.1.mlp.c_proj.weight"][5] = 1e-5
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    found = perturbations(bad, [W8A8, W8A8_ROTATED])
    measured = measure(bad, describe(Checkpoint(bad)), found, windows(16), threads=1)
    assert max(measured, key=lambda product: measured[product][0]) == "layers.1.down"
    plain, rotated = measured["layers.1.down"]
    assert rotated < plain / 2
