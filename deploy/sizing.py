"""How many replicas meet the objectives: what one holds, found by bisection on the rate, then the fleet's size.

The parts that chance makes of a Poisson stream are Poisson streams, so where requests go to replicas by chance, one
replica is simulated and its rate divides the whole, whatever that is. Where they take turns, one replica gets every
n-th request: simulated as such. Where the least busy one gets it, replicas depend on each other: up to GROUP of them
are simulated together, and a larger fleet is taken to be groups of that size, each with its part of the stream by
chance. That is on the safe side: the more replicas to choose among, the shorter the wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import msgspec

from deploy.capacity_profile import Profile
from deploy.objectives import Objective, broken
from deploy.simulation import Balance, Outcome, simulate
from deploy.workload import Workload

GROUP = 8  # replicas that are simulated together
SKIPPED = 0.1  # of the requests, which found the replica empty
RATE_PRECISION = 0.01  # of what one replica holds
BALANCES: tuple[Balance, ...] = get_args(Balance)


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked and promised. `requests`: simulated for each replica. `most_utilisation`: of the saturated rate."""

    workload: Workload
    objectives: tuple[Objective, ...]
    requests: int
    most_utilisation: float


@dataclass(frozen=True, slots=True)
class Size:
    """One replica of a profile with so many slots, at the highest rate (a second) that meets the demand; 0: none does.

    `outcome` is what clients see then; at rate 0 of a nearly idle replica, and `reasons` why it is not enough.
    """

    profile: Profile
    saturated: float  # requests a second, if they never stop coming
    rate: float
    outcome: Outcome
    reasons: list[str]

    @property
    def slots(self) -> int:
        return self.profile.engine.max_running


@dataclass(frozen=True, slots=True)
class Fleet:
    """So many replicas for a stream that is balanced so; `outcome` is what clients see."""

    balance: Balance
    replicas: int
    outcome: Outcome


def with_slots(profile: Profile, slots: int) -> Profile:
    return msgspec.structs.replace(profile, engine=msgspec.structs.replace(profile.engine, max_running=slots))


def best_size(profile: Profile, demand: Demand, slots: int = 0) -> Size:
    """With `slots`, or with as many as hold the most: halved from the profile's as long as that helps."""
    best = size(with_slots(profile, slots or profile.engine.max_running), demand)
    while not slots and best.slots > 1:
        fewer = size(with_slots(profile, best.slots // 2), demand)
        if fewer.rate <= best.rate:
            break
        best = fewer
    return best


def size(profile: Profile, demand: Demand) -> Size:
    """The highest rate that one replica holds."""
    saturated = saturation(profile, demand)
    most = demand.most_utilisation * saturated

    def run(rate: float) -> Outcome:
        return _run(profile, demand, rate, 1, "random")

    low, held = 0.0, run(RATE_PRECISION * most)
    if reasons := broken(demand.objectives, held):
        return Size(profile, saturated, 0.0, held, reasons)
    if not broken(demand.objectives, at_most := run(most)):
        return Size(profile, saturated, most, at_most, [])
    low, high = RATE_PRECISION * most, most
    while high - low > RATE_PRECISION * low:
        middle = (low + high) / 2
        outcome = run(middle)
        if broken(demand.objectives, outcome):
            high = middle
        else:
            low, held = middle, outcome
    return Size(profile, saturated, low, held, [])


def saturation(profile: Profile, demand: Demand) -> float:
    """Requests a second of a replica that always has some waiting."""
    engine = msgspec.structs.replace(profile.engine, max_queue=demand.requests)
    visits = demand.workload.visits(demand.requests, 1.0, engine.capacity)
    outcome = simulate(msgspec.structs.replace(profile, engine=engine), [replace(v, arrival=0.0) for v in visits])
    return outcome.requests_per_second


def fleets(one: Size, demand: Demand, rate: float) -> Iterator[Fleet]:
    """For `rate` requests a second in all, by each way to balance them. `one` must hold some."""
    alone = max(1, math.ceil(rate / one.rate))
    yield Fleet("random", alone, _run(one.profile, demand, rate / alone, 1, "random"))
    fewest = max(1, math.ceil(rate / (demand.most_utilisation * one.saturated)))
    for balance in BALANCES[1:]:
        yield Fleet(balance, *_fewest(partial(_share, one.profile, demand, rate, balance), demand, fewest, alone))


def _fewest(run: Callable[[int], Outcome], demand: Demand, low: int, high: int) -> tuple[int, Outcome]:
    """The fewest replicas, `low` or more, that meet the demand, and what they give. `high` will do, or nearly."""
    while broken(demand.objectives, found := run(high)):
        low, high = high + 1, high + max(1, high // 50)
    while low < high:
        middle = (low + high) // 2
        outcome = run(middle)
        if broken(demand.objectives, outcome):
            low = middle + 1
        else:
            high, found = middle, outcome
    return high, found


def _share(profile: Profile, demand: Demand, rate: float, balance: Balance, replicas: int) -> Outcome:
    if balance == "round-robin":
        return _run(profile, demand, rate / replicas, 1, balance, every=replicas)
    group = min(replicas, GROUP)
    return _run(profile, demand, rate * group / replicas, group, balance)


def _run(profile: Profile, demand: Demand, rate: float, replicas: int, balance: Balance, every: int = 1) -> Outcome:
    count = demand.requests * replicas
    visits = demand.workload.visits(count, rate, profile.engine.capacity, every)
    return simulate(profile, visits, replicas=replicas, balance=balance, skipped=int(SKIPPED * count))
