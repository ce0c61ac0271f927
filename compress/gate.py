"""The gate: is the artifact as good as the full-precision model, on text that calibration did not see?

Every form is run through the runner that will serve it, prompt chunk by prompt chunk, with the reference's context.
Limits are fixed before the run and travel with the figures in the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress import generations
from compress.budget import Budget
from compress.runners import CHUNK, MakeReference, Reference, Streams, score
from compress.scores import FIGURES, REFERENCE_FIGURES, Table, measure, score_rows
from proto.manifest import Form, GateReport


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict, and what it stands on: scores by window, [positions, 4] as in compress/scores.py."""

    report: GateReport
    reference: list[Table]
    scores: dict[Form, list[Table]]
    identical: dict[Form, list[int]]  # tokens of each greedy answer before it leaves the reference's


def judge(
    make_reference: MakeReference,
    candidates: Mapping[Form, Streams],
    windows: Sequence[Sequence[int]],
    budget: Budget,
    *,
    eos: Sequence[int] = (),
    forced: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Judgement:
    """Judge an artifact's forms, the one that is served here first; each must keep the budget.

    The figures of the second form and the following are named after it: `stock_kl`. `progress` is told once a window.
    """
    exact, scores = _read(make_reference(windows), candidates, windows, progress)
    prompts = generations.prompts_of(windows)
    answers = {form: generations.generate(streams, prompts, eos) for form, streams in candidates.items()}
    pairs = [(prompt, answer) for form in candidates for prompt, answer in zip(prompts, answers[form], strict=True)]
    lengths = iter(generations.identical_lengths(make_reference, pairs))
    identical = {form: [next(lengths) for _ in prompts] for form in candidates}

    first, *_ = candidates
    found = measure(exact, exact, REFERENCE_FIGURES)
    passed = True
    for form in candidates:
        own = measure(exact, scores[form], FIGURES)
        own.join(generations.figures(identical[form], answers[form]))
        passed = passed and not budget.failures(own.metrics, own.intervals)
        found.join(own, "" if form == first else f"{form}_")
    report = GateReport(
        form=first,
        passed=passed,
        forced=forced and not passed,
        tokens=sum(map(len, exact)),
        windows=len(windows),
        metrics=found.metrics,
        intervals=found.intervals,
        thresholds=dict(budget.thresholds),
    )
    return Judgement(report, exact, scores, identical)


def _read(
    reference: Reference,
    candidates: Mapping[Form, Streams],
    windows: Sequence[Sequence[int]],
    progress: Callable[[], None],
) -> tuple[list[Table], dict[Form, list[Table]]]:
    """The scores of the reference and of each form, by window."""
    exact: list[Table] = []
    scores: dict[Form, list[Table]] = {form: [] for form in candidates}
    for number, window in enumerate(windows):
        chunks: dict[Form | None, list[Table]] = {form: [] for form in (None, *candidates)}
        for start in range(0, len(window) - 1, CHUNK):
            end = min(start + CHUNK, len(window) - 1)
            targets = np.asarray(window[start + 1 : end + 1])
            expected = reference.log_probabilities(number, start, end)
            chunks[None].append(score_rows(expected, expected, targets))
            for form, streams in candidates.items():
                chunks[form].append(score_rows(expected, score(streams.runner, window, start, end), targets))
        exact.append(np.concatenate(chunks[None]))
        for form in candidates:
            scores[form].append(np.concatenate(chunks[form]))
        progress()
    return exact, scores
