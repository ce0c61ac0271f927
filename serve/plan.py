"""The plan: the contract between policy (the scheduler) and compute (a runner).

Tokens are flat, `[n]`. A segment is a run of them that belongs to one slot: `count` tokens from flat position
`start`, to be written behind the `past` tokens the slot already holds. Prefill chunks, decode rows (`count` 1) and
verification mix freely. `wanted` lists the flat positions whose logits are to be returned, in that order.
`copies` are done first: the first `length` positions of slot `source` into slot `target` (prefix reuse).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    slot: int
    past: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Copy:
    source: int
    target: int
    length: int


@dataclass(slots=True)
class Plan:
    tokens: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    def add(self, slot: int, past: int, tokens: list[int], *, want: str = "last") -> None:
        """Append a segment; `want` is "last", "all" or "none" of its positions' logits."""
        start = len(self.tokens)
        self.tokens += tokens
        self.segments.append(Segment(slot, past, start, len(tokens)))
        if want == "all":
            self.wanted += range(start, len(self.tokens))
        elif want == "last":
            self.wanted.append(len(self.tokens) - 1)


@dataclass(frozen=True, slots=True)
class Output:
    """Views into the runner's buffers, valid until its next run."""

    logits: Floats  # [rows, vocabulary]
    hidden: Floats  # [rows, hidden]: the normed hidden state before the language-model head
    rows: list[int]  # the row that holds the plan's i-th wanted position


class Runner(Protocol):
    """Executes plans. Holds the KV cache's memory; knows no requests and no queues."""

    num_slots: int
    capacity: int  # tokens per slot
    kv_bytes: int  # memory of the whole cache

    def run(self, plan: Plan) -> Output: ...
