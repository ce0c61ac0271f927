"""What is to be kept: percentiles of the times that clients see."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deploy.errors import DeployError
from deploy.simulation import Outcome

METRICS = {
    "ttft": "from the send to the first token",
    "itl": "between two tokens, over all requests together",
    "tpot": "a request's mean time for each token after the first",
    "e2e": "from the send to the last token",
}


@dataclass(frozen=True, slots=True)
class Objective:
    """`statistic` ("mean" or "p95") of `metric` is at most so many milliseconds."""

    metric: str
    statistic: str
    milliseconds: float

    @classmethod
    def parse(cls, text: str) -> Objective:
        """`ttft:p95:500`. Raises DeployError with what is understood."""
        found = re.fullmatch(r"(\w+):(mean|p(\d{1,2}(?:\.\d+)?)):(\d+(?:\.\d+)?)", text)
        if not found or found[1] not in METRICS or float(found[4]) <= 0:
            raise DeployError(
                f"{text!r} is no objective; give METRIC:STATISTIC:MILLISECONDS such as ttft:p95:500, with one of "
                f"{', '.join(METRICS)} and mean or a percentile such as p99"
            )
        return cls(found[1], found[2], float(found[4]))

    def measured(self, outcome: Outcome) -> float:
        """Milliseconds."""
        return 1000 * outcome.figure(self.metric, self.statistic)

    def __str__(self) -> str:
        return f"{self.metric.upper()} {self.statistic} of {self.milliseconds:g} ms at most"


def broken(objectives: tuple[Objective, ...], outcome: Outcome) -> list[str]:
    """What a run did not keep. A refused request breaks every promise."""
    late = [
        f"{each}, but it is {measured:.0f} ms"
        for each in objectives
        if (measured := each.measured(outcome)) > each.milliseconds
    ]
    return late + ([f"{outcome.refused} requests were refused"] if outcome.refused else [])
