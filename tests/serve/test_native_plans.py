"""The native form on the tiny model: the same bits alone and in any plan, however it is cut, shared or threaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from proto.manifest import NATIVE_GRAPH, Manifest
from serve.block_cache import BLOCK, blocks_for
from serve.native import library
from serve.native_runner import NativeRunner
from serve.plan import Plan
from serve.runner import StockRunner, open_session
from tests.serve.tiny import CAPACITY, VOCABULARY

NUM_BLOCKS = 40
Bits = NDArray[np.float32]
MakeRunner = Callable[[int], NativeRunner]


@pytest.fixture(scope="module")
def make_runner(artifact: Path, manifest: Manifest) -> MakeRunner:
    sessions = {threads: open_session(artifact, threads, NATIVE_GRAPH, library()) for threads in (1, 2)}

    def make(threads: int) -> NativeRunner:
        session = sessions[threads]
        return NativeRunner(session, manifest.architecture, num_blocks=NUM_BLOCKS, capacity=CAPACITY)

    return make


def draw(random: Random, count: int) -> list[int]:
    return [random.randrange(VOCABULARY) for _ in range(count)]


def alone(runner: NativeRunner, tokens: list[int]) -> Bits:
    """Logits behind every token, computed in one piece."""
    plan = Plan()
    plan.add(range(blocks_for(len(tokens))), 0, tokens, want="all")
    output = runner.run(plan)
    return output.logits[output.rows].copy()


@settings(max_examples=25, deadline=None)
@given(random=st.randoms(use_true_random=True), threads=st.sampled_from([1, 2]))
def test_any_plan_gives_the_bits_of_running_alone(make_runner: MakeRunner, random: Random, threads: int) -> None:
    sequences = [draw(random, random.randint(1, 150)) for _ in range(random.randint(1, 4))]
    expected = [alone(make_runner(1), tokens) for tokens in sequences]
    runner = make_runner(threads)
    numbers = random.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables = [[numbers.pop() for _ in range(blocks_for(len(tokens)))] for tokens in sequences]
    done = [0] * len(sequences)
    found: list[list[Bits]] = [[] for _ in sequences]
    while any(done[i] < len(tokens) for i, tokens in enumerate(sequences)):
        plan, parts = Plan(), []
        for i in random.sample(range(len(sequences)), len(sequences)):
            left = len(sequences[i]) - done[i]
            if count := min(left, random.choice([0, 1, 1, 4, random.randint(1, 90)])):
                plan.add(tables[i], done[i], sequences[i][done[i] : done[i] + count], want="all")
                parts.append((i, count))
                done[i] += count
        output = runner.run(plan)
        rows = iter(output.rows)
        for i, count in parts:
            found[i].append(output.logits[[next(rows) for _ in range(count)]])
    for whole, pieces in zip(expected, found, strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


@settings(max_examples=10, deadline=None)
@given(random=st.randoms(use_true_random=True))
def test_a_shared_block_gives_the_bits_of_an_own_one(make_runner: MakeRunner, random: Random) -> None:
    prefix = draw(random, BLOCK)
    tails = [draw(random, random.randint(1, 40)) for _ in range(3)]
    expected = [alone(make_runner(1), prefix + tail)[BLOCK:] for tail in tails]
    runner, plan = make_runner(2), Plan()
    plan.add([7], 0, prefix, want="none")
    runner.run(plan)
    plan = Plan()
    for i, tail in enumerate(tails):
        plan.add([7, 10 + i], BLOCK, tail, want="all")
    output = runner.run(plan)
    np.testing.assert_array_equal(output.logits[output.rows], np.concatenate(expected))


def test_refused_drafts_leave_no_trace(make_runner: MakeRunner) -> None:
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, 100).tolist()
    expected, runner = alone(make_runner(1), tokens), make_runner(2)
    for start, right in ((0, 60), (60, 3), (63, 1), (64, 20), (84, 16)):  # what follows the right ones is wrong
        plan = Plan()
        plan.add([3, 1], start, tokens[start : start + right] + [5, 6, 7][: 100 - start - right], want="all")
        output = runner.run(plan)
        np.testing.assert_array_equal(output.logits[output.rows[:right]], expected[start : start + right])


def test_the_stock_form_agrees(make_runner: MakeRunner, artifact: Path, manifest: Manifest) -> None:
    tokens = np.random.default_rng(4).integers(0, VOCABULARY, 120).tolist()
    session = open_session(artifact, 2)
    stock = StockRunner(session, manifest.architecture, num_slots=1, capacity=CAPACITY, max_rows=CAPACITY)
    plan = Plan()
    plan.add([0], 0, tokens, want="all")
    output = stock.run(plan)
    expected, found = output.logits[output.rows], alone(make_runner(2), tokens)
    distance = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
    assert distance < 0.1, "both hold keys and values in 8 bits, the stock form with fixed scales"
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.75
