"""A runner without a model, whose cache is the tokens themselves: whatever is wrong with a plan shows in its logits.

Each block remembers which token was written at which position. A position's logits depend on every token that it sees
through its block table, so a wrong table, a stale block or a wrong `past` gives other tokens. They lean towards what
followed the last occurrence of the latest two tokens, so that drafts are right now and then.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from serve.block_cache import BLOCK, BlockCache
from serve.cache import Allocation
from serve.choices import Block, Choices
from serve.engine import Engine
from serve.metrics import Metrics
from serve.plan import Floats, Output, Plan, Runner
from serve.request import SamplingParams
from serve.sampler import Sampler, draw
from serve.scheduler import Scheduler
from serve.step_cost import StepCost
from tests.serve.fakes import manifest
from tests.serve.tiny import deliver

EOS = 0
HIDDEN = 3
CANDIDATES = 64


class FakeRunner(Runner):
    any_chunking = True
    kv_bytes = 0

    def __init__(self, num_blocks: int, vocab_size: int = 100, lean: float = 4.0) -> None:
        self.cache = np.full((num_blocks, BLOCK), -1, np.int64)
        self.vocab_size = vocab_size
        self.lean = lean
        self.sizes: list[int] = []  # tokens of each run
        self.failing: set[int] = set()  # numbers of the runs that fail, half done

    def run(self, plan: Plan) -> Output:
        number = len(self.sizes)
        self.sizes.append(len(plan.tokens))
        contexts = self._write(plan)
        if number in self.failing:
            raise RuntimeError("out of order")
        logits = np.array([self._logits(contexts[at]) for at in plan.wanted], np.float32).reshape(-1, self.vocab_size)
        hidden = np.array([self._random(contexts[at]).random(HIDDEN) for at in plan.hidden]).reshape(-1, HIDDEN)
        shifted = logits - logits.max(axis=1, keepdims=True, initial=-np.inf)
        temperatures = np.array([t or 1.0 for t in plan.temperatures], np.float32)
        total = np.exp(shifted / temperatures[:, None]).sum(axis=1)
        candidates = np.argsort(-logits, axis=1, kind="stable")[:, :CANDIDATES].astype(np.int32)
        rows = range(len(plan.wanted))
        return Output(logits, hidden.astype(np.float32), rows, candidates, total)

    def _write(self, plan: Plan) -> list[list[int]]:
        """Write the plan's tokens; what each of them sees, itself included."""
        written: set[tuple[int, int]] = set()
        reads: list[set[int]] = []
        for segment in plan.segments:
            for i in range(segment.count):
                place = divmod(segment.past + i, BLOCK)
                at = int(segment.blocks[place[0]]), place[1]
                assert at not in written, "two tokens in one place"
                written.add(at)
                self.cache[at] = plan.tokens[segment.start + i]
            reads.append({int(block) for block in segment.blocks[: segment.past // BLOCK]})
        assert all(seen.isdisjoint(block for block, _ in written) for seen in reads), "a full block was written to"
        contexts = []
        for segment in plan.segments:
            blocks = np.asarray(segment.blocks)[: -(-(segment.past + segment.count) // BLOCK)]
            seen = self.cache[blocks].ravel().tolist()
            contexts += [seen[: segment.past + i + 1] for i in range(segment.count)]
        assert len(contexts) == len(plan.tokens)
        return contexts

    @staticmethod
    def _random(context: list[int]) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(np.array(context).tobytes()))

    def _logits(self, context: list[int]) -> Floats:
        assert min(context) >= 0, "a position that was never written"
        logits = self._random(context).standard_normal(self.vocab_size).astype(np.float32)
        for at in range(len(context) - 2, 1, -1):
            if context[at - 2 : at] == context[-2:]:
                logits[context[at]] += self.lean
                break
        return logits


class GuessingRunner(FakeRunner):
    """Guesses rightly or not, by turns that `mistakes` says: one guess in so many is wrong, 0 none.

    Its results come when they are asked for, are lost with the launch after the next, and a run's failure shows late.
    """

    guesses = True

    def __init__(self, num_blocks: int, mistakes: int = 0, **options: Any) -> None:
        super().__init__(num_blocks, **options)
        self.mistakes = mistakes
        self.num_guesses = 0
        self.guessed: dict[int, int] = {}  # of the latest plan: flat position -> token
        self.results: list[Output] = []  # of the latest two plans

    def launch(self, plan: Plan) -> Callable[[], Output]:
        for segment in plan.segments:
            if segment.follows is not None:
                plan.tokens[segment.start] = self.guessed[segment.follows]
        self.guessed = {}
        try:
            output = self.run(plan)
        except RuntimeError as error:
            self.guessed = dict.fromkeys(plan.wanted, 0)
            failure = error

            def fail() -> Output:
                raise failure

            return fail
        for row, at in enumerate(plan.wanted):
            self.guessed[at] = self._guess(output, plan, row)
        guesses = np.array([self.guessed[at] for at in plan.wanted], np.int32)
        found = replace(output, guesses=guesses)
        self.results.append(found)
        for lost in self.results[:-2]:
            for array in (lost.logits, lost.candidates, lost.guesses):
                array[...] = -1  # type: ignore[index]
        self.results = self.results[-2:]
        return lambda: found

    def _guess(self, output: Output, plan: Plan, row: int) -> int:
        self.num_guesses += 1
        if self.mistakes and self.num_guesses % self.mistakes == 0:
            return self.num_guesses % self.vocab_size
        params = SamplingParams(temperature=plan.temperatures[row] or 1.0, top_p=plan.top_ps[row])
        sampler = Sampler(params, [], self.vocab_size, ())
        sampler.share = lambda num_output: plan.shares[row]  # type: ignore[method-assign]
        return draw(output, [row], [sampler], [0])[0]


class Letters:
    """A tokenizer that spells each token with one letter."""

    def decode_stream(self, prompt: list[int]) -> Letters:
        return self

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id % 26)


class PrivateCache(BlockCache):
    """Shares nothing."""

    def allocate(self, tokens: Any, *, reuse: bool = True) -> Allocation | None:
        return super().allocate(tokens, reuse=False)


class KnownCost(StepCost):
    """Steps take as long as they are told to, so that a test plays out the same each time."""

    def __init__(self, per_token: float) -> None:
        super().__init__()
        self.step_per_token = per_token  # in fixed parts of a step

    def observe(self, tokens: int, seconds: float, prompt_tokens: int = 0, scored: bool = False) -> None:
        tokens_and_heads = tokens + scored * prompt_tokens  # a prompt's token costs twice as much if it is scored
        super().observe(tokens, 1 + self.step_per_token * tokens_and_heads, prompt_tokens, scored)


def make_engine(
    runner: FakeRunner,
    *,
    capacity: int = 4 * BLOCK,
    slots: int = 8,
    chunk: int = 128,
    sharing: bool = True,
    speculate: bool = True,
    per_token: float = 0.02,
) -> Engine:
    """An engine over `runner`, whose steps cost 1 + `per_token` * tokens."""
    cache = (BlockCache if sharing else PrivateCache)(len(runner.cache), capacity)
    scheduler = Scheduler(
        cache,
        max_running=slots,
        max_queue=1000,
        prefill_chunk=chunk,
        any_chunking=runner.any_chunking,
        itl_limit=2.0,
        speculate=speculate,
        ahead=runner.guesses,
    )
    scheduler.cost = KnownCost(per_token)
    tokenizer: Any = Letters()
    choices = Choices(1, "", capacity, slots, "", Block(BLOCK, 0, "int8"), len(runner.cache))
    return Engine(
        runner,
        scheduler,
        tokenizer,
        Metrics("fake").engine(manifest(), choices),
        deliver,
        eos_token_ids=(EOS,),
        vocab_size=runner.vocab_size,
        request_timeout_seconds=600,
    )
