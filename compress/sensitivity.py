"""How much each product suffers from each precision, in nats of KL(float model || model with that product alone).

To second order, an error e of some values of the model costs half of e^T F e, F being the Fisher information: the mean
of g g^T, with g the gradient of the log-likelihood of tokens that the model itself draws (Theis et al.,
arXiv:1801.05787). So a few backward passes serve all products and precisions. Squares of whole windows are averaged:
draws at different positions are independent, and what one position's error does to later ones is in the gradient.

- Errors of a product's inputs act together: the square of their sum.
- Errors of the weight's rows are rounded apart from each other: the sum of their squares, over a sample of the rows.
- The head has no layers behind it: its KL is computed as it is.

The KL of a recipe is the sum over its products. What a recipe does not choose (the rounding of the embedding and of the
cache) is in no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import logging as transformers_logging

from compress.checkpoint import Floats
from compress.families import Decoder
from compress.perturbation import Perturbation
from train.model import load_model

DRAWS = 4  # of tokens at every position of a window


class FloatModel:
    """The checkpoint in float32 by transformers, with the inputs and outputs of every product within reach."""

    def __init__(self, source: Path, decoder: Decoder) -> None:
        self.decoder = decoder
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        network: Any = load_model(source, dtype=torch.float32).network
        self._model = network
        self._model.eval().requires_grad_(False)
        self._model.enable_input_require_grads()
        self._inputs: dict[str, Tensor] = {}  # [1, T, K], of products
        self._outputs: dict[str, list[Tensor]] = {}  # [1, T, rows] of each of a product's modules
        for layer in range(decoder.num_layers):
            for role in decoder.roles:
                for template in decoder.modules(role):
                    module = self._model.base_model.get_submodule(template.format(i=layer))
                    module.register_forward_hook(self._keep(f"layers.{layer}.{role}"))
        self._model.get_output_embeddings().register_forward_hook(self._keep("head"))

    @property
    def head_weight(self) -> Floats:
        """[vocab, hidden]"""
        weight: Floats = self._model.get_output_embeddings().weight.numpy()
        return weight

    def _keep(self, product: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            del module
            self._inputs[product] = inputs[0]
            self._outputs.setdefault(product, []).append(output)

        return hook

    def run(self, window: Sequence[int]) -> dict[str, Floats]:
        """The inputs [T, K] of every product, and the logits [T, vocab] as `logits`."""
        self._inputs, self._outputs = {}, {}
        logits = self._model(input_ids=torch.tensor([list(window)]), use_cache=False).logits[0]
        self._log_probabilities = torch.log_softmax(logits, -1)
        return {"logits": logits.detach().numpy()} | {
            product: x.detach()[0].numpy() for product, x in self._inputs.items()
        }

    def gradients(
        self, rows: Mapping[str, NDArray[np.intp]], draws: int, generator: torch.Generator
    ) -> dict[str, tuple[Floats, Floats]]:
        """Of the window that was run last, for each draw of tokens: by product, those of its inputs
        [draws, T, K] and of some rows of its outputs [draws, T, n]."""
        tokens = torch.multinomial(self._log_probabilities.detach().exp(), draws, True, generator=generator)
        tensors = [t for product in rows for t in (self._inputs[product], *self._outputs[product])]
        found: dict[str, list[tuple[Tensor, Tensor]]] = {product: [] for product in rows}
        for draw in range(draws):
            likelihood = self._log_probabilities.gather(1, tokens[:, draw : draw + 1]).sum()
            gradients = iter(torch.autograd.grad(likelihood, tensors, retain_graph=draw + 1 < draws))
            for product, sampled in rows.items():
                of_input = next(gradients)[0]
                of_output = torch.cat([next(gradients)[0] for _ in self._outputs[product]], -1)
                found[product].append((of_input, of_output[:, sampled]))
        return {
            product: (torch.stack([x for x, _ in pairs]).numpy(), torch.stack([y for _, y in pairs]).numpy())
            for product, pairs in found.items()
        }


def measure(
    source: Path,
    decoder: Decoder,
    perturbations: Mapping[str, Sequence[Perturbation]],
    windows: Sequence[Sequence[int]],
    *,
    threads: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """By product, the KL in nats per token of each of its perturbations, averaged over the windows."""
    torch.set_num_threads(threads)
    model = FloatModel(source, decoder)
    generator = torch.Generator().manual_seed(0)
    rows = {product: found[0].rows for product, found in perturbations.items() if product != "head"}
    totals = {product: np.zeros(len(found)) for product, found in perturbations.items()}
    for window in windows:
        values = model.run(window)
        logits, x = values["logits"], values["head"]
        totals["head"] += [head_kl(logits, x, model.head_weight, p) for p in perturbations["head"]]
        for product, (of_input, of_output) in model.gradients(rows, DRAWS, generator).items():
            x = values[product]
            share = len(rows[product]) / decoder.shape(product.rpartition(".")[2])[0]
            for i, perturbation in enumerate(perturbations[product]):
                by_input = np.tensordot(of_input, perturbation.input_error(x), 2)  # [draws]
                by_row = np.einsum("dtn,tn->dn", of_output, x @ perturbation.weight_error.T)
                squares = np.square(by_input) + np.square(by_row).sum(axis=1) / share
                totals[product][i] += squares.mean() / 2 / len(window)
        progress()
    return {product: (total / len(windows)).tolist() for product, total in totals.items()}


def head_kl(logits: Floats, x: Floats, weight: Floats, perturbation: Perturbation) -> float:
    """Mean KL of the logits [T, vocab] against those with the inputs x [T, K] and the weight [vocab, K] rounded."""
    dx, dw = perturbation.input_error(x), perturbation.weight_error
    error = torch.from_numpy(dx) @ torch.from_numpy(weight + dw).T + torch.from_numpy(x) @ torch.from_numpy(dw).T
    exact = torch.from_numpy(logits)
    expected, found = torch.log_softmax(exact, -1), torch.log_softmax(exact + error, -1)
    return float(torch.nn.functional.kl_div(found, expected, reduction="batchmean", log_target=True))
