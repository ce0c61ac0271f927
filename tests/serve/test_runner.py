"""The stock runner: whatever the company, order and slots of a plan, every token gets the bits it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.plan import Copy, Floats, Output, Plan, Segment, Want
from serve.runner import StockRunner
from tests.serve.tiny import CAPACITY, CHUNK, SLOTS

MakeRunner = Callable[[], StockRunner]
WANTS = ("last", "all", "hidden", "none")


@dataclass
class Sequence:
    """Tokens and how they are cut into segments; results by position of those that were wanted."""

    tokens: list[int]
    cuts: list[int]  # sizes of the segments
    wants: list[Want]
    slot: int = -1
    next: int = 0  # segment
    logits: dict[int, Floats] = field(default_factory=dict)
    hidden: dict[int, Floats] = field(default_factory=dict)

    @property
    def past(self) -> int:
        return sum(self.cuts[: self.next])

    @property
    def done(self) -> bool:
        return self.next == len(self.cuts)

    def add_to(self, plan: Plan) -> tuple[Sequence, int]:
        """Append the next segment to `plan`; returns what `collect` needs."""
        count = self.cuts[self.next]
        plan.add([self.slot], self.past, self.tokens[self.past : self.past + count], want=self.wants[self.next])
        self.next += 1
        return self, self.past - count

    def copy(self) -> Sequence:
        return Sequence(self.tokens, self.cuts, self.wants)


def collect(plan: Plan, output: Output, added: list[tuple[Sequence, int]]) -> None:
    """Copy the wanted rows into their sequences' results."""

    def place(at: int) -> tuple[Sequence, int]:
        number = next(i for i, s in enumerate(plan.segments) if s.start <= at < s.start + s.count)
        sequence, past = added[number]
        return sequence, past + at - plan.segments[number].start

    for at, row in zip(plan.wanted, output.rows, strict=True):
        sequence, position = place(at)
        sequence.logits[position] = output.logits[row].copy()
    for at, state in zip(plan.hidden, output.hidden, strict=True):
        sequence, position = place(at)
        sequence.hidden[position] = state.copy()


def alone(runner: StockRunner, sequence: Sequence) -> Sequence:
    """The sequence with a runner to itself, in slot 0."""
    single = sequence.copy()
    single.slot = 0
    while not single.done:
        plan = Plan()
        added = [single.add_to(plan)]
        collect(plan, runner.run(plan), added)
    return single


def assert_same(found: Sequence, expected: Sequence) -> None:
    for kind in ("logits", "hidden"):
        ours, theirs = getattr(found, kind), getattr(expected, kind)
        assert ours.keys() == theirs.keys()
        for position, values in theirs.items():
            np.testing.assert_array_equal(ours[position], values, err_msg=f"{kind} at {position}")


def random_sequence(random: np.random.Generator) -> Sequence:
    """A prompt in chunks, then decode rows, now and then a chunk again; most decode rows wanted."""
    cuts = [CHUNK] * int(random.integers(0, 4)) + [int(random.integers(1, CHUNK + 1))]
    cuts += [1 if random.random() < 0.85 else int(random.integers(1, CHUNK + 1)) for _ in range(random.integers(1, 12))]
    while sum(cuts) > CAPACITY:
        cuts.pop()
    wants = [str(random.choice(WANTS)) if cut > 1 or random.random() < 0.2 else "last" for cut in cuts]
    return Sequence(random.integers(2, 500, sum(cuts)).tolist(), cuts, wants)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_company_in_any_order_gives_the_bits_of_being_alone(make_runner: MakeRunner, seed: int) -> None:
    random = np.random.default_rng(seed)
    runner, single = make_runner(), make_runner()
    free = list(range(SLOTS))
    running: list[Sequence] = []
    finished: list[Sequence] = []
    waiting = [random_sequence(random) for _ in range(2 * SLOTS)]
    while waiting or running:
        while waiting and free and random.random() < 0.8:
            sequence = waiting.pop()
            sequence.slot = free.pop(int(random.integers(len(free))))
            running.append(sequence)
        plan = Plan()
        chosen = [s for s in running if random.random() < 0.7]
        random.shuffle(chosen)  # type: ignore[arg-type]
        added = [sequence.add_to(plan) for sequence in chosen]
        if plan.segments:
            collect(plan, runner.run(plan), added)
        for sequence in [s for s in running if s.done]:
            running.remove(sequence)
            free.append(sequence.slot)
            finished.append(sequence)
    assert len(finished) == 2 * SLOTS
    for sequence in finished:
        assert_same(sequence, alone(single, sequence))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_copied_beginning_has_the_bits_of_a_computed_one(make_runner: MakeRunner, seed: int) -> None:
    random = np.random.default_rng(seed)
    runner, single = make_runner(), make_runner()
    shared = int(random.integers(1, 4))  # chunks
    source = Sequence(random.integers(2, 500, 70).tolist(), [CHUNK] * 4 + [1] * 6, ["last"] * 10)
    source.slot, target_slot, *others = random.permutation(SLOTS).tolist()
    # Others decode meanwhile, so that rows are exchanged before and after the copy.
    crowd = [Sequence(random.integers(2, 500, 24).tolist(), [CHUNK] + [1] * 8, ["last"] * 9) for _ in range(3)]
    for sequence, slot in zip(crowd, others, strict=False):
        sequence.slot = slot

    def advance(*sequences: Sequence, copies: list[Copy] | None = None) -> None:
        plan = Plan(copies=copies or [])
        added = [sequence.add_to(plan) for sequence in sequences if not sequence.done]
        if added:
            collect(plan, runner.run(plan), added)

    for _ in range(5 + int(random.integers(0, 5))):
        advance(*random.permutation(np.array([source, *crowd], object)).tolist())
    tail = random.integers(2, 500, 9).tolist()
    target = Sequence(
        source.tokens[: shared * CHUNK] + tail, [CHUNK] * shared + [5, 1, 1, 1, 1], ["last"] * (shared + 5)
    )
    target.slot, target.next = target_slot, shared
    advance(target, source, copies=[Copy(source.slot, target.slot, shared * CHUNK)])
    while not all(s.done for s in (target, source, *crowd)):
        advance(*random.permutation(np.array([source, target, *crowd], object)).tolist())

    expected = alone(single, target)
    for chunk in range(shared):  # these were copied, not computed
        expected.logits.pop((chunk + 1) * CHUNK - 1)
    assert_same(target, expected)
    for sequence in (source, *crowd):
        assert_same(sequence, alone(single, sequence))


