"""Policy: which requests wait, which run, and what the next run of the model computes. Holds no arrays.

A request is tokens, of which the first `computed` are in the cache. Each step computes the next ones of every running
request: the last token of those that decode, with drafts behind it where they pay, then chunks of prompts, first come
first served, up to a token budget. While others decode, the budget also keeps the step at most `itl_limit` times as
long as without prompts. Prompts whose tokens' log-probabilities are wanted cost more, so a step has either chunks of
such or of the others, as the first in line is.

Where the runner guesses (`ahead`), a step is made while the one before still runs: a request whose token is awaited
goes on behind the guess, and `settle` counts that once the token has come and is as guessed.

Where a token's bits depend on how its prompt was cut (the stock graph), chunks end at fixed multiples of
`prefill_chunk`, whatever the load, and nothing is drafted, so that a request gets the same bits alone and in company.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from serve.cache import Cache, Table
from serve.plan import Plan, Segment
from serve.request import Request
from serve.speculation import Speculation
from serve.step_cost import StepCost

LEAST_CHUNK = 4  # prompt tokens a step, however long that takes: prompts always progress
MOST_SCORED = 128  # prompt tokens a step whose logits are wanted: a row of them is large


@dataclass(slots=True)
class Step:
    """A plan and, aligned with its segments, the requests it is for."""

    plan: Plan = field(default_factory=Plan)
    requests: list[Request] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)  # theirs, then
    admitted: list[Request] = field(default_factory=list)  # for the first time
    num_preempted: int = 0
    num_prompt_tokens: int = 0
    scored: bool = False  # the logits of these tokens are wanted
    ahead: dict[Request, int] = field(default_factory=dict)  # those that follow a guess, and their flat positions

    def add(self, request: Request) -> None:
        assert request.table is not None
        self.requests.append(request)
        self.tables.append(request.table)
        if request.awaited is not None:
            self.ahead[request] = len(self.plan.tokens) - 1

    def results(self) -> Iterator[tuple[Request, Segment, bool]]:
        """Requests, segments and whether they count: no wrong guess was followed, and the request still runs on it."""
        for request, table, segment in zip(self.requests, self.tables, self.plan.segments, strict=True):
            right = segment.follows is None or request in self.ahead
            yield request, segment, right and request.table is table


class Scheduler:
    """First come, first served. Not thread-safe: the engine thread owns it."""

    def __init__(
        self,
        cache: Cache,
        *,
        max_running: int,
        max_queue: int,
        prefill_chunk: int,
        any_chunking: bool,
        itl_limit: float,
        speculate: bool,
        ahead: bool = False,
    ) -> None:
        self.cache = cache
        self.max_running = max_running
        self.max_queue = max_queue
        self.prefill_chunk = prefill_chunk
        self.any_chunking = any_chunking
        self.itl_limit = itl_limit
        self.speculate = speculate and any_chunking and not ahead
        self.ahead = ahead
        self.cost = StepCost()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def room(self) -> int:
        """Requests that may still come: places in the queue and beside those that run."""
        return self.max_queue + self.max_running - len(self.running) - len(self.waiting)

    def schedule(self, now: float) -> Step:
        """Plan the next run: admit what fits, then every decode row, then prompt chunks up to the budget."""
        step = Step()
        self._admit(step, now)
        decoding = self._make_room(step)
        prompts = [request for request in self.running if request.num_pending and not request.decoding]
        step.scored = bool(prompts) and prompts[0].scoring
        budget = self._budget(len(decoding), step.scored)
        self._add_rows(step, decoding, budget - sum(request.num_pending for request in prompts))
        for request in prompts:
            if budget <= 0:
                break
            if request.scoring == step.scored:
                budget -= self._add_chunk(step, request, budget)
        return step

    def _budget(self, num_decoding: int, scored: bool) -> int:
        """How many prompt tokens a step may have. Where bits depend on the cuts, that alone says where to cut."""
        if not self.any_chunking:
            return self.prefill_chunk
        budget = min(self.prefill_chunk, MOST_SCORED) if scored else self.prefill_chunk
        if num_decoding:
            budget = min(budget, max(self.cost.tokens_within(self.itl_limit, num_decoding, scored), LEAST_CHUNK))
        return budget

    def advance(self, step: Step) -> None:
        """Record that the step's tokens are in the cache. Of drafts, and behind guesses, that is not known yet."""
        for request, segment in zip(step.requests, step.plan.segments, strict=True):
            if request in step.ahead:
                continue
            assert request.table is not None
            if self.ahead and request.generates and segment.past + segment.count == request.length:
                request.awaited = segment.start + segment.count - 1
            request.computed = min(segment.past + segment.count, request.length)
            self.cache.advance(request.table, request.computed, request.span)

    def settle(self, request: Request, later: Step | None, *, guessed: bool) -> None:
        """The awaited token has come; `guessed`: the `later` step, if it goes on behind it, does so rightly."""
        request.awaited = None
        if later is None or request not in later.ahead:
            return
        if not guessed:
            del later.ahead[request]
        elif request.table is not None:
            request.awaited = later.ahead[request]
            request.computed += 1
            self.cache.advance(request.table, request.computed, request.span)

    def remove(self, request: Request) -> None:
        """Take a request out, whatever its state, and free what it holds."""
        if request.table is None:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        self.cache.free(request.table)
        request.table = None

    def requests(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    def _admit(self, step: Step, now: float) -> None:
        while self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            # What needs every position of the prompt computed reuses nothing.
            reuse = not (request.embed or request.scoring)
            allocation = self.cache.allocate(request.span(0, request.length), reuse=reuse)
            if allocation is None:
                break
            self.waiting.popleft()
            request.table = allocation.table
            request.computed = allocation.reused
            if allocation.copy:
                step.plan.copies.append(allocation.copy)
            if request.first_scheduled is None:
                request.first_scheduled = now
                request.cached = allocation.reused
                step.admitted.append(request)
                if self.speculate and not request.embed:
                    request.speculation = Speculation()
            self.running.append(request)

    def _make_room(self, step: Step) -> list[Request]:
        """The requests that decode, each with room for one more token. The last admitted ones go back for it."""
        decoding: list[Request] = []
        for request in list(self.running):
            length = request.length + request.continues
            if request.table is None or not (request.decoding or request.continues) or length > self.cache.capacity:
                continue  # preempted a moment ago, or its room was taken at admission
            while request.table is not None and not self.cache.grow(request.table, length):
                self._preempt(self.running[-1])
                step.num_preempted += 1
            if request.table is not None:
                decoding.append(request)
        return decoding

    def _preempt(self, request: Request) -> None:
        """Back to the front of the queue. What it computed stays reusable as long as nobody needs the place."""
        self.remove(request)
        request.awaited = None
        request.computed = 0
        request.forget_sums()
        self.waiting.appendleft(request)

    def _add_rows(self, step: Step, decoding: list[Request], spare: int) -> None:
        """A row for each request that decodes; drafts behind it as long as they pay and `spare` tokens last."""
        price = self.cost.price(len(decoding)) if spare > 0 and self.speculate else 0.0
        for request in decoding:
            assert request.table is not None
            drafts: list[int] = []
            if spare > 0 and request.speculation is not None:
                drafts = self._draft(request, spare, price)
                spare -= len(drafts)
            step.plan.add(
                request.table.blocks,
                request.computed,
                [request.output[-1] if request.awaited is None else 0, *drafts],
                want="all" if drafts else "last",
                temperature=request.temperature,
                follows=request.awaited,
            )
            step.add(request)

    def _draft(self, request: Request, spare: int, price: float) -> list[int]:
        speculation, length = request.speculation, request.length
        assert speculation is not None
        assert request.table is not None
        speculation.extend(request.span(speculation.length, length))
        room = min(request.params.max_tokens - len(request.output), self.cache.capacity - length)
        drafts = speculation.draft(min(spare, room - 1), price)
        return drafts if self.cache.grow(request.table, length + len(drafts)) else []

    def _add_chunk(self, step: Step, request: Request, budget: int) -> int:
        """Add the request's next chunk and return its tokens."""
        assert request.table is not None
        past = request.computed
        count = budget if self.any_chunking else self.prefill_chunk - past % self.prefill_chunk
        end = min(past + count, request.length)
        step.plan.add(
            request.table.blocks,
            past,
            request.span(past, end),
            want="hidden" if request.embed else "last" if end == request.length and request.generates else "none",
            temperature=request.temperature,
            scored=min(end, len(request.prompt) - 1) - past if request.scoring else 0,
        )
        step.add(request)
        step.num_prompt_tokens += end - past
        return end - past
