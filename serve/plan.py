"""The plan: the contract between policy (the scheduler) and compute (a runner).

Tokens are flat, `[n]`. A segment is a run of them that belongs to one request: `count` tokens from flat position
`start`, to be written behind the `past` tokens that lie in the blocks of its table. Prefill chunks, decode rows
(`count` 1) and verification mix freely. `wanted` lists the flat positions whose logits are to be returned, in that
order, `temperatures` the temperature each will be sampled with (0: greedy); `hidden` those whose hidden state is.
A segment's first `scored` positions are wanted to tell the probability of the tokens that follow: at temperature 1.
A segment that `follows` a flat position of the plan before is one token, which the runner guesses from that position's
logits, `shares` and `top_ps` being of each wanted position what its draw will take: so the next run need not wait for
the host to choose. What the host chooses counts; a run that followed a wrong guess is of no use.
`copies` are done first: the first `length` positions of block `source` into block `target` (prefix reuse of runners
whose blocks hold a whole request).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Blocks = Sequence[int] | NDArray[np.int32]  # a block table; entries past the need are ignored
Want = Literal["last", "all", "hidden", "none"]


@dataclass(slots=True)
class Segment:
    blocks: Blocks
    past: int
    start: int
    count: int
    scored: int = 0
    follows: int | None = None


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
    temperatures: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)  # 0 to 1, of wanted positions; empty: the runner guesses nothing
    top_ps: list[float] = field(default_factory=list)
    hidden: list[int] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    def add(
        self,
        blocks: Blocks,
        past: int,
        tokens: list[int],
        *,
        want: Want = "last",
        temperature: float = 0.0,
        scored: int = 0,
        follows: int | None = None,
    ) -> None:
        """Append a segment; `want`: the logits of its "last" or of "all" positions, their "hidden" states or "none".

        Before them come the logits of the first `scored` positions, which go with "last" and "none" only.
        """
        start = len(self.tokens)
        self.tokens += tokens
        end = len(self.tokens)
        self.segments.append(Segment(blocks, past, start, end - start, scored, follows))
        if scored:
            self.wanted += range(start, start + scored)
            self.temperatures += [1.0] * scored
        if want == "last":
            self.wanted.append(end - 1)
            self.temperatures.append(temperature)
        elif want == "all":
            self.wanted += range(start, end)
            self.temperatures += [temperature] * (end - start)
        elif want == "hidden":
            self.hidden += range(start, end)


class Rows(Protocol):
    """Rows of logits, indexed as an array is; those on a device are fetched when they are asked for."""

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Output:
    """Views into the runner's buffers, valid until its next run, or the next but one if it guesses."""

    logits: Rows  # [rows, vocabulary]
    hidden: Floats  # [hidden positions, hidden], in the plan's order: normed, before the language-model head
    rows: Sequence[int]  # the row that holds the plan's i-th wanted position
    candidates: NDArray[np.int32] | None = None  # [rows, k]: ids of the largest logits, largest first, ties by id
    total: Floats | None = None  # [rows]: sum over the vocabulary of exp((logit - largest) / temperature)
    candidate_logits: Floats | None = None  # [rows, k]: the candidates', where `logits` would have to be fetched
    guesses: NDArray[np.int32] | None = None  # [rows]: what a segment that follows the row takes for its token


class Runner(Protocol):
    """Executes plans. Holds the KV cache's memory; knows no requests and no queues."""

    kv_bytes: int  # memory of the whole cache
    guesses: bool = False  # whether a segment may follow one of the plan before

    @property
    def any_chunking(self) -> bool:
        """Whether a token's bits are the same however a sequence is cut into segments."""

    def prepare(self) -> None:
        """What is done once, by the thread that will run plans; else the first run does it."""
        return

    def run(self, plan: Plan) -> Output: ...

    def launch(self, plan: Plan) -> Callable[[], Output]:
        """Begin to run `plan`, behind whatever was begun before; calling what comes back waits for the end."""
        output = self.run(plan)
        return lambda: output