@pytest.mark.parametrize("count", [1, 2, CHUNK])
def test_all_last_and_none_agree(make_runner: MakeRunner, count: int) -> None:
    tokens = list(range(7, 7 + count))
    outputs = {}
    for want in WANTS:
        runner, plan = make_runner(), Plan()
        plan.add([3], 0, tokens, want=want)
        output = runner.run(plan)
        outputs[want] = output.logits[output.rows].copy()
        # Whatever was wanted, the cache holds the same.
        plan = Plan()
        plan.add([3], count, [5])
        output = runner.run(plan)
        outputs[want + " then"] = output.logits[output.rows].copy()
    assert [len(outputs[want]) for want in WANTS] == [1, count, 0, 0]
    np.testing.assert_array_equal(outputs["all"][-1:], outputs["last"])
    np.testing.assert_array_equal(outputs["all then"], outputs["last then"])
    np.testing.assert_array_equal(outputs["none then"], outputs["last then"])
    np.testing.assert_array_equal(outputs["hidden then"], outputs["last then"])


def test_results_come_in_the_order_of_wanted(make_runner: MakeRunner) -> None:
    """Even of a plan whose `wanted` is not sorted, and with more wanted rows than slots."""
    tokens = [list(range(10 * n + 2, 10 * n + 2 + CHUNK)) for n in range(3)]
    single, expected = make_runner(), []
    for slot, ids in enumerate(tokens):
        plan = Plan()
        plan.add([slot], 0, ids, want="all")
        output = single.run(plan)
        expected.append(output.logits[output.rows].copy())
    runner, plan = make_runner(), Plan()
    for slot, ids in zip([6, 0, 4], tokens, strict=True):
        plan.add([slot], 0, ids, want="all")
    plan.wanted.reverse()
    output = runner.run(plan)
    assert len(output.rows) == 3 * CHUNK > SLOTS
    np.testing.assert_array_equal(output.logits[output.rows], np.concatenate(expected)[::-1])


def test_a_slot_can_be_filled_to_its_last_token(make_runner: MakeRunner) -> None:
    tokens = np.random.default_rng(0).integers(2, 500, CAPACITY).tolist()
    full = Sequence(tokens, [CHUNK] * (CAPACITY // CHUNK - 1) + [1] * CHUNK, ["last"] * (CAPACITY // CHUNK - 1 + CHUNK))
    neighbour = Sequence(tokens[:40], [CHUNK, CHUNK, 8], ["all"] * 3)
    full.slot, neighbour.slot = 2, 3  # an overrun would land in the neighbour
    runner = make_runner()
    for sequence in (neighbour, full):
        while sequence.next < len(sequence.cuts) - (sequence is neighbour):
            plan = Plan()
            added = [sequence.add_to(plan)]
            collect(plan, runner.run(plan), added)
    plan = Plan()
    added = [neighbour.add_to(plan)]
    collect(plan, runner.run(plan), added)
    assert full.past == CAPACITY
    assert_same(full, alone(make_runner(), full))
    assert_same(neighbour, alone(make_runner(), neighbour))


def test_an_empty_plan_gives_nothing(make_runner: MakeRunner) -> None:
    assert make_runner().run(Plan()).rows == []


def test_plans_say_what_was_added() -> None:
    plan = Plan()
    plan.add([4], 0, [7, 8, 9], want="all", temperature=0.5)
    plan.add([1, 7], 64, [5])
    plan.add([2], 3, [6, 7], want="none")
    plan.add([3], 3, [1, 2], want="hidden")
    assert plan.tokens == [7, 8, 9, 5, 6, 7, 1, 2]
    places = [([4], 0, 0, 3), ([1, 7], 64, 3, 1), ([2], 3, 4, 2), ([3], 3, 6, 2)]
    assert plan.segments == [Segment(*place) for place in places]
    assert plan.wanted == [0, 1, 2, 3]
    assert plan.temperatures == [0.5, 0.5, 0.5, 0]
    assert plan.hidden == [6, 7]
