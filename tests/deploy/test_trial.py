"""What a trial has shown: pairs, limits, and how often a verdict is wrong, or late."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from deploy.policy import DEFAULT, Trial, read_policy
from deploy.traffic import NAMES, Streams, Value
from deploy.trial import Rule, figure, judge, pair, side_by_side

POLICY = read_policy(DEFAULT).trial
ON_EVERY_LIMIT = msgspec.structs.replace(
    POLICY, alpha=0.2, error_increase=0, abort_increase=0, ttft_ratio=1, token_time_ratio=1, approval_loss=0
)
ON_ONE_LIMIT = msgspec.structs.replace(  # and the others cannot be broken
    POLICY, alpha=0.2, error_increase=1, abort_increase=1, ttft_ratio=10, token_time_ratio=10, approval_loss=0
)
LOOKS = (10, 20, 40, 80, 120, 160)


def traffic(
    random: np.random.Generator,
    people: int,
    share: float = 0.5,
    errors: tuple[float, float] = (0.02, 0.02),
    slower: float = 1.0,
    liked: tuple[float, float] = (0.5, 0.5),
) -> Streams:
    """Of each person's answer one value; the pairs are (old, new). 60 % say what they think of it."""
    streams: Streams = {name: [] for name in NAMES}
    for _ in range(people):
        is_new = bool(random.random() < share)
        late = math.log(slower) if is_new else 0.0
        values = {
            "errors": random.random() < errors[is_new],
            "aborts": random.random() < 0.03,
            "ttft": random.normal(-2, 0.6) + late,
            "token_time": random.normal(-4, 0.3) + late,
            "approval": (1 if random.random() < liked[is_new] else -1) * (random.random() < 0.6),
        }
        for name in NAMES:
            streams[name].append(Value("new" if is_new else "old", float(values[name])))
    return streams


def verdict(streams: Streams, policy: Trial, looks: tuple[int, ...]) -> tuple[str, int]:
    """The first that is not open, and after how many people."""
    for people in looks:
        found = judge("new", {name: values[:people] for name, values in streams.items()}, policy).verdict
        if found != "open":
            return found, people
    return "open", looks[-1]


@pytest.mark.parametrize("policy", [ON_EVERY_LIMIT, ON_ONE_LIMIT])
def test_equal_versions_are_rarely_promoted_or_rejected_however_often_one_looks(policy: Trial) -> None:
    random = np.random.default_rng(0)
    found = [verdict(traffic(random, LOOKS[-1]), policy, LOOKS)[0] for _ in range(60)]
    assert found.count("broken") <= policy.alpha * len(found)
    assert found.count("kept") <= policy.alpha * len(found)


@pytest.mark.parametrize(
    ("change", "figures"),
    [
        ({"liked": (0.9, 0.1)}, {"approval"}),
        ({"errors": (0.02, 1.0)}, {"errors"}),
        ({"slower": 3.0}, {"ttft", "token_time"}),
    ],
)
def test_a_version_that_is_clearly_worse_is_rejected_soon(change: dict[str, float], figures: set[str]) -> None:
    for seed in range(5):
        streams = traffic(np.random.default_rng(seed), 160, **change)
        assert verdict(streams, POLICY, (40, 80, 160))[0] == "broken"
        broken = {name for name, f in judge("new", streams, POLICY).figures.items() if f.verdict == "broken"}
        assert broken
        assert broken <= figures


def test_a_version_that_is_clearly_better_is_promoted() -> None:
    policy = msgspec.structs.replace(POLICY, error_increase=0.1, abort_increase=0.1, ttft_ratio=1.5, approval_loss=0)
    for seed in range(5):
        streams = traffic(np.random.default_rng(seed), 800, liked=(0.3, 0.9))
        assert verdict(streams, policy, (100, 200, 400, 800))[0] == "kept"


def test_pairs_are_of_neighbours() -> None:
    stream = [Value(*v) for v in (("old", 1), ("old", 3), ("new", 5), ("new", 6), ("new", 8), ("old", 0), ("new", 1))]
    assert pair("new", stream).tolist() == [5 - 2, 7 - 0]
    assert pair("new", []).tolist() == []
    assert pair("new", [Value("old", 1.0)] * 9).tolist() == []


def test_what_changes_with_the_hour_changes_nothing() -> None:
    """A version that gets its answers when all is slow is not taken for a slow one."""
    random = np.random.default_rng(0)
    stream = [
        Value(
            "new" if random.random() < (0.1 if hour < 500 else 0.6) else "old",
            -2.0 + hour / 300 + random.normal(0, 0.1),
        )
        for hour in range(1000)
    ]
    found = figure("new", stream, Rule(math.log(10), math.log(1.2), is_ratio=True), 0.01)
    assert found.verdict == "kept"
    assert found.new is not None
    assert found.old is not None
    assert found.new > 1.5 * found.old  # which is what a comparison of the means would see


def test_a_limit_is_kept_or_broken_by_the_whole_interval() -> None:
    most, least = Rule(1, 0.1), Rule(1, -0.1, least=True)
    assert [most.judge(*span) for span in ((-1, 0.1), (0.1, 0.2), (0.11, 0.2))] == ["kept", "open", "broken"]
    assert [least.judge(*span) for span in ((-0.1, 1), (-0.2, -0.1), (-0.2, -0.11))] == ["kept", "open", "broken"]


def test_times_are_shown_as_seconds_and_ratios() -> None:
    stream = [Value("new", math.log(0.3)), Value("old", math.log(0.2))] * 400
    found = figure("new", stream, Rule(math.log(10), math.log(1.25), is_ratio=True), 0.01)
    assert (found.new, found.old, found.value, found.limit) == (0.3, 0.2, 1.5, "<= 1.25")
    assert found.verdict == "broken"


def test_nothing_said_and_nothing_answered_is_open() -> None:
    found = judge("new", {name: [] for name in NAMES}, POLICY)
    assert found.verdict == "open"
    assert found.counts["new"] == {"answers": 0, "people": 0}
    assert found.explain().startswith("errors - [-1, 1] may keep <= 0.01, ")


def test_later_values_stand_beside_earlier_ones_as_far_as_both_go() -> None:
    late: Streams = {name: [Value("new", n) for n in range(3)] for name in NAMES}
    early: Streams = {name: [Value("old", 9.0), Value("new", 7.0), Value("old", 8.0)] for name in NAMES}
    both = side_by_side("new", late, early)
    assert both["ttft"] == [Value("new", 0), Value("old", 9.0), Value("new", 1), Value("old", 8.0)]
    assert pair("new", both["ttft"]).tolist() == [-9, -7]
