"""`python -m bench.traced_server FILE ARGUMENTS...`: `python -m serve` that writes down its engine's turns.

FILE gets, when the server ends, how the engine was set up; for each turn when it began, how long it took until the
next one began, and what it had of each term of `deploy.step_model`; for each request when it came and when the engine
had its first token. Times are of the monotonic clock, which is the same for all processes. A turn behind which the
engine waited for work is left out: nobody knows when it ended.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.step_model import terms
from serve import forms
from serve.__main__ import main as serve
from serve.block_cache import BlockCache
from serve.cache import Cache
from serve.request import Request
from serve.scheduler import Scheduler, Step


@dataclass(slots=True)
class Trace:
    engine: dict[str, Any] = field(default_factory=dict)
    turns: list[tuple[float, float, list[float]]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        requests = [(request.arrival, request.first_token) for request in self.requests if request.first_token]
        return {"engine": self.engine, "turns": self.turns, "requests": requests}


TRACE = Trace()


class TracedScheduler(Scheduler):
    """The scheduler, which notes what it plans."""

    def __init__(self, cache: Cache, **settings: Any) -> None:
        super().__init__(cache, **settings)
        blocks = cache.num_blocks if isinstance(cache, BlockCache) else 0
        TRACE.engine = {**settings, "capacity": cache.capacity, "num_blocks": blocks}
        del TRACE.engine["speculate"], TRACE.engine["ahead"]
        self._last: tuple[float, list[float]] | None = None

    def schedule(self, now: float) -> Step:
        busy = bool(self.running)
        step = super().schedule(now)
        if self._last is not None and busy:
            began, amounts = self._last
            TRACE.turns.append((began, now - began, amounts))
        self._last = (now, terms(step)) if step.requests else None
        TRACE.requests += step.admitted
        return step


def main() -> int:
    path, *arguments = sys.argv[1:]
    vars(forms)["Scheduler"] = TracedScheduler  # `forms` puts scheduler and runner together
    sys.argv = ["serve", *arguments]
    status = serve()
    Path(path).write_text(json.dumps(TRACE.document()))
    return status


if __name__ == "__main__":
    sys.exit(main())
