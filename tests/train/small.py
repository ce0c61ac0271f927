"""A model with the parts that optimizers and checkpoints tell apart, and steps that it takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.optimizers import OptimizerOptions, Optimizers, make_optimizers

VOCABULARY = 11
WIDTH = 6
LEARNING_RATE = 0.02


class Layer(nn.Module):
    """Rows of 7, 3 and 1: two processes get unequal shares, and of the last one of them none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 7)
        self.down = nn.Linear(7, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, 3, bias=False)
        self.gate = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        given = self.norm(hidden)
        wide = self.down(torch.tanh(self.up(given)))
        open_by = self.gate(given) + self.key(given).square().mean(-1, keepdim=True)
        return hidden + wide * torch.sigmoid(open_by)


class Small(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.drop = nn.Dropout(0.0)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.drop(self.embedding(tokens))
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def make(seed: int = 0, optimizer: str = "muon") -> tuple[Small, Optimizers]:
    torch.manual_seed(seed)
    model = Small()
    return model, optimize(model, optimizer)


def optimize(model: nn.Module, optimizer: str = "muon") -> Optimizers:
    return make_optimizers(model.named_parameters(), LEARNING_RATE, OptimizerOptions(optimizer=optimizer))


def take_step(model: nn.Module, optimizers: Optimizers, step: int, part: int = 0, parts: int = 1) -> None:
    """On rows part, part + parts, ... of four; the batch depends on `step` alone."""
    tokens = torch.randint(VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(step))[part::parts]
    logits = model(tokens[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizers.set_lr(1 / (1 + step))
    optimizers.step()
    optimizers.zero_grad()
