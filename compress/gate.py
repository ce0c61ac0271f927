"""The gate: is the artifact as good as the full-precision model, on text that calibration did not see?

Every form is run through the runner that will serve it, prompt chunk by prompt chunk, with the reference's context.
Limits are fixed before the run and travel with the figures in the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from compress import generations
from compress.budget import Budget
from compress.generations import Same
from compress.reading import MakeReference, Name, RunnerReference, read
from compress.runners import Streams
from compress.scores import FIGURES, REFERENCE_FIGURES, Measured, Table, measure
from proto.manifest import Form, GateReport

EXIT_GATE = 3  # status of a command whose gate refuses


@dataclass(frozen=True, slots=True)
class Evidence(Generic[Name]):
    """What a reference and candidates made of the same text: scores by window, as in compress/scores.py."""

    reference: list[Table]
    scores: dict[Name, list[Table]]
    identical: dict[Name, list[Same]]  # by greedy answer

    def figures(self, name: Name) -> Measured:
        """Of one candidate."""
        found = measure(self.reference, self.scores[name], FIGURES)
        found.join(generations.figures(self.identical[name]))
        return found


def examine(
    make_reference: MakeReference,
    candidates: Mapping[Name, Streams],
    windows: Sequence[Sequence[int]],
    *,
    eos: Sequence[int] = (),
    progress: Callable[[], None] = lambda: None,
) -> Evidence[Name]:
    """Let the candidates read the windows, and continue their beginnings up to one of the tokens `eos`.

    `progress` is told once a window, and once an answer of each candidate.
    """
    readers = {name: RunnerReference(streams.runner, windows) for name, streams in candidates.items()}
    exact, scores = read(make_reference(windows), readers, windows, progress)
    prompts = generations.prompts_of(windows)
    answers = {name: generations.generate(streams, prompts, eos) for name, streams in candidates.items()}
    pairs = [pair for found in answers.values() for pair in zip(prompts, found, strict=True)]
    lengths = iter(generations.identical_lengths(make_reference, pairs, progress))
    identical = {name: [(next(lengths), len(answer)) for answer in found] for name, found in answers.items()}
    return Evidence(exact, scores, identical)


def judge(evidence: Evidence[Form], budget: Budget, *, forced: bool = False) -> GateReport:
    """Judge an artifact's forms, the one that is served here first; each must keep the budget.

    The figures of the second form and the following are named after it: `stock_kl`.
    """
    first, *_ = evidence.scores
    found = measure(evidence.reference, evidence.reference, REFERENCE_FIGURES)
    passed = True
    for form in evidence.scores:
        own = evidence.figures(form)
        passed = passed and not budget.failures(own.metrics, own.intervals)
        found.join(own, "" if form == first else f"{form}_")
    return GateReport(
        form=first,
        passed=passed,
        forced=forced and not passed,
        tokens=sum(map(len, evidence.reference)),
        windows=len(evidence.reference),
        metrics=found.metrics,
        intervals=found.intervals,
        thresholds=dict(budget.thresholds),
    )
