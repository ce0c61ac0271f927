"""The measuring loop around engines whose every step is known, with a clock that they move."""

from __future__ import annotations

import random

import pytest

from bench import loop
from bench.loop import measure, most_tokens, prompts
from bench.row import Load


class Clock:
    """Stands for `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Engine:
    """Prefills one request per second (at most `prefills` tokens of it the second time), decodes two steps a second."""

    def __init__(self, clock: Clock, *, together: bool = True) -> None:
        self.clock = clock
        self.together = together
        self.asked: list[list[list[int]]] = []

    def submit(self, prompts: list[list[int]], max_tokens: int) -> None:
        self.asked.append(prompts)
        self.counts = [0] * len(prompts)
        self.most = max_tokens

    def step(self) -> list[int]:
        assert min(self.counts) < self.most, "stepped after the end"
        waiting = self.counts.index(0) if 0 in self.counts else None
        self.clock.now += 0.5 if waiting is None else 1.0
        decoding = [i for i, count in enumerate(self.counts) if 0 < count < self.most]
        for i in decoding if self.together or waiting is None else []:
            self.counts[i] += 1
        if waiting is not None:
            self.counts[waiting] = 1
        return self.counts[:]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    return clock


@pytest.mark.parametrize("together", [True, False])
def test_only_steps_in_which_all_decode_count(clock: Clock, together: bool) -> None:
    engine = Engine(clock, together=together)
    figures = measure(engine, Load(100, 10, 4), random.Random(0))
    assert figures["prefill_throughput"] == pytest.approx(4 * 100 / 4.0)
    assert figures["output_throughput"] == pytest.approx(4 * 2.0)
    first, second = engine.asked
    assert first == second, "the prefixes of the first pass are there for the second"


def test_no_prompt_is_like_another() -> None:
    asked = prompts(Load(50, 1, 8), random.Random(0))
    assert [len(prompt) for prompt in asked] == [50] * 8
    assert len({tuple(prompt) for prompt in asked}) == 8


def test_a_load_without_a_common_step_is_an_error(clock: Clock) -> None:
    class Slow(Engine):
        def step(self) -> list[int]:
            counts = super().step()
            if self.most > 1 and 0 in self.counts:  # far ahead before the others begin
                self.counts[0] = counts[0] = self.most
            return counts

    load = Load(100, 1, 2)
    with pytest.raises(RuntimeError, match=f"had its {most_tokens(load)} tokens"):
        measure(Slow(clock), load, random.Random(0))
