"""Text read by models beside their reference, in chunks, as it is served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from compress.scores import Table, log_softmax, score_rows
from serve.block_cache import blocks_for
from serve.plan import Floats, Plan, Runner

CHUNK = 128  # tokens a run, as in serving

Name = TypeVar("Name", bound=str)


class Reference(Protocol):
    """The model that is right, over the windows that it was made for."""

    def log_probabilities(self, window: int, start: int, end: int) -> Floats:
        """[end - start, vocabulary], behind each of a window's tokens from `start` to `end`."""


MakeReference = Callable[[Sequence[Sequence[int]]], Reference]


def score(runner: Runner, window: Sequence[int], start: int, end: int) -> Floats:
    """Log-probabilities behind each of the window's tokens from `start` to `end`; those before are in the cache."""
    plan = Plan()
    # Blocks of the native form; the first one is the stock form's slot.
    plan.add(range(blocks_for(len(window))), start, list(window[start:end]), want="all")
    output = runner.run(plan)
    return log_softmax(output.logits[output.rows])


class RunnerReference:
    """A reference that is an artifact: it reads a window from its beginning to where it is asked."""

    def __init__(self, runner: Runner, windows: Sequence[Sequence[int]]) -> None:
        self._runner = runner
        self._windows = windows
        self._read = (-1, 0)  # a window, and how many of its tokens are in the cache

    def log_probabilities(self, window: int, start: int, end: int) -> Floats:
        tokens = self._windows[window]
        first = start if self._read == (window, start) else 0
        self._read = window, end
        rows = [score(self._runner, tokens, at, min(at + CHUNK, end)) for at in range(first, end, CHUNK)]
        return np.concatenate(rows)[start - first :]


def read(
    reference: Reference,
    candidates: Mapping[Name, Reference],
    windows: Sequence[Sequence[int]],
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[Table], dict[Name, list[Table]]]:
    """The scores of the reference and of each candidate, by window. `progress` is told once a window."""
    exact: list[Table] = []
    scores: dict[Name, list[Table]] = {name: [] for name in candidates}
    for number, window in enumerate(windows):
        chunks: list[Table] = []
        found: dict[Name, list[Table]] = {name: [] for name in candidates}
        for start in range(0, len(window) - 1, CHUNK):
            end = min(start + CHUNK, len(window) - 1)
            targets = np.asarray(window[start + 1 : end + 1])
            expected = reference.log_probabilities(number, start, end)
            chunks.append(score_rows(expected, expected, targets))
            for name, candidate in candidates.items():
                rows = candidate.log_probabilities(number, start, end)
                found[name].append(score_rows(expected, rows, targets))
        exact.append(np.concatenate(chunks))
        for name, tables in found.items():
            scores[name].append(np.concatenate(tables))
        progress()
    return exact, scores
