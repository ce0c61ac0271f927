"""What the data gives and an objective takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

IGNORE = -100  # the label where nothing is learnt, as in torch's losses


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of sequences.

    tokens [rows, length] int64; positions [rows, length] int64, from 0 in each sequence, so that attention stays
    within it; labels [rows, length] int64, the token to foretell at each position, or IGNORE.

    extras hold what an objective on examples needs, each [examples, ...], where the rows of example i are
    i * rows/examples and the following:
    - pairs (DPO): two rows an example, the chosen and the rejected answer; `weight` [examples] float32.
    - thumbs (KTO): two rows an example, the answer and the same prompt with another's answer (for the KL term);
      `desirable` [examples] bool, `weight` [examples] float32.
    - classes: one row an example; `target` [examples] int64, `last` [examples] int64 the position of its last token,
      `weight` [examples] float32.
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    num_tokens: int = 0  # of the data: without padding

    @property
    def count(self) -> int:
        """What the summed loss is divided by: tokens that are learnt, or examples."""
        if self.extras:
            return len(self.extras["weight"])
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        extras = {name: value.to(device) for name, value in self.extras.items()}
        tensors = (self.tokens.to(device), self.positions.to(device), self.labels.to(device))
        return Batch(*tensors, extras, self.num_tokens)

    def split(self, rows: int) -> Iterator[Batch]:
        """Micro-batches of at most `rows` rows; examples are not split."""
        examples = len(self.extras["weight"]) if self.extras else len(self.tokens)
        rows_each = len(self.tokens) // max(1, examples)
        step = max(1, rows // rows_each)
        for start in range(0, examples, step):
            of_rows = slice(start * rows_each, (start + step) * rows_each)
            extras = {name: value[start : start + step] for name, value in self.extras.items()}
            yield Batch(self.tokens[of_rows], self.positions[of_rows], self.labels[of_rows], extras)


class Batches(Protocol):
    """Batch number N as a pure function of the data, the seed and N: a run's place in its data is one number."""

    steps_per_epoch: int
    digest: str  # of the data, the tokenizer, the shape and what was packed how

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Examples part, part + parts, ... of batch `step` (from 0); after an epoch in another order."""
