"""The slot allocator: nothing is lost, nothing is shared by accident, prefixes are found."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.kv_cache import KVCache

BLOCK = 4

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=20)
actions = st.lists(st.one_of(prompts, st.integers(0, 3)), max_size=40)


@given(actions)
def test_random_use_conserves_slots_and_reuses_only_equal_tokens(steps: list[list[int] | int]) -> None:
    cache = KVCache(3, 32, BLOCK)
    content: dict[int, list[int]] = {slot: [] for slot in range(3)}  # what an honest memory would hold
    owned: list[int] = []
    for step in steps:
        if isinstance(step, int):
            if owned:
                cache.free(owned.pop(step % len(owned)))
        elif (allocation := cache.allocate(step)) is None:
            assert len(owned) == 3
        else:
            slot, reused = allocation.slot, allocation.reused
            assert slot not in owned
            assert reused % BLOCK == 0
            assert reused < len(step)
            source = allocation.copy.source if allocation.copy else slot
            assert content[source][:reused] == step[:reused]
            content[slot] = list(step)
            owned.append(slot)
            cache.advance(slot, len(step), step)
        cache.check()


def test_a_common_prefix_is_copied_from_a_running_request() -> None:
    cache = KVCache(2, 32, BLOCK)
    prompt = list(range(10))
    first = cache.allocate(prompt)
    assert first is not None
    cache.advance(first.slot, 10, prompt)
    second = cache.allocate([*prompt[:9], 99])
    assert second is not None
    assert second.reused == 8
    assert second.copy is not None
    assert (second.copy.source, second.copy.length) == (first.slot, 8)


def test_reuse_in_place_keeps_one_token_to_compute() -> None:
    cache = KVCache(1, 32, BLOCK)
    prompt = list(range(8))
    first = cache.allocate(prompt)
    assert first is not None
    cache.advance(first.slot, 8, prompt)
    cache.free(first.slot)
    again = cache.allocate(prompt)
    assert again is not None
    assert (again.reused, again.copy) == (4, None)


def test_generated_tokens_and_unfinished_blocks_are_not_reused() -> None:
    cache = KVCache(1, 32, BLOCK)
    prompt = list(range(6))
    first = cache.allocate(prompt)
    assert first is not None
    cache.advance(first.slot, 6, prompt)
    cache.advance(first.slot, 12, prompt)
    cache.free(first.slot)
    again = cache.allocate([*prompt, *range(20)])
    assert again is not None
    assert again.reused == 4


def test_a_failed_slot_is_forgotten() -> None:
    cache = KVCache(1, 32, BLOCK)
    prompt = list(range(9))
    first = cache.allocate(prompt)
    assert first is not None
    cache.advance(first.slot, 9, prompt)
    cache.forget(first.slot)
    cache.free(first.slot)
    again = cache.allocate(prompt)
    assert again is not None
    assert again.reused == 0


def test_usage_counts_running_tokens_only() -> None:
    cache = KVCache(2, 10, BLOCK)
    first = cache.allocate([1, 2, 3])
    assert first is not None
    cache.advance(first.slot, 5, [1, 2, 3])
    assert cache.usage == 0.25
    cache.free(first.slot)
    assert cache.usage == 0
