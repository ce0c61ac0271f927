"""The block allocator against a naive model that remembers what an honest memory would hold."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.block_cache import BLOCK, BlockCache, blocks_for
from serve.cache import Table

# Whole blocks of one token each, then a rest: beginnings are often equal, and a failure reads well.
texts = st.tuples(st.lists(st.integers(0, 1), max_size=4), st.integers(1, BLOCK)).map(
    lambda parts: [token for block in parts[0] for token in [block] * BLOCK] + [7] * parts[1]
)


@dataclass(eq=False)
class Sequence:
    table: Table
    tokens: list[int]
    computed: int


class Machine(RuleBasedStateMachine):
    """Requests come, compute, grow, fail and go; `memory` is what the runner's blocks really hold."""

    @initialize(num_blocks=st.integers(5, 12))
    def start(self, num_blocks: int) -> None:
        self.cache = BlockCache(num_blocks, 5 * BLOCK)
        self.memory: dict[int, dict[int, int]] = {block: {} for block in range(num_blocks)}
        self.running: list[Sequence] = []

    def compute(self, sequence: Sequence, end: int) -> None:
        for at in range(sequence.computed, end):
            self.memory[int(sequence.table.blocks[at // BLOCK])][at % BLOCK] = sequence.tokens[at]
        sequence.computed = end
        self.cache.advance(sequence.table, end, lambda start, end: sequence.tokens[start:end])

    def pick(self, number: int) -> Sequence:
        return self.running[number % len(self.running)]

    @rule(tokens=texts, reuse=st.booleans())
    def allocate(self, tokens: list[int], reuse: bool) -> None:
        allocation = self.cache.allocate(tokens, reuse=reuse)
        if allocation is None:
            assert self.running, "a request alone always fits"
            return
        assert allocation.reused % BLOCK == 0
        assert allocation.reused < len(tokens)
        assert reuse or not allocation.reused
        self.running.append(Sequence(allocation.table, list(tokens), allocation.reused))

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 9), share=st.floats(0, 1))
    def advance(self, number: int, share: float) -> None:
        sequence = self.pick(number)
        left = len(sequence.tokens) - sequence.computed
        self.compute(sequence, sequence.computed + round(left * share))

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 9), more=st.integers(1, 2 * BLOCK), token=st.integers(0, 1))
    def grow(self, number: int, more: int, token: int) -> None:
        sequence = self.pick(number)
        before = sequence.table.blocks.copy()
        fits = self.cache.grow(sequence.table, len(sequence.tokens) + more)
        held = blocks_for(len(sequence.tokens))
        assert (sequence.table.blocks[:held] == before[:held]).all()
        if fits:
            sequence.tokens += [token] * more
        else:
            assert len(self.running) > 1 or len(sequence.tokens) + more > self.cache.capacity

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 9), failed=st.booleans())
    def free(self, number: int, failed: bool) -> None:
        sequence = self.pick(number)
        self.running.remove(sequence)
        if failed:
            self.cache.forget(sequence.table)
        self.cache.free(sequence.table)

    @invariant()
    def every_table_reads_its_own_tokens(self) -> None:
        written: set[int] = set()
        for sequence in self.running:
            for at in range(sequence.computed):
                assert self.memory[int(sequence.table.blocks[at // BLOCK])][at % BLOCK] == sequence.tokens[at]
            ahead = sequence.table.blocks[sequence.computed // BLOCK : blocks_for(len(sequence.tokens))].tolist()
            assert written.isdisjoint(ahead), "two requests would write the same block"
            written.update(ahead)
        for sequence in self.running:
            assert written.isdisjoint(sequence.table.blocks[: sequence.computed // BLOCK].tolist())

    @invariant()
    def nothing_is_lost(self) -> None:
        self.cache.check()
        assert bool(self.running) == (self.cache.usage > 0)


TestBlockCache = Machine.TestCase
TestBlockCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def held(cache: BlockCache, tokens: list[int], length: int | None = None) -> tuple[Table, int]:
    """A table with its tokens, or the first `length` of them, computed; and how many were there."""
    allocation = cache.allocate(tokens)
    assert allocation is not None
    cache.advance(allocation.table, length or len(tokens), lambda start, end: tokens[start:end])
    return allocation.table, allocation.reused


def text(*blocks: int, rest: int = 1) -> list[int]:
    return [token for block in blocks for token in [block] * BLOCK] + [9] * rest


def test_a_beginning_is_shared_while_it_is_in_use() -> None:
    cache = BlockCache(8, 4 * BLOCK)
    first, _ = held(cache, text(1, 2))
    second, reused = held(cache, text(1, 3))
    assert reused == BLOCK
    assert first.blocks[0] == second.blocks[0]
    assert first.blocks[1] != second.blocks[1]


def test_one_token_is_left_to_compute() -> None:
    cache = BlockCache(8, 4 * BLOCK)
    cache.free(held(cache, text(1, 2, rest=0))[0])
    assert held(cache, text(1, 2, rest=0))[1] == BLOCK


def test_generated_tokens_are_reused_and_uncomputed_ones_are_not() -> None:
    cache = BlockCache(8, 4 * BLOCK)
    table, _ = held(cache, [1] * 10)
    assert cache.grow(table, 2 * BLOCK)
    cache.advance(table, BLOCK + 5, lambda start, end: [1] * (end - start))
    cache.free(table)
    assert held(cache, [1] * (3 * BLOCK))[1] == BLOCK


def test_the_same_block_computed_twice_becomes_one() -> None:
    cache = BlockCache(8, 4 * BLOCK)
    tables = [allocation.table for _ in range(2) if (allocation := cache.allocate(text(1, 2)))]
    assert tables[0].blocks[0] != tables[1].blocks[0]
    for table in tables:
        cache.advance(table, 2 * BLOCK, lambda start, end: text(1, 2)[start:end])
    assert tables[0].blocks[:2].tolist() == tables[1].blocks[:2].tolist()
    assert cache.usage == 4 / 8


def test_the_least_recently_used_goes_first_and_leaves_before_parents() -> None:
    cache = BlockCache(6, 6 * BLOCK)
    for blocks in [(1, 2), (1, 3)]:
        cache.free(held(cache, text(*blocks))[0])  # kept: 1, 2, 3
    table, _ = held(cache, [8] * (4 * BLOCK - 1))  # takes the 3 free ones and evicts 2
    cache.free(table)
    assert [len(cache._find(text(*blocks))) for blocks in [(1, 2), (1, 3)]] == [1, 2]


def test_after_a_failure_only_what_others_hold_is_trusted() -> None:
    cache = BlockCache(8, 4 * BLOCK)
    other, _ = held(cache, text(1))
    failed, _ = held(cache, text(1, 2))
    cache.forget(failed)
    cache.free(failed)
    assert held(cache, text(1, 2))[1] == BLOCK
    cache.free(other)


def test_a_pool_smaller_than_the_context_limits_it() -> None:
    cache = BlockCache(2, 1000)
    assert cache.capacity == 2 * BLOCK
    (allocation,) = [cache.allocate([1] * (2 * BLOCK))]
    assert allocation is not None
    assert not cache.grow(allocation.table, 2 * BLOCK + 1)
