"""The slot allocator: nothing is lost, nothing is shared by accident, prefixes are found."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.cache import Span, Table
from serve.slot_cache import SlotCache

BLOCK = 4


def span(tokens: list[int]) -> Span:
    return lambda start, end: tokens[start:end]


def slot_of(table: Table) -> int:
    return int(table.blocks[0])


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=20)
actions = st.lists(st.one_of(prompts, st.integers(0, 3)), max_size=40)


@given(actions)
def test_random_use_conserves_slots_and_reuses_only_equal_tokens(steps: list[list[int] | int]) -> None:
    cache = SlotCache(3, 32, BLOCK)
    content: dict[int, list[int]] = {slot: [] for slot in range(3)}  # what an honest memory would hold
    owned: list[Table] = []
    for step in steps:
        if isinstance(step, int):
            if owned:
                cache.free(owned.pop(step % len(owned)))
        elif (allocation := cache.allocate(step)) is None:
            assert len(owned) == 3
        else:
            slot, reused = slot_of(allocation.table), allocation.reused
            assert slot not in map(slot_of, owned)
            assert reused % BLOCK == 0
            assert reused < len(step)
            source = allocation.copy.source if allocation.copy else slot
            assert content[source][:reused] == step[:reused]
            content[slot] = list(step)
            owned.append(allocation.table)
            cache.advance(allocation.table, len(step), span(step))
        cache.check()


def test_a_common_prefix_is_copied_from_a_running_request() -> None:
    cache = SlotCache(2, 32, BLOCK)
    prompt = list(range(10))
    first = cache.allocate(prompt)
    assert first is not None
    cache.advance(first.table, 10, span(prompt))
    second = cache.allocate([*prompt[:9], 99])
    assert second is not None
    assert second.reused == 8
    assert second.copy is not None
    assert (second.copy.source, second.copy.length) == (slot_of(first.table), 8)


def test_reuse_in_place_keeps_one_token_to_compute() -> None:
    cache = SlotCache(1, 32, BLOCK)
    prompt = list(range(8))
    first = cache.allocate(prompt)
    assert first is not None
    cache.advance(first.table, 8, span(prompt))
    cache.free(first.table)
    again = cache.allocate(prompt)
    assert again is not None
    assert (again.reused, again.copy) == (4, None)


def test_generated_tokens_and_unfinished_blocks_are_not_reused() -> None:
    cache = SlotCache(1, 32, BLOCK)
    prompt = list(range(6))
    first = cache.allocate(prompt)
    assert first is not None
    cache.advance(first.table, 6, span(prompt))
    cache.advance(first.table, 12, span(prompt))
    cache.free(first.table)
    again = cache.allocate([*prompt, *range(20)])
    assert again is not None
    assert again.reused == 4


def test_a_failed_slot_is_forgotten() -> None:
    cache = SlotCache(1, 32, BLOCK)
    prompt = list(range(9))
    first = cache.allocate(prompt)
    assert first is not None
    cache.advance(first.table, 9, span(prompt))
    cache.forget(first.table)
    cache.free(first.table)
    again = cache.allocate(prompt)
    assert again is not None
    assert again.reused == 0


def test_usage_counts_running_tokens_only() -> None:
    cache = SlotCache(2, 10, BLOCK)
    first = cache.allocate([1, 2, 3])
    assert first is not None
    cache.advance(first.table, 5, span([1, 2, 3]))
    assert cache.usage == 0.25
    cache.free(first.table)
    assert cache.usage == 0
