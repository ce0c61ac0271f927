"""One process of a peer's own interpreter: its engine, made for some loads, in the loop that measures every engine.

`python -m bench.peers.NAME_loop OPTIONS` takes its options as JSON and prints, as its last line, a JSON list with the
figures of each load. The rest of its output is the peer's.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bench.loop import Steps, measure, most_tokens
from bench.peers.environment import Environment, run
from bench.row import Load, Row

WARM_UP = Load(64, 8, 1)  # first runs allocate
BLOCK = 128  # tokens; caches are handed out in blocks of this or less


@dataclass(frozen=True, slots=True)
class Options:
    """`choices` is the peer's own."""

    model: str
    threads: int
    loads: list[Load]
    choices: dict[str, Any]

    @property
    def streams(self) -> int:
        return max(load.concurrency for load in self.loads)

    @property
    def context(self) -> int:
        """Tokens of the longest request."""
        return max(load.input_len + most_tokens(load) for load in [WARM_UP, *self.loads])

    @property
    def cache_tokens(self) -> int:
        """Room for all requests together."""
        return self.streams * (self.context + BLOCK)


def answer(make: Callable[[Options], Steps]) -> None:
    """The whole of a peer's main program."""
    given = json.loads(sys.argv[1])
    options = Options(**given | {"loads": [Load(**load) for load in given["loads"]]})
    engine, source = make(options), random.Random(0)
    measure(engine, WARM_UP, source)
    print(json.dumps([measure(engine, load, source) for load in options.loads]))


def rows(
    system: str, environment: Environment, module: str, options: Options, variables: dict[str, str] | None = None
) -> list[Row]:
    """Run `module` in the peer's environment: an engine row for each load."""
    output = run([environment.python, "-m", module, json.dumps(asdict(options))], variables)
    figures = json.loads(output.strip().splitlines()[-1])
    return [Row(system, "engine", load, figure) for load, figure in zip(options.loads, figures, strict=True)]
