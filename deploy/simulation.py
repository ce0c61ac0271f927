"""Replicas of the server on a clock of their own: the real scheduler and cache, a model of time in the runner's place.

Only what has no model is left out: each turn is accept, schedule, wait as long as the model says, advance, and hand a
token to whoever has none left to compute, as in `serve.engine.Engine.step`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from deploy.capacity_profile import EngineShape, Profile
from deploy.step_model import StepModel
from deploy.workload import Visit
from serve.request import Chunk, Request, SamplingParams
from serve.scheduler import Step

WARM_UP = (64, 32)  # tokens of prompt and answer
Balance = Literal["random", "round-robin", "least"]


class NoChannel:
    """Of a request that nobody reads."""

    closed = False

    def send(self, chunk: Chunk) -> None:
        """Nothing is sent."""


@dataclass(slots=True)
class Served:
    """A visit and what became of it: when each token was there for the client, in seconds. None: it was refused."""

    visit: Visit
    tokens: list[float] = field(default_factory=list)
    refused: bool = False
    waited: float = 0.0  # seconds, from its arrival at the engine to its first turn


class Replica:
    """One server. Times are seconds on the simulation's clock."""

    def __init__(self, engine: EngineShape, model: StepModel, front_seconds: float, luck: Callable[[], float]) -> None:
        """Half of `front_seconds` lies before the engine. `luck` gives each turn its place among those like it."""
        self.scheduler = engine.scheduler()
        self.busy_seconds = 0.0
        self.in_flight = 0  # as a balancer in front sees it
        self._model = model
        self._way = front_seconds / 2
        self._luck = luck
        self._arrivals: deque[tuple[float, Request]] = deque()
        self._served: dict[Request, Served] = {}
        self._step: Step | None = None  # that runs now, until `_end`
        self._began = self._end = 0.0
        self._number = 0

    def warm_up(self) -> None:
        """Bursts of requests before the clock starts: a server that has been up has learned what its steps cost."""
        capacity = self.scheduler.cache.capacity
        prompt = min(WARM_UP[0], capacity // 2)
        for clients in (2**n for n in range(self.scheduler.max_running.bit_length())):
            for _ in range(clients):
                self.submit(Visit(self._end, prompt, min(WARM_UP[1], capacity - prompt)))
            self.run(math.inf)
        self.busy_seconds = self._began = self._end = 0.0

    def submit(self, visit: Visit) -> Served:
        """A request comes at `visit.arrival`, up to which the replica has been run."""
        served = Served(visit)
        if len(self._arrivals) >= self.scheduler.room:
            served.refused = True
            return served
        self._number += 1
        first = self._number * self.scheduler.cache.capacity  # tokens that no other prompt has: nothing is shared
        request = Request(
            id=str(self._number),
            prompt=list(range(first, first + visit.prompt)),
            params=SamplingParams(max_tokens=visit.output, temperature=0, ignore_eos=True),
            channel=NoChannel(),
            arrival=visit.arrival + self._way,
        )
        self._served[request] = served
        self._arrivals.append((request.arrival, request))
        self.in_flight += 1
        return served

    def run(self, until: float) -> None:
        """Everything that happens before `until`."""
        while True:
            if self._step is not None:
                if self._end > until:
                    return
                self._complete(self._step)
            else:
                start = self._end
                if self.scheduler.idle:
                    if not self._arrivals:
                        return
                    start = max(start, self._arrivals[0][0])
                if start >= until:
                    return
                self._begin(start)

    def _begin(self, now: float) -> None:
        while self._arrivals and self._arrivals[0][0] <= now:
            self.scheduler.waiting.append(self._arrivals.popleft()[1])
        self._step = self.scheduler.schedule(now)
        assert self._step.requests
        for request in self._step.admitted:
            self._served[request].waited = now - request.arrival
        self._began = now
        self._end = now + self._model.seconds(self._step, self._luck())

    def _complete(self, step: Step) -> None:
        scheduler, seconds = self.scheduler, self._end - self._began
        self.busy_seconds += seconds
        self._step = None
        scheduler.advance(step)
        for request in step.requests:
            if request.num_pending:
                continue  # there is more of the prompt to come
            request.output.append(0)
            self._served[request].tokens.append(self._end + self._way)
            if len(request.output) == request.params.max_tokens:
                scheduler.remove(request)
                del self._served[request]
                self.in_flight -= 1
        scheduler.cost.observe(len(step.plan.tokens), seconds, step.num_prompt_tokens, step.scored)

    def check(self) -> None:
        """The conservation laws, once all is done."""
        assert self.scheduler.idle
        assert not self._arrivals
        assert not self._served
        assert self.in_flight == 0
        self.scheduler.cache.check()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What clients saw of a run. Seconds; the first `skipped` requests, which found it empty, do not count."""

    ttft: np.ndarray
    itl: np.ndarray  # pooled over requests
    tpot: np.ndarray
    e2e: np.ndarray
    refused: int
    requests_per_second: float
    tokens_per_second: float
    utilisation: float  # share of the time in which an engine had something to do
    waiting: float  # requests that waited for a slot, on average, by replica

    def figure(self, metric: str, statistic: str) -> float:
        """Seconds: `statistic` is "mean" or a percentile such as "p95". Without any such value 0."""
        values = getattr(self, metric)
        if not len(values):
            return 0.0
        return float(values.mean() if statistic == "mean" else np.percentile(values, float(statistic[1:])))


def simulate(
    profile: Profile,
    visits: Sequence[Visit],
    *,
    replicas: int = 1,
    balance: Balance = "least",
    seed: int = 0,
    skipped: int = 0,
) -> Outcome:
    """Serve `visits`, in the order of their arrival, by so many replicas of one size, to the last token.

    `balance`: each request goes to a replica by chance, to the next in turn, or to that with the fewest in flight.
    """
    luck = np.random.default_rng(seed)
    fleet = [Replica(profile.engine, profile.model, profile.front_seconds, luck.random) for _ in range(replicas)]
    for replica in fleet:
        replica.warm_up()
    chance = np.random.default_rng(seed + 1)
    served: list[Served] = []
    for number, visit in enumerate(visits):
        for replica in fleet:
            replica.run(visit.arrival)
        if balance == "least":
            chosen = min(fleet, key=lambda replica: replica.in_flight)
        else:
            chosen = fleet[number % replicas if balance == "round-robin" else int(chance.integers(replicas))]
        served.append(chosen.submit(visit))
    for replica in fleet:
        replica.run(math.inf)
        replica.check()
    return _outcome(served, skipped, replicas, sum(replica.busy_seconds for replica in fleet))


def _outcome(served: list[Served], skipped: int, replicas: int, busy_seconds: float) -> Outcome:
    done = [one for one in served if not one.refused]
    end = max((one.tokens[-1] for one in done), default=0.0)
    begin = min((one.visit.arrival for one in done), default=0.0)
    duration = max(end - begin, 1e-9)
    counted = [one for one in served[skipped:] if not one.refused]
    first = [one.tokens[0] - one.visit.arrival for one in counted]
    gaps = [np.diff(one.tokens) for one in counted]
    return Outcome(
        ttft=np.array(first),
        itl=np.concatenate(gaps) if gaps else np.array([]),
        tpot=np.array([gap.mean() for gap in gaps if len(gap)]),
        e2e=np.array([one.tokens[-1] - one.visit.arrival for one in counted]),
        refused=sum(one.refused for one in served),
        requests_per_second=len(done) / duration,
        tokens_per_second=sum(len(one.tokens) for one in done) / duration,
        utilisation=busy_seconds / duration / replicas,
        waiting=sum(one.waited for one in done) / duration / replicas,  # Little's law
    )
