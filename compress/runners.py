"""The forms of an artifact that run here, each with the runner that will serve it, and text read by them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from compress.scores import log_softmax
from proto.manifest import NATIVE_GRAPH, Architecture, Form
from serve.block_cache import blocks_for
from serve.native import NativeUnavailable, library
from serve.native_runner import NativeRunner
from serve.plan import Floats, Plan, Runner
from serve.runner import StockRunner, open_session

CHUNK = 128  # tokens a run, as in serving


class Reference(Protocol):
    """The full-precision model over the windows that it was made for."""

    def log_probabilities(self, window: int, start: int, end: int) -> Floats:
        """[end - start, vocabulary], behind each of a window's tokens from `start` to `end`."""


MakeReference = Callable[[Sequence[Sequence[int]]], Reference]


@dataclass(frozen=True, slots=True)
class Streams:
    """A runner, and the blocks of each of its streams. A stream has room for `capacity` tokens."""

    runner: Runner
    tables: Sequence[Sequence[int]]
    capacity: int


def forms_here(directory: Path) -> list[Form]:
    """The forms that this machine can run, the one that would be served first."""
    if not (directory / NATIVE_GRAPH).exists():
        return ["stock"]
    try:
        library()
    except NativeUnavailable as reason:
        print(f"compress: the native form is left out: {reason}", file=sys.stderr)
        return ["stock"]
    return ["native", "stock"]


def open_streams(
    directory: Path, form: Form, architecture: Architecture, *, streams: int, capacity: int, threads: int
) -> Streams:
    """Open one form of the artifact, with a cache that holds `streams` sequences of `capacity` tokens."""
    if form == "stock":
        session = open_session(directory, threads)
        stock = StockRunner(session, architecture, num_slots=streams, capacity=capacity, max_rows=capacity)
        return Streams(stock, [[slot] for slot in range(streams)], capacity)
    width = blocks_for(capacity)
    session = open_session(directory, threads, NATIVE_GRAPH, library())
    native = NativeRunner(session, architecture, num_blocks=streams * width, capacity=capacity)
    return Streams(native, [range(i * width, (i + 1) * width) for i in range(streams)], capacity)


def score(runner: Runner, window: Sequence[int], start: int, end: int) -> Floats:
    """Log-probabilities behind each of the window's tokens from `start` to `end`; those before are in the cache."""
    plan = Plan()
    # Blocks of the native form; the first one is the stock form's slot.
    plan.add(range(blocks_for(len(window))), start, list(window[start:end]), want="all")
    output = runner.run(plan)
    return log_softmax(output.logits[output.rows])
