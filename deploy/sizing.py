"""How many replicas meet the objectives: what one holds, found by bisection on the rate, then the fleet's size.

The parts that chance makes of a Poisson stream are Poisson streams, so where requests go to replicas by chance, one
replica is simulated and its rate divides the whole, whatever that is. Where n take turns, one gets every n-th request:
simulated as such. Where the least busy one gets it, replicas depend on each other and are simulated together. A fleet
of more than GROUPS is taken to be groups of that size, each with its part of the stream by chance, so that one rate
divides any whole. That is on the safe side: the more replicas take turns or can be chosen, the shorter the wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import msgspec

from deploy.capacity_profile import Profile
from deploy.objectives import Objective, broken
from deploy.simulation import Balance, Outcome, simulate
from deploy.workload import Workload

GROUPS: Mapping[Balance, int] = {"random": 1, "round-robin": 64, "least": 8}
SKIPPED = 0.1  # of the requests, which found the replica empty
RATE_PRECISION = 0.01  # of what one replica holds


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
    run = partial(_run, profile, demand)
    idle = run(RATE_PRECISION * most)
    if reasons := broken(demand.objectives, idle):
        return Size(profile, saturated, 0.0, idle, reasons)
    rate, outcome = _highest(run, demand, RATE_PRECISION * most, idle, most)
    return Size(profile, saturated, rate, outcome, [])


def saturation(profile: Profile, demand: Demand) -> float:
    """Requests a second of a replica that always has some waiting."""
    engine = msgspec.structs.replace(profile.engine, max_queue=demand.requests)
    visits = demand.workload.visits(demand.requests, 1.0, engine.capacity)
    outcome = simulate(msgspec.structs.replace(profile, engine=engine), [replace(v, arrival=0.0) for v in visits])
    return outcome.requests_per_second


def fleets(one: Size, demand: Demand, rates: Sequence[float]) -> Iterator[tuple[float, Fleet]]:
    """For each of the rates, requests a second in all, and each way to balance them. `one` must hold some."""
    most = demand.most_utilisation * one.saturated

    @cache
    def held_each(balance: Balance) -> float:
        """What each of a whole group holds."""
        run = partial(_share, one.profile, demand, balance, GROUPS[balance])
        return _highest(run, demand, one.rate, run(one.rate), most)[0] if GROUPS[balance] > 1 else one.rate

    for rate in rates:
        alone = max(1, math.ceil(rate / one.rate))
        for balance, group in GROUPS.items():
            fewest, enough = max(1, math.ceil(rate / most)), alone
            if alone > group:
                fewest = enough = max(group, math.ceil(rate / held_each(balance)))
            run = partial(_whole, one.profile, demand, balance, rate)
            yield rate, Fleet(balance, *_fewest(run, demand, fewest, enough))


def _highest(
    run: Callable[[float], Outcome], demand: Demand, low: float, held: Outcome, high: float
) -> tuple[float, Outcome]:
    """The highest rate that meets the demand, and what it gives; `low` does, or nearly, and gives `held`."""
    if not broken(demand.objectives, outcome := run(high)):
        return high, outcome
    while high - low > RATE_PRECISION * low:
        middle = (low + high) / 2
        outcome = run(middle)
        if broken(demand.objectives, outcome):
            high = middle
        else:
            low, held = middle, outcome
    return low, held


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


def _whole(profile: Profile, demand: Demand, balance: Balance, rate: float, replicas: int) -> Outcome:
    """Of a fleet with `rate` requests a second in all."""
    return _share(profile, demand, balance, min(replicas, GROUPS[balance]), rate / replicas)


def _share(profile: Profile, demand: Demand, balance: Balance, group: int, rate: float) -> Outcome:
    """Of so many replicas, each with `rate`: of all, or of the one that stands for them where they take turns."""
    if balance == "round-robin":
        return _run(profile, demand, rate, every=group)
    return _run(profile, demand, rate * group, replicas=group, balance=balance)


def _run(
    profile: Profile, demand: Demand, rate: float, *, replicas: int = 1, balance: Balance = "random", every: int = 1
) -> Outcome:
    count = demand.requests * replicas
    visits = demand.workload.visits(count, rate, profile.engine.capacity, every)
    return simulate(profile, visits, replicas=replicas, balance=balance, skipped=int(SKIPPED * count))
