"""The simulation against queueing theory, against the real engine, and against what can never be."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.simulation import Balance, Replica, simulate
from deploy.workload import Lengths, Visit, Workload
from serve import engine as engine_module
from serve.block_cache import BLOCK
from serve.plan import Output, Plan
from serve.request import Request, SamplingParams
from serve.scheduler import Step
from serve.step_cost import StepCost
from tests.deploy.capacity_profiles import make_profile
from tests.serve.fake_runner import FakeRunner, make_engine
from tests.serve.tiny import ListChannel

ONE = {"turn": 0.1}  # seconds, whatever is in it
ALL = {"turn": 0.01, "token, ": 0.001, "token seen": 1e-6, "row": 0.0005, "new": 0.002}
BALANCES: tuple[Balance, ...] = get_args(Balance)


def one_token(rate: float, count: int, every: int = 1) -> list[Visit]:
    return Workload(Lengths.parse("8"), Lengths.parse("1")).visits(count, rate, 1024, every)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_slot_and_one_turn_a_request_is_the_queue_m_d_1(load: float) -> None:
    """Pollaczek and Khinchine: requests of the same service time S wait load * S / (2 * (1 - load)) on average."""
    profile = make_profile(ONE, max_running=1, max_queue=10**6)
    outcome = simulate(profile, one_token(load / 0.1, 5_000), skipped=500)
    waited = outcome.figure("ttft", "mean") - 0.1
    assert waited == pytest.approx(load * 0.1 / (2 * (1 - load)), rel=0.15)
    assert outcome.utilisation == pytest.approx(load, rel=0.03)
    assert outcome.waiting == pytest.approx(load / 0.1 * waited, rel=0.1)  # Little's law


def test_taking_turns_halves_the_variance_and_with_it_the_wait() -> None:
    """Every second arrival of a Poisson stream: Kingman's bound falls with the variation of the gaps, 1 / 2."""
    profile = make_profile(ONE, max_running=1, max_queue=10**6)
    by_chance, in_turn = (
        simulate(profile, one_token(8, 3_000, every)).figure("ttft", "mean") - 0.1 for every in (1, 2)
    )
    assert 0.4 < in_turn / by_chance < 0.55


def test_balancing_matters_in_the_order_that_it_should() -> None:
    profile = make_profile(ONE, max_running=1, max_queue=10**6)
    visits = Workload(Lengths.parse("8"), Lengths.parse("exp:4")).visits(1200, 7.2, 1024)
    waits = [
        simulate(profile, visits, replicas=4, balance=balance).figure("ttft", "mean")
        for balance in ("random", "round-robin", "least")
    ]
    assert waits == sorted(waits, reverse=True)
    assert waits[0] > 1.5 * waits[2]


def test_a_request_alone_takes_what_its_turns_take() -> None:
    profile = make_profile(ALL, front=0.02)
    outcome = simulate(profile, [Visit(1.0, 100, 3)])
    prompt = 0.01 + 0.001 * 100 + 1e-6 * 100 * 101 / 2 + 0.0005 + 0.002
    rows = [0.01 + 0.001 + 1e-6 * seen + 0.0005 for seen in (101, 102)]
    assert outcome.ttft.tolist() == pytest.approx([0.02 + prompt])
    assert outcome.itl.tolist() == pytest.approx(rows)
    assert outcome.e2e.tolist() == pytest.approx([0.02 + prompt + sum(rows)])


def test_a_full_queue_refuses() -> None:
    profile = make_profile(ONE, max_running=2, max_queue=3)
    outcome = simulate(profile, [Visit(0.0, 8, 1) for _ in range(9)])
    assert outcome.refused == 4
    assert len(outcome.ttft) == 5


@st.composite
def streams(draw: st.DrawFn) -> list[Visit]:
    gaps = draw(st.lists(st.sampled_from([0.0, 0.001, 0.03, 1.0]), min_size=1, max_size=25))
    prompts = st.integers(1, 400)
    return [Visit(float(t), draw(prompts), draw(st.integers(1, 60))) for t in np.cumsum(gaps)]


@settings(deadline=None, max_examples=40)
@given(
    visits=streams(),
    replicas=st.integers(1, 3),
    balance=st.sampled_from(BALANCES),
    any_chunking=st.booleans(),
    blocks=st.integers(8, 40),
    slots=st.integers(1, 8),
)
def test_nothing_is_lost_and_nothing_comes_before_it_can(
    visits: list[Visit], replicas: int, balance: Balance, any_chunking: bool, blocks: int, slots: int
) -> None:
    """`simulate` itself checks that nothing is left behind. Few blocks make requests give up their places."""
    shape = {"capacity": 512, "max_running": slots, "max_queue": 5, "num_blocks": blocks if any_chunking else 0}
    profile = make_profile(ALL, front=0.004, any_chunking=any_chunking, prefill_chunk=64, **shape)
    outcome = simulate(profile, visits, replicas=replicas, balance=balance)
    answered = len(visits) - outcome.refused
    assert len(outcome.ttft) == len(outcome.e2e) == answered
    assert (outcome.ttft >= 0.004 + 0.01).all()
    assert (outcome.e2e >= outcome.ttft - 1e-12).all()
    assert (outcome.itl >= 0.01 - 1e-12).all()
    assert 0 <= outcome.utilisation <= 1 + 1e-9
    assert outcome.waiting >= 0
    if not outcome.refused:
        tokens = sum(visit.output for visit in visits)
        assert len(outcome.itl) == tokens - answered
        assert outcome.tokens_per_second * answered == pytest.approx(outcome.requests_per_second * tokens)


