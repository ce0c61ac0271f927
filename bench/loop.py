"""The measuring loop around any engine that is driven step by step: the same for ours and for the peers.

Imported by the peers' own interpreters too, so the standard library is all it needs.
"""

from __future__ import annotations

import random
import time
from typing import Protocol

from bench.row import Load

TOKEN_IDS = range(1000, 40000)  # ordinary tokens of any vocabulary we meet; specials lie at the ends


class Steps(Protocol):
    """Greedy, and blind to the end-of-sequence token."""

    def submit(self, prompts: list[list[int]], max_tokens: int) -> None:
        """Queue one request per prompt. The earlier ones have ended."""

    def step(self) -> list[int]:
        """Go on a little; tokens generated so far, per request."""


def most_tokens(load: Load) -> int:
    """What a request may generate here: `output_len`, and a token for each step that it may start before the last."""
    return load.output_len + load.concurrency


def prompts(load: Load, source: random.Random) -> list[list[int]]:
    """One of random tokens per request, so that nothing is shared between them."""
    return [source.choices(TOKEN_IDS, k=load.input_len) for _ in range(load.concurrency)]


def measure(engine: Steps, load: Load, source: random.Random) -> dict[str, float]:
    """Tokens per second: all prompts while nothing decodes, then steps in which every request decodes.

    The second pass sends the same prompts again. An engine that keeps prefixes computes little of them, so that all
    requests start within a few steps and long prompts are paid once.
    """
    asked = prompts(load, source)
    started = time.perf_counter()
    engine.submit(asked, 1)
    while min(engine.step()) < 1:
        pass
    prefill_seconds = time.perf_counter() - started

    most = most_tokens(load)
    engine.submit(asked, most)
    while min(before := engine.step()) < 1:
        pass
    if max(before) >= most:
        raise RuntimeError(f"at {load} a request had its {most} tokens before the last began; give a larger output_len")
    wanted = sum(before) + load.output_len * load.concurrency
    started = time.perf_counter()
    while sum(now := engine.step()) < wanted and max(now) < most:
        pass
    seconds, decoded = time.perf_counter() - started, sum(now) - sum(before)
    while min(now) < most:
        now = engine.step()
    return {
        "output_throughput": decoded / seconds,
        "prefill_throughput": load.concurrency * load.input_len / prefill_seconds,
    }
