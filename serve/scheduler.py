"""Policy: which requests wait, which run, and what the next run of the model computes. Holds no arrays.

One step takes every decoding request (one token each) and prompt chunks up to a token budget. Prompts are cut at
fixed multiples of `prefill_chunk` from their start, whatever the load: attention is computed in floating point, so
only fixed cuts give a request the same bits alone and in company.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from serve.kv_cache import Allocation, KVCache
from serve.plan import Plan
from serve.request import Request


@dataclass(slots=True)
class Step:
    """A plan and, aligned with its segments, the requests it is for."""

    plan: Plan = field(default_factory=Plan)
    requests: list[Request] = field(default_factory=list)


class Scheduler:
    """First come, first served. Not thread-safe: the engine thread owns it."""

    def __init__(self, cache: KVCache, *, prefill_chunk: int, max_queue: int) -> None:
        self.cache = cache
        self.prefill_chunk = prefill_chunk
        self.max_queue = max_queue
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def schedule(self, now: float) -> Step:
        """Plan the next run: admit what fits, then every decode row, then prompt chunks up to the budget."""
        step = Step()
        self._admit(step.plan, now)
        for request in self.running:
            if not request.prefilling:
                assert request.slot is not None
                step.plan.add(request.slot, request.computed, request.output[-1:])
                step.requests.append(request)
        budget = self.prefill_chunk
        for request in self.running:
            if budget <= 0:
                break
            if request.prefilling:
                budget -= self._add_chunk(step, request)
        return step

    def advance(self, step: Step) -> None:
        """Record that the step's tokens are in the cache."""
        for request, segment in zip(step.requests, step.plan.segments, strict=True):
            request.computed = segment.past + segment.count
            self.cache.advance(segment.slot, request.computed, request.prompt)

    def remove(self, request: Request) -> None:
        """Take a request out, whatever its state, and free its slot."""
        if request.slot is None:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        self.cache.free(request.slot)
        request.slot = None

    def requests(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    def _admit(self, plan: Plan, now: float) -> None:
        while self.waiting and (allocation := self._allocate(self.waiting[0])):
            request = self.waiting.popleft()
            request.slot = allocation.slot
            request.cached = request.computed = allocation.reused
            request.first_scheduled = now
            if allocation.copy:
                plan.copies.append(allocation.copy)
            self.running.append(request)

    def _allocate(self, request: Request) -> Allocation | None:
        # The mean of all hidden states needs every position computed: an embedding reuses nothing.
        return self.cache.allocate([] if request.embed else request.prompt)

    def _add_chunk(self, step: Step, request: Request) -> int:
        assert request.slot is not None
        past = request.computed
        end = min((past // self.prefill_chunk + 1) * self.prefill_chunk, len(request.prompt))
        want = "all" if request.embed else "last" if end == len(request.prompt) else "none"
        step.plan.add(request.slot, past, request.prompt[past:end], want=want)
        step.requests.append(request)
        return end - past
