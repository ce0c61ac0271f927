"""Scheduling over a fake runner: whatever happens around a request, its tokens are those it gets alone."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.block_cache import BLOCK
from serve.engine import Engine
from serve.errors import InvalidRequest
from serve.plan import Output, Plan
from serve.request import Request, SamplingParams, TokenLogprob
from serve.scheduler import LEAST_CHUNK, MOST_SCORED
from tests.serve.fake_runner import FakeRunner, GuessingRunner, make_engine
from tests.serve.tiny import ListChannel, ask, finish

VARIANTS: list[dict[str, Any]] = [
    {"temperature": 0, "ignore_eos": True},
    {"temperature": 0, "min_tokens": 9},
    {"temperature": 0.3, "seed": 1},
    {"temperature": 1.0, "seed": 2, "top_p": 0.9},
    {"temperature": 0.7, "seed": 3, "frequency_penalty": 0.3, "logprobs": 1},
    {"temperature": 0.5, "seed": 4, "top_k": 70, "stop": ("abc", "zz")},
    {"temperature": 0, "ignore_eos": True, "stop_token_ids": (5, 6)},
    {"temperature": 0.4, "seed": 5, "prompt_logprobs": 3},
]


@dataclass
class Visit:
    """A request, when it comes and, unless 0, how many steps later its client leaves."""

    prompt: list[int]
    params: SamplingParams
    embed: bool
    arrival: int
    patience: int

    def request(self) -> Request:
        return Request(id="r", prompt=list(self.prompt), params=self.params, channel=ListChannel(), embed=self.embed)


@st.composite
def visits(draw: st.DrawFn, capacity: int) -> Visit:
    """Prompts that repeat themselves, and that often begin alike."""
    beginning = [
        token for block in draw(st.lists(st.integers(1, 2), max_size=2)) for token in [block, 3] * (BLOCK // 2)
    ]
    rest = draw(st.lists(st.integers(1, 5), min_size=1, max_size=20)) * draw(st.integers(1, 4))
    prompt = (beginning + rest)[: capacity - 1]
    params = SamplingParams(max_tokens=draw(st.integers(0, 90)), **draw(st.sampled_from(VARIANTS)))
    params = replace(params, min_tokens=min(params.min_tokens, params.max_tokens))
    embed = draw(st.integers(0, 9)) == 0
    return Visit(prompt, params, embed, draw(st.integers(0, 40)), draw(st.sampled_from([0, 0, 0, 5, 30])))


def channel(request: Request) -> ListChannel:
    assert isinstance(request.channel, ListChannel)
    return request.channel


@st.composite
def scenes(draw: st.DrawFn) -> tuple[FakeRunner, Engine, list[Visit]]:
    num_blocks = draw(st.integers(2, 14))
    lean = draw(st.sampled_from([2.0, 5.0, 9.0]))
    mistakes = draw(st.sampled_from([None, 0, 2, 7]))
    runner = FakeRunner(num_blocks, lean=lean) if mistakes is None else GuessingRunner(num_blocks, mistakes, lean=lean)
    runner.failing = draw(st.sets(st.integers(0, 60), max_size=1))
    engine = make_engine(
        runner,
        slots=draw(st.integers(1, 6)),
        chunk=draw(st.sampled_from([1, 7, 64, 200])),
        sharing=draw(st.booleans()),
        speculate=draw(st.booleans()),
        per_token=draw(st.sampled_from([0.001, 0.05, 1.0])),
    )
    return runner, engine, draw(st.lists(visits(engine.scheduler.cache.capacity), min_size=1, max_size=9))


@given(scenes())
@settings(max_examples=40, deadline=None)
def test_a_request_gets_the_tokens_that_it_gets_alone(scene: tuple[FakeRunner, Engine, list[Visit]]) -> None:
    runner, engine, visits = scene
    requests = [visit.request() for visit in visits]
    time = 0
    while time <= 40 or not engine.idle:
        for visit, request in zip(visits, requests, strict=True):
            if visit.arrival == time:
                engine.submit(request)
            if visit.patience and visit.arrival + visit.patience == time:
                channel(request).closed = True
        engine.step()
        engine.scheduler.cache.check()
        time += 1
        assert time < 5000, "the engine does not come to an end"
    assert engine.scheduler.cache.usage == 0

    for visit, request in zip(visits, requests, strict=True):
        alone = visit.request()
        calm = FakeRunner(100, lean=runner.lean)
        finish(make_engine(calm, capacity=engine.scheduler.cache.capacity, speculate=False), alone)
        found, expected = channel(request), channel(alone)
        scores = [entry for chunk in found.chunks for entry in chunk.prompt_logprobs]
        assert scores == [] or found.chunks[0].prompt_logprobs == expected.chunks[0].prompt_logprobs == scores
        if request.finish_reason in ("abort", "error"):
            assert visit.patience or runner.failing
            assert found.tokens == expected.tokens[: len(found.tokens)]
            assert expected.text.startswith(found.text)
            continue
        assert request.finish_reason == alone.finish_reason
        assert (found.tokens, found.text) == (expected.tokens, expected.text)
        assert [c.logprobs for c in found.chunks if c.logprobs] == [c.logprobs for c in expected.chunks if c.logprobs]
        assert found.chunks[-1].embedding == expected.chunks[-1].embedding
        wanted = request.params.prompt_logprobs is not None and not request.embed
        assert len(scores) == wanted * len(visit.prompt)
        usage = found.chunks[-1].usage
        assert usage is not None
        assert (usage.prompt, usage.completion) == (len(visit.prompt), len(found.tokens))


def count(engine: Engine, name: str) -> float:
    return next(
        sample.value
        for family in engine.metrics.families.registry.collect()
        for sample in family.samples
        if sample.name == name
    )


def test_a_full_pool_puts_the_last_comer_back_and_it_goes_on() -> None:
    runner = FakeRunner(6)
    engine = make_engine(runner, speculate=False)
    requests = [ask([n] * 20, max_tokens=200, temperature=0.5, seed=n, ignore_eos=True) for n in (1, 2, 3)]
    engine.submit(*requests)
    while not engine.idle:
        engine.step()
        assert engine.scheduler.running == [r for r in requests if r in engine.scheduler.running], "order of arrival"
    assert count(engine, "vllm:num_preemptions_total") > 0
    assert [len(channel(r).tokens) for r in requests] == [200] * 3
    assert [r.usage.completion for r in requests] == [200] * 3
    assert count(engine, "vllm:prefix_cache_queries_total") == 60 == count(engine, "vllm:prompt_tokens_total")
    assert requests[0].last_token is not None
    assert all(r.last_token is not None and r.last_token > requests[0].last_token for r in requests[1:])


def test_a_preempted_embedding_starts_again() -> None:
    engine = make_engine(FakeRunner(6), chunk=1)
    running = ask([1] * 20, max_tokens=150, temperature=0.5, seed=1, ignore_eos=True)
    finish(engine, running, embedding := ask([2, 3] * 100, embed=True))
    finish(make_engine(FakeRunner(20)), alone := ask([2, 3] * 100, embed=True))
    assert count(engine, "vllm:num_preemptions_total") == 1
    assert channel(embedding).chunks[-1].embedding == channel(alone).chunks[-1].embedding


def test_drafts_take_no_place_that_is_not_there() -> None:
    """Both reach the end of their first block, and there is one more for the two of them."""
    prompts = [[n, 2, 3, 4, 5, 6] * 6 for n in (7, 8)]
    tokens = [
        finish(engine, *[ask(prompt, max_tokens=60, temperature=0, ignore_eos=True) for prompt in prompts])
        for engine in (make_engine(FakeRunner(3, lean=20.0)), make_engine(FakeRunner(20, lean=20.0), speculate=False))
    ]
    assert tokens[0] == tokens[1]


def test_a_request_that_can_never_fit_is_refused() -> None:
    engine = make_engine(FakeRunner(2))
    with pytest.raises(InvalidRequest, match=r"128 tokens and a request can have 128.*--kv-budget-mib"):
        engine.submit(ask([1] * 128))
    finish(engine, ask([1] * 127, max_tokens=5))


def test_drafts_save_steps_and_change_nothing() -> None:
    prompt = [1, 2, 3, 4, 5, 6] * 5
    tokens, steps = [], []
    for speculate in (False, True):
        runner = FakeRunner(20, lean=20.0)
        engine = make_engine(runner, speculate=speculate)
        tokens += finish(engine, ask(prompt, max_tokens=60, temperature=0.2, seed=1, ignore_eos=True))
        steps.append(len(runner.sizes))
    assert tokens[0] == tokens[1]
    assert steps[0] == 60
    assert steps[1] < 15
    drafted, accepted = (count(engine, f"vllm:spec_decode_num_{kind}_tokens_total") for kind in ("draft", "accepted"))
    assert accepted == 60 - steps[1]
    assert drafted >= accepted


def test_a_client_that_leaves_amid_accepted_drafts_gets_no_more() -> None:
    engine = make_engine(FakeRunner(20, lean=20.0))
    request = ask([1, 2, 3, 4, 5, 6] * 5, max_tokens=60, temperature=0, ignore_eos=True)

    class Leaves(ListChannel):
        @property
        def closed(self) -> bool:  # type: ignore[override]
            return len(request.output) >= 12

        @closed.setter
        def closed(self, value: bool) -> None: ...

    request.channel = Leaves()
    finish(engine, request)
    assert request.finish_reason == "abort"
    assert len(request.output) == len(channel(request).tokens) == 12


def test_drafts_that_fail_are_given_up() -> None:
    """Repetitive prompts, but a model that never does what they foretell."""
    runner = FakeRunner(20, lean=-20.0)
    engine = make_engine(runner, per_token=0.2)
    finish(engine, ask([1, 2] * 20, max_tokens=200, temperature=1, seed=1, ignore_eos=True))
    assert count(engine, "vllm:spec_decode_num_draft_tokens_total") < 30


def test_prompts_leave_running_requests_their_pace() -> None:
    """A step may take twice as long as without prompts: at 1 + 0.0199 per token, 51 more tokens beside one row."""
    runner = FakeRunner(20)
    engine = make_engine(runner, chunk=128, speculate=False, per_token=0.0199)
    finish(engine, ask([7] * 30, max_tokens=2, temperature=0))  # shows what steps cost
    engine.submit(ask([1, 2], max_tokens=30, temperature=0, ignore_eos=True))
    engine.step()
    runner.sizes.clear()
    late = ask([3] * 200, max_tokens=2, temperature=0)
    engine.submit(late)
    while late.prefilling:
        engine.step()
    assert runner.sizes == [52, 52, 52, 1 + 200 - 3 * 51]


def scored(prompt: list[int], top: int = 1, max_tokens: int = 0) -> Request:
    return ask(prompt, max_tokens=max_tokens, prompt_logprobs=top, temperature=0, ignore_eos=True)


def test_prompts_whose_logits_are_wanted_leave_running_requests_their_pace() -> None:
    """Their tokens cost twice as much, which is guessed at first and then learned: 25 of them beside one row."""
    runner = FakeRunner(20)
    engine = make_engine(runner, chunk=128, speculate=False, per_token=0.0199)
    finish(engine, ask([7] * 30, max_tokens=2, temperature=0))
    running = ask([1, 2], max_tokens=60, temperature=0, ignore_eos=True)
    engine.submit(running)
    engine.step()
    runner.sizes.clear()
    for late in (scored([3] * 100), ask([4] * 100, max_tokens=1, temperature=0), scored([5] * 100)):
        engine.submit(late)
        while late.prefilling:
            engine.step()
    assert runner.sizes == [26, 26, 26, 26, 52, 50, 26, 26, 26, 26]


def test_a_step_wants_a_bounded_number_of_rows() -> None:
    runner = FakeRunner(60)
    engine = make_engine(runner, chunk=500, capacity=16 * BLOCK)
    plain, *others = [ask([9] * 300, max_tokens=1, temperature=0), *[scored([n] * 300) for n in (1, 2, 3)]]
    rows: list[int] = []
    run = runner.run

    def counting(plan: Plan) -> Output:
        rows.append(len(plan.wanted))
        return run(plan)

    runner.run = counting  # type: ignore[method-assign]
    finish(engine, others[0], plain, *others[1:])
    assert max(rows) == MOST_SCORED
    assert sum(rows) == 3 * 299 + 1
    assert runner.sizes[0] == MOST_SCORED


def test_a_scored_prompt_reuses_nothing_but_is_reused() -> None:
    runner = FakeRunner(20)
    engine = make_engine(runner)
    first = scored([1, 2] * 50)
    finish(engine, first)
    again = scored([1, 2] * 50, max_tokens=1)
    finish(engine, again)
    plain = ask([1, 2] * 50, max_tokens=1, temperature=0)
    finish(engine, plain)
    assert [r.cached for r in (first, again, plain)] == [0, 0, BLOCK]
    assert first.prompt_logprobs == again.prompt_logprobs
    assert channel(again).tokens == channel(plain).tokens
    usage = channel(first).chunks[-1].usage
    assert usage is not None
    assert (usage.prompt, usage.completion, first.finish_reason) == (100, 0, "length")


def test_a_preempted_request_keeps_its_scores_or_starts_again() -> None:
    """The pool runs dry while the last comer is scored, and again while it decodes."""
    for chunk, length, max_tokens in ((1, 200, 0), (128, 70, 180)):
        engine = make_engine(FakeRunner(6), chunk=chunk, speculate=False)
        running = ask([1] * 20, max_tokens=200, temperature=0.5, seed=1, ignore_eos=True)
        prompt = [2, 3] * (length // 2)
        finish(engine, running, request := scored(prompt, 3, max_tokens))
        finish(make_engine(FakeRunner(20)), alone := scored(prompt, 3, max_tokens))
        assert count(engine, "vllm:num_preemptions_total") == 1
        assert channel(request).chunks[0].prompt_logprobs == channel(alone).chunks[0].prompt_logprobs
        assert len(request.prompt_logprobs) == length
        assert channel(request).tokens == channel(alone).tokens


def test_a_prompt_alone_may_fill_the_context() -> None:
    engine = make_engine(FakeRunner(2))
    finish(engine, request := scored([1] * 128), single := scored([4]))
    assert len(channel(request).chunks[0].prompt_logprobs) == 128
    assert channel(single).chunks[0].prompt_logprobs == [TokenLogprob(4, None)]
    with pytest.raises(InvalidRequest, match="128 tokens and a request can have 128"):
        engine.submit(scored([1] * 128, max_tokens=1))
    assert count(engine, "vllm:generation_tokens_total") == 0
    assert count(engine, "vllm:prompt_tokens_total") == 129 == count(engine, "vllm:prefix_cache_queries_total")


def test_alone_a_prompt_gets_whole_chunks_and_several_share_one() -> None:
    runner = FakeRunner(20)
    engine = make_engine(runner, chunk=128)
    finish(engine, *[ask([n] * 60, max_tokens=1, temperature=0) for n in (1, 2, 3)])
    assert runner.sizes == [128, 52]


def test_before_anything_is_known_prompts_advance_by_little() -> None:
    runner = FakeRunner(20)
    engine = make_engine(runner, speculate=False)
    engine.submit(ask([1], max_tokens=30, temperature=0, ignore_eos=True))
    engine.step()
    engine.submit(ask([2] * 100, max_tokens=1, temperature=0))
    engine.step()
    assert runner.sizes == [1, 1 + LEAST_CHUNK]


def test_a_shared_beginning_is_computed_once() -> None:
    runner = FakeRunner(20)
    engine = make_engine(runner)
    first = ask([1, 2] * 40, max_tokens=60, temperature=0, ignore_eos=True)
    (tokens,) = finish(engine, first)
    runner.sizes.clear()
    turn = ask([*first.prompt, *tokens, 3], max_tokens=1, temperature=0)  # a conversation goes on
    finish(engine, turn)
    assert turn.cached == 2 * BLOCK
    assert runner.sizes == [len(turn.prompt) - 2 * BLOCK]


# -- a runner that guesses ------------------------------------------------------------------------------------------


def test_a_run_begins_before_the_one_before_is_read() -> None:
    runner = GuessingRunner(20)
    engine = make_engine(runner)
    request = ask([1, 2, 3], max_tokens=4, temperature=0.8, seed=2, ignore_eos=True)
    engine.submit(request)
    told = []
    while not engine.idle:
        engine.step()
        told.append((len(runner.sizes), len(channel(request).tokens)))
    assert told == [(1, 0), (2, 1), (3, 2), (4, 3), (4, 4)], "no run too many, where the end is foreseen"


@pytest.mark.parametrize(("mistakes", "runs"), [(0, 60), (1, 119)])
def test_a_wrong_guess_costs_its_request_a_run(mistakes: int, runs: int) -> None:
    runner = GuessingRunner(20, mistakes)
    finish(make_engine(runner), ask([1, 2, 3], max_tokens=60, temperature=0, ignore_eos=True))
    assert len(runner.sizes) == runs


def test_a_stop_that_was_not_foreseen_costs_one_row_and_its_place_is_used_again() -> None:
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    calm = ask([4, 5], **params)
    finish(make_engine(FakeRunner(20)), calm)
    stop = calm.output[5]
    first, second = (ask([4, 5], **params, stop_token_ids=(stop,)) for _ in range(2))
    runner = GuessingRunner(4)
    engine = make_engine(runner, slots=1)
    for request in (first, second):
        finish(engine, request)
        assert request.output == calm.output[: calm.output.index(stop) + 1]
    assert len(runner.sizes) == 2 * (len(first.output) + 1)


def test_what_is_in_the_air_is_landed_before_the_engine_goes() -> None:
    runner = GuessingRunner(20)
    engine = make_engine(runner)
    request = ask([4, 5], max_tokens=100, ignore_eos=True)
    engine.submit(request)
    for _ in range(3):
        engine.step()
    assert not engine.idle
    engine._abort_all()
    assert (request.finish_reason, len(request.output)) == ("abort", 3)
    assert engine.idle


def test_an_engine_that_has_drained_is_gone_at_once() -> None:
    """And with it its KV cache, which may be most of the memory: no cycle keeps it until garbage is collected."""
    gc.disable()
    try:
        for runner in (FakeRunner(20), GuessingRunner(20)):
            engine = make_engine(runner)
            engine.start()
            engine.submit(ask([4, 5], max_tokens=10))
            assert engine.drain(30)
            left = weakref.ref(engine)
            del engine
            assert left() is None
    finally:
        gc.enable()


def test_a_run_that_fails_late_ends_what_was_begun_behind_it() -> None:
    runner = GuessingRunner(20)
    runner.failing = {1}
    engine = make_engine(runner)
    first, second = ask([4, 5], max_tokens=20, ignore_eos=True), ask([6, 7], max_tokens=20, ignore_eos=True)
    engine.submit(first)
    engine.step()
    engine.step()  # the run that will fail is in the air
    engine.submit(second)
    finish(engine)
    assert (first.finish_reason, second.finish_reason) == ("error", "error")
    assert finish(engine, ask([6, 7], max_tokens=3, ignore_eos=True))[0]
