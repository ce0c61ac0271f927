"""The engine over a real graph: the same tokens in any company, and every way for a request to end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from proto.records import new_id
from serve.engine import Engine
from serve.errors import Draining, Overloaded, TimedOut
from serve.plan import Output, Plan, Runner
from serve.request import WATCHED_ONE_IN, Request, SamplingParams
from tests.serve.tiny import CAPACITY, CHUNK, SLOTS, ListChannel, ask, finish

MakeEngine = Callable[..., Engine]

VARIANTS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.3, "top_k": 20, "seed": 4},
    {"temperature": 1, "top_p": 0.8, "seed": 5, "logprobs": 2},
    {"temperature": 0, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    {"temperature": 1, "min_p": 0.1, "seed": 6, "logit_bias": ((7, 2.0),)},
]


def crowd(seed: int = 0, size: int = 32) -> list[Request]:
    """Requests of many lengths and ways of sampling; some share the beginning of their prompt."""
    random = np.random.default_rng(seed)
    common = random.integers(2, 500, 40).tolist()
    requests = []
    for i in range(size):
        prompt = random.integers(2, 500, int(random.integers(1, 70))).tolist()
        prompt = common + prompt if i % 3 == 0 else prompt
        requests.append(ask(prompt, max_tokens=int(random.integers(1, 24)), ignore_eos=True, **VARIANTS[i % 6]))
    return requests


def test_the_same_tokens_alone_and_among_31_others(make_engine: MakeEngine) -> None:
    together = finish(make_engine(), *crowd())
    engine = make_engine()
    alone = [finish(engine, request)[0] for request in crowd()]
    fresh = [finish(make_engine(), request)[0] for request in crowd()[:8]]
    assert together == alone
    assert fresh == alone[:8]


def test_arrivals_at_any_time_change_nothing(make_engine: MakeEngine) -> None:
    expected = finish(make_engine(), *crowd(1))
    engine, requests = make_engine(), crowd(1)
    random = np.random.default_rng(2)
    waiting = list(requests)
    while waiting or not engine.idle:
        for _ in range(int(random.integers(0, 3))):
            if waiting:
                engine.submit(waiting.pop(0))
        if not engine.idle:
            engine.step()
    assert [request.channel.tokens for request in requests] == expected  # type: ignore[attr-defined]


def test_a_reused_prefix_changes_nothing_but_the_work(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = np.random.default_rng(3).integers(2, 500, 3 * CHUNK + 5).tolist()
    first, second = (ask(prompt, max_tokens=8, temperature=0, ignore_eos=True) for _ in range(2))
    assert finish(engine, first) == finish(engine, second)
    assert (first.cached, second.cached) == (0, 3 * CHUNK)
    longer = ask(prompt[: 2 * CHUNK] + [9] * 20, max_tokens=2)
    finish(engine, longer)
    assert longer.cached == 2 * CHUNK


def test_every_answer_ends_once_with_its_usage(make_engine: MakeEngine) -> None:
    requests = crowd(4, 12)
    finish(make_engine(), *requests)
    for request in requests:
        assert isinstance(request.channel, ListChannel)
        reasons = [chunk.finish_reason for chunk in request.channel.chunks]
        assert reasons[-1] == "length"
        assert set(reasons[:-1]) <= {None}
        usage = request.channel.chunks[-1].usage
        assert usage is not None
        assert (usage.prompt, usage.completion) == (len(request.prompt), request.params.max_tokens)
        assert len(request.channel.tokens) == request.params.max_tokens


def test_watched_answers_know_how_sure_the_model_was(make_engine: MakeEngine) -> None:
    requests = [ask([5, 6, n], max_tokens=9, temperature=n % 2, seed=n, logprobs=0, ignore_eos=True) for n in range(6)]
    for request in requests:
        request.watched = request is not requests[0]
    finish(make_engine(), *requests)
    for request in requests[1:]:
        told = [entry.logprob for chunk in request.channel.chunks for entry in chunk.logprobs]  # type: ignore[attr-defined]
        assert len(told) == 9
        assert request.logprob_sum == pytest.approx(sum(told))
    assert requests[0].logprob_sum == 0


def test_one_request_in_some_is_watched() -> None:
    watched = [Request(new_id("chat"), [1], SamplingParams(), ListChannel()).watched for _ in range(3000)]
    assert 0.5 < sum(watched) / 3000 * WATCHED_ONE_IN < 2


def test_stop_token_stop_string_and_full_context(make_engine: MakeEngine) -> None:
    engine = make_engine()
    free = ask([5, 6, 7], max_tokens=30, temperature=0, ignore_eos=True)
    (tokens,) = finish(engine, free)
    text = free.channel.text  # type: ignore[attr-defined]

    by_token = ask([5, 6, 7], max_tokens=30, temperature=0, ignore_eos=True, stop_token_ids=(tokens[4],))
    (stopped,) = finish(engine, by_token)
    assert by_token.finish_reason == "stop"
    assert stopped == tokens[: tokens.index(tokens[4]) + 1]

    stop = text[3:5]
    by_text = ask([5, 6, 7], max_tokens=30, temperature=0, ignore_eos=True, stop=(stop,))
    finish(engine, by_text)
    assert by_text.finish_reason == "stop"
    assert by_text.channel.text == text[: text.index(stop)]  # type: ignore[attr-defined]

    full = ask([5] * (CAPACITY - 4), max_tokens=50, temperature=0, ignore_eos=True)
    (tokens,) = finish(engine, full)
    assert (full.finish_reason, len(tokens)) == ("length", 4)


@pytest.mark.parametrize("state", ["queued", "prefilling", "decoding"])
def test_a_closed_channel_cancels_in_every_state(make_engine: MakeEngine, state: str) -> None:
    engine = make_engine()
    others = [ask([i + 2] * 40, max_tokens=5, temperature=0, ignore_eos=True) for i in range(SLOTS)]
    victim = ask([9] * 40, max_tokens=100, ignore_eos=True)
    order = [*others, victim] if state == "queued" else [victim, *others]
    engine.submit(*order)
    for _ in range({"queued": 1, "prefilling": 1, "decoding": 4}[state]):
        engine.step()
    assert (victim.table is None) == (state == "queued")
    assert bool(victim.output) == (state == "decoding")
    assert isinstance(victim.channel, ListChannel)
    victim.channel.closed = True
    finish(engine)
    assert victim.finish_reason == "abort"
    assert all(len(r.output) == 5 for r in others)


class FailingRunner(Runner):
    """A real runner that fails when told to."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.kv_bytes = runner.kv_bytes
        self.fail = False

    @property
    def any_chunking(self) -> bool:
        return self.runner.any_chunking

    def run(self, plan: Plan) -> Output:
        if self.fail:
            self.fail = False
            raise RuntimeError("out of order")
        return self.runner.run(plan)


