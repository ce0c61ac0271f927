"""A runner whose logits are known: those of a token depend on the token alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.reading import MakeReference
from compress.runners import Streams
from compress.scores import log_softmax
from serve.plan import Floats, Output, Plan

VOCAB = 50


class TableRunner:
    """Rows come in reverse, as a runner may order them as it likes."""

    any_chunking = True
    kv_bytes = 0

    def __init__(self, noise: float = 0.0, *, scale: float = 1.0, bad_token: int | None = None) -> None:
        self.table = 3 * np.random.default_rng(8).normal(size=(VOCAB, VOCAB)).astype(np.float32)
        self.table += noise * np.random.default_rng(9).normal(size=self.table.shape).astype(np.float32)
        self.table *= scale
        if bad_token is not None:
            self.table[bad_token] = np.nan
        self.held: dict[int, int] = {}  # tokens, by the first block of a stream
        self.sizes: list[int] = []

    def run(self, plan: Plan) -> Output:
        for segment in plan.segments:
            place = int(segment.blocks[0])
            assert segment.past in (0, self.held.get(place)), "chunks follow one another"
            self.held[place] = segment.past + segment.count
            self.sizes.append(segment.count)
        logits = self.table[[plan.tokens[i] for i in plan.wanted]][::-1]
        return Output(logits, np.zeros((len(logits), 1), np.float32), list(range(len(logits)))[::-1])


def streams(runner: TableRunner, count: int = 3, capacity: int = 1024) -> Streams:
    return Streams(runner, [[i] for i in range(count)], capacity)


class TableReference:
    """What the table says of each token of its windows."""

    def __init__(self, runner: TableRunner, windows: Sequence[Sequence[int]]) -> None:
        self.runner = runner
        self.windows = windows

    def log_probabilities(self, window: int, start: int, end: int) -> Floats:
        return log_softmax(self.runner.table[list(self.windows[window][start:end])])


def reference_of(runner: TableRunner | None = None) -> MakeReference:
    return lambda windows: TableReference(runner or TableRunner(), windows)
