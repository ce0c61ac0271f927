"""What judging a file gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from train.evaluation.intervals import Interval


@dataclass(frozen=True, slots=True)
class Judgement:
    """`metrics` are figures by name, `intervals` the 95 % intervals of some of them, `counts` what they stand on.

    `answers` has an entry per answer: what was said and how it was scored. `notes` say how the figures came about.
    """

    metrics: Mapping[str, float]
    intervals: Mapping[str, Interval]
    counts: Mapping[str, int]
    answers: Sequence[Mapping[str, Any]] = field(default=())
    notes: Mapping[str, str] = field(default_factory=dict)
