"""How long an artifact's greedy answers stay those of the reference.

The artifact continues prompts, all at once, as a server would. The reference reads what came out (teacher forcing): up
to the first token that it would not have chosen, both have generated the same. So the reference need not generate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from compress.reading import MakeReference
from compress.runners import Streams
from compress.scores import Measured
from serve.plan import Plan

PROMPT = 64  # tokens, or half a window if that is less
LENGTH = 128  # tokens generated at most, or what the window has left

Same = tuple[int, int]  # of an answer: tokens that are the reference's too, before the first that is not; all tokens


def prompts_of(windows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The beginnings of the windows."""
    return [list(window[: min(PROMPT, len(window) // 2)]) for window in windows]


def generate(
    streams: Streams, prompts: Sequence[Sequence[int]], eos: Sequence[int], length: int = LENGTH
) -> list[list[int]]:
    """The most probable continuation of each prompt, with its end-of-sequence token if it comes to that."""
    found: list[list[int]] = []
    for start in range(0, len(prompts), len(streams.tables)):
        found += _generate_batch(streams, prompts[start : start + len(streams.tables)], eos, length)
    return found


def _generate_batch(
    streams: Streams, prompts: Sequence[Sequence[int]], eos: Sequence[int], length: int
) -> list[list[int]]:
    """At most a prompt for each stream."""
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    plan = Plan()
    for i in running:
        plan.add(streams.tables[i], 0, list(prompts[i]))
    while running:
        output = streams.runner.run(plan)
        for i, row in zip(running, output.rows, strict=True):
            answers[i].append(int(output.logits[row].argmax()))
        running = [
            i
            for i in running
            if answers[i][-1] not in eos and len(answers[i]) < min(length, streams.capacity - len(prompts[i]))
        ]
        plan = Plan()
        for i in running:
            plan.add(streams.tables[i], len(prompts[i]) + len(answers[i]) - 1, answers[i][-1:])
    return answers


def identical_lengths(
    make_reference: MakeReference,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    progress: Callable[[], None] = lambda: None,
) -> list[int]:
    """Of each (prompt, answer), the tokens of the answer before the first one that the reference would not choose."""
    reference = make_reference([[*prompt, *answer] for prompt, answer in pairs])
    lengths = []
    for i, (prompt, answer) in enumerate(pairs):
        first = len(prompt) - 1
        best = reference.log_probabilities(i, first, first + len(answer)).argmax(-1)
        lengths.append(int(np.append(best == answer, False).argmin()))
        progress()
    return lengths


def figures(answers: Sequence[Same]) -> Measured:
    """Mean and median length of the identical beginning in tokens, and the share that is identical to its end."""
    found = Measured()
    lengths = [same for same, _ in answers]
    found.add_mean("identical_length", lengths)
    found.add("identical_median", float(np.median(lengths)))
    found.add_mean("identical_share", [same == whole for same, whole in answers])
    return found
