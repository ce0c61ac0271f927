"""One line of a result: which system, which part of it, under what load, and its figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Load:
    """`concurrency` requests at a time, each of `input_len` prompt tokens, answered with `output_len` tokens."""

    input_len: int
    output_len: int
    concurrency: int


@dataclass(frozen=True, slots=True)
class Row:
    """`part` is "engine" (a bare loop over the model) or "http" (clients and a server).

    Every row has `output_throughput`, tokens per second in all. For an engine row that is decoding alone, with
    `prefill_throughput` beside it; an HTTP row has vLLM's keys, where prefill counts as well.
    """

    system: str
    part: str
    load: Load
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def output_throughput(self) -> float:
        return float(self.figures["output_throughput"])

    def document(self) -> dict[str, Any]:
        return {"system": self.system, "part": self.part, **asdict(self.load), **self.figures}


def median_row(rounds: list[Row]) -> Row:
    """The round whose throughput is the (lower) median: a run that happened, not a mixture of several."""
    return sorted(rounds, key=lambda row: row.output_throughput)[(len(rounds) - 1) // 2]