def test_what_warms_up_does_not_count() -> None:
    """It is over before the clock starts, and what steps cost is known from the first request on."""
    replica = Replica(make_profile(ALL).engine, make_profile(ALL).model, 0.0, lambda: 0.5)
    replica.warm_up()
    replica.check()
    assert replica.scheduler.cost.known
    assert replica.scheduler.cost.seconds(4) == pytest.approx(0.01 + 4 * 0.0015, rel=0.1)
    served = replica.submit(Visit(0.0, 8, 2))
    replica.run(1.0)
    assert replica.busy_seconds == pytest.approx(served.tokens[-1])


def test_the_same_arrivals_give_the_same_outcome() -> None:
    profile = make_profile(ALL)
    profile = replace_spread(profile, [0.8, 1.0, 1.2])
    visits = Workload(Lengths.parse("exp:60"), Lengths.parse("4-30")).visits(60, 5.0, 512)
    first, again, other = (simulate(profile, visits, seed=seed).ttft.tolist() for seed in (1, 1, 2))
    assert first == again != other


def replace_spread(profile: Any, spread: list[float]) -> Any:
    import msgspec

    return msgspec.structs.replace(profile, model=msgspec.structs.replace(profile.model, spread=spread))


class Clock:
    """Stands in for `time` in the engine."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class TimedRunner(FakeRunner):
    """Takes as long as the model says."""

    def __init__(self, num_blocks: int, clock: Clock, profile: Any) -> None:
        super().__init__(num_blocks)
        self.clock = clock
        self.profile = profile
        self.step: Step | None = None

    def run(self, plan: Plan) -> Output:
        assert self.step is not None
        self.clock.now += self.profile.model.seconds(self.step)
        return super().run(plan)


@pytest.mark.parametrize("blocks", [6, 100])
def test_the_real_engine_decides_the_same_at_the_same_times(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn by turn: when it begins, each segment's past and count; with few blocks, requests give up their places."""
    capacity, clock = 4 * BLOCK, Clock()
    monkeypatch.setattr(engine_module, "time", clock)
    times = {"turn": 0.02, "token, ": 0.001, "new": 0.003}
    profile = make_profile(times, capacity=capacity, num_blocks=blocks, prefill_chunk=128, max_queue=1000)
    visits = Workload(Lengths.parse("10-180"), Lengths.parse("1-60"), seed=3).visits(40, 6.0, capacity)

    runner = TimedRunner(blocks, clock, profile)
    engine = make_engine(runner, capacity=capacity, slots=8, speculate=False)
    engine.scheduler.cost = StepCost()
    real = record(engine.scheduler, runner)
    waiting = list(enumerate(visits))
    while waiting or not engine.idle:
        if engine.idle:
            clock.now = max(clock.now, waiting[0][1].arrival)
        while waiting and waiting[0][1].arrival <= clock.now:
            number, visit = waiting.pop(0)
            prompt = [(number * 7919 + at * 31) % 97 + 1 for at in range(visit.prompt)]
            params = SamplingParams(max_tokens=visit.output, temperature=0, ignore_eos=True)
            engine.submit(Request(str(number), prompt, params, ListChannel(), arrival=visit.arrival))
        engine.step()

    replica = Replica(profile.engine, profile.model, 0.0, lambda: 0.5)
    simulated = record(replica.scheduler)
    for visit in visits:
        replica.run(visit.arrival)
        replica.submit(visit)
    replica.run(float("inf"))
    assert simulated == real
    assert any(preempted for *_, preempted in real) == (blocks == 6)


def record(scheduler: Any, runner: TimedRunner | None = None) -> list[tuple[float, list[tuple[int, int]], int]]:
    """What it plans from now on."""
    noted: list[tuple[float, list[tuple[int, int]], int]] = []
    schedule = scheduler.schedule

    def noting(now: float) -> Step:
        step: Step = schedule(now)
        segments = [(segment.past, segment.count) for segment in step.plan.segments]
        noted.append((round(now, 9), segments, step.num_preempted))
        if runner is not None:
            runner.step = step
        return step

    scheduler.schedule = noting
    return noted