def test_a_failed_run_ends_its_requests_and_the_engine_goes_on(
    make_engine: MakeEngine, make_runner: Callable[[], Runner]
) -> None:
    runner = FailingRunner(make_runner())
    engine = make_engine(runner=runner)
    expected = finish(engine, ask([3] * 40, max_tokens=6, temperature=0))
    lost = ask([3] * 40, max_tokens=6, temperature=0)
    engine.submit(lost)
    engine.step()
    runner.fail = True
    finish(engine)
    assert lost.finish_reason == "error"
    assert finish(engine, ask([3] * 40, max_tokens=6, temperature=0)) == expected


def test_a_full_queue_refuses_and_says_so(make_engine: MakeEngine) -> None:
    engine = make_engine(max_queue=2)
    requests = [ask([4], max_tokens=2) for _ in range(SLOTS + 2)]
    engine.submit(*requests)
    with pytest.raises(Overloaded, match="limited to 2") as refusal:
        engine.submit(ask([4], max_tokens=2))
    assert refusal.value.retry_after_seconds >= 1
    finish(engine)
    assert all(r.finish_reason for r in requests)


def test_a_request_that_is_too_old_ends_with_an_error(make_engine: MakeEngine) -> None:
    request = ask([4], max_tokens=5)
    request.arrival -= 11
    finish(make_engine(timeout=10), request)
    assert isinstance(request.channel, ListChannel)
    error = request.channel.chunks[-1].error
    assert isinstance(error, TimedOut)
    assert "timed out after 10 s" in error.message


def test_drain_finishes_what_was_accepted(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.start()
    requests = crowd(5, 16)
    engine.submit(*requests)
    assert engine.drain(60)
    assert all(r.finish_reason == "length" for r in requests)
    with pytest.raises(Draining):
        engine.submit(ask([4], max_tokens=2))


def test_drain_aborts_at_its_limit(make_engine: MakeEngine, make_runner: Callable[[], Runner]) -> None:
    gate = threading.Event()
    runner = make_runner()

    class Stuck(FailingRunner):
        def run(self, plan: Plan) -> Output:
            gate.wait()
            return super().run(plan)

    engine = make_engine(runner=Stuck(runner))
    engine.start()
    request = ask([4], max_tokens=50, ignore_eos=True)
    engine.submit(request)
    threading.Timer(0.1, gate.set).start()
    assert not engine.drain(0.01)
    assert request.finish_reason == "abort"


def test_an_embedding_is_the_normed_mean_of_hidden_states(
    make_engine: MakeEngine, make_runner: Callable[[], Runner]
) -> None:
    prompt = np.random.default_rng(6).integers(2, 500, 2 * CHUNK + 3).tolist()
    runner, states = make_runner(), []
    for start in range(0, len(prompt), CHUNK):
        plan = Plan()
        plan.add([0], start, prompt[start : start + CHUNK], want="hidden")
        states.append(runner.run(plan).hidden.copy())
    mean = np.concatenate(states).astype(np.float64).mean(axis=0)
    engine = make_engine()
    for _ in range(2):  # the second time, a prefix could be reused: it must not be
        request = ask(prompt, embed=True)
        finish(engine, request)
        assert isinstance(request.channel, ListChannel)
        np.testing.assert_allclose(request.channel.chunks[-1].embedding, mean / np.linalg.norm(mean), atol=1e-6)
