"""`python -m bench.step_cost --model DIR --out FILE`: measure how long the turns of a server's engine take.

The real server answers clients through HTTP, 1 to 32 at a time, with prompts and answers of many lengths, and writes
down each turn; the profile that is fitted to them is what `python -m deploy plan` reads. The clients run on the same
machine and cost it a little, as a proxy there would. `--processors 1` gives the server one processor, as a container
with such a limit would have.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from tqdm import tqdm

from bench.connection import BadAnswer
from bench.load import Run, drive, request_bytes
from bench.machine import describe
from bench.row import Load
from bench.score import read
from bench.server import Server, ServerError
from deploy.capacity_profile import FORMAT, EngineShape, Profile
from deploy.errors import DeployError
from deploy.step_model import TERMS, fit
from proto.manifest import ManifestError
from proto.manifest import load as load_manifest
from serve.machine import cpu_quota

Range = tuple[int, int]
# Clients, and tokens of their prompts and answers, log-uniform between these: rows that decode, up to all slots; then
# prompts beside few rows, which is all that a server's bound on latency lets run together.
LOADS: tuple[tuple[tuple[int, ...], Range, Range], ...] = (
    ((1, 2, 4, 8, 16, 32), (8, 64), (64, 128)),
    ((1, 2, 4, 8), (8, 1500), (8, 128)),
)


@dataclass(slots=True)
class Measured:
    """When it was measured, and the clients' times to the first token."""

    windows: list[tuple[float, float]] = field(default_factory=list)
    client_ttft: list[float] = field(default_factory=list)

    def __add__(self, other: Measured) -> Measured:
        return Measured(self.windows + other.windows, self.client_ttft + other.client_ttft)

    def note(self, began: float, run: Run) -> None:
        self.windows.append((began, time.perf_counter()))
        self.client_ttft += [read(exchange).arrivals[0] for exchange in run.exchanges]

    def inside(self, moment: float) -> bool:
        return any(begin <= moment <= end for begin, end in self.windows)


def serve_command(*module: str) -> Callable[[Path, int, Path], list[str]]:
    """The server's command line, with its defaults, for an artifact, a port and a folder for scratch files."""

    def command(model: Path, port: int, scratch: Path) -> list[str]:
        options = {"model": model, "http-port": port, "grpc-port": 0, "records": scratch / "records.sqlite"}
        given = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
        # random prompts end in repetitions, which drafts would answer several tokens at a time
        return [sys.executable, "-m", *module, "--no-speculate", *given]

    return command


class Traced:
    """A traced server on an artifact, which gives profiles once it has ended. Its turns go into `trace`."""

    def __init__(self, model: Path, processors: int, trace: Path, arguments: Sequence[str] = ()) -> None:
        self.manifest = load_manifest(model)
        self.processors = processors
        self.server = Server("pawl", self._command)
        self.trace = trace
        self._model = model
        self._arguments = arguments

    def _command(self, port: int, scratch: Path) -> list[str]:
        return [
            *("taskset", "-c", f"0-{self.processors - 1}"),
            *serve_command("bench.traced_server", str(self.trace))(self._model, port, scratch),
            *self._arguments,
        ]

    def about(self) -> str:
        """What the server said of itself: form, threads, slots, cache."""
        found = re.search(r"^ready in .* serve \S+ (.*)$", self.server.last_output(), re.MULTILINE)
        return found[1] if found else ""

    def profile(self, about: str, measured: Measured) -> Profile:
        """Of what was measured while the server ran. Raises DeployError if that was too little."""
        model, quality = fit(*self.turns(measured))
        engine_ttft = [first - came for came, first in self._noted["requests"] if measured.inside(came)]
        return Profile(
            format=FORMAT,
            name=self.manifest.name,
            digest=self.manifest.digest,
            about=about,
            processors=self.processors,
            engine=EngineShape(**self._noted["engine"]),
            front_seconds=float(np.mean(measured.client_ttft) - np.mean(engine_ttft)),
            model=model,
            fit=quality,
            machine=describe(),
        )

    def turns(self, measured: Measured) -> tuple[list[list[float]], list[float]]:
        """What the turns in that time had of each term, and how long they took."""
        turns = [turn for turn in self._noted["turns"] if measured.inside(turn[0])]
        return [amounts for *_, amounts in turns], [seconds for _, seconds, _ in turns]

    @cached_property
    def _noted(self) -> dict[str, Any]:
        """What the server wrote down when it ended."""
        document: dict[str, Any] = json.loads(self.trace.read_text())
        return document


def measure(server: Server, seconds: float, seed: int = 0) -> Measured:
    """Closed loops of clients for `seconds`, and until they all are answered. Another seed makes other prompts."""
    measured, source = Measured(), random.Random(seed)
    loads = [(clients, prompts, answers) for many, prompts, answers in LOADS for clients in many]
    for clients, prompts, answers in tqdm(loads, unit="load", disable=None):
        began = time.perf_counter()
        requests = ask_until(began + seconds / len(loads), server.model, prompts, answers, source)
        measured.note(began, uvloop.run(drive(server.port, requests, clients)))
    return measured


def ask_until(end: float, model: str, prompts: Range, answers: Range, source: random.Random) -> Iterator[bytes]:
    """Requests of many lengths; none after `end`, on the clock."""

    def length(low: int, high: int) -> int:
        return round(math.exp(source.uniform(math.log(low), math.log(high))))

    while time.perf_counter() < end:
        yield request_bytes(Load(length(*prompts), length(*answers), 1), model, source)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step_cost", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="our artifact")
    parser.add_argument("--processors", type=int, default=cpu_quota()[0], help="of the server (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=90.0, help="to measure for, about (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="file for the profile")
    parser.add_argument("--trace", type=Path, help="file to keep the turns themselves in, to fit other terms to")
    parser.add_argument("serve", nargs="*", help="arguments of python -m serve, behind --")
    args = parser.parse_args()
    if not 1 <= args.processors <= cpu_quota()[0]:
        parser.error(f"--processors {args.processors} is not from 1 to the {cpu_quota()[0]} that there are")
    return args


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory(prefix="pawl-bench-") as scratch:
        traced = Traced(args.model, args.processors, args.trace or Path(scratch) / "trace.json", args.serve)
        with traced.server:
            about = traced.about()
            measured = measure(traced.server, args.seconds)
        profile = traced.profile(about, measured)
    profile.save(args.out)
    print(as_text(profile))


def as_text(profile: Profile) -> str:
    lines = [f"{profile.name} {profile.about}", f"outside the engine: {1000 * profile.front_seconds:.2f} ms a request"]
    lines += [f"{1e6 * each:12.3f} us  {name}" for name, each in zip(TERMS, profile.model.seconds_each, strict=True)]
    fit = profile.fit
    lines.append(
        f"{fit.turns} turns of {fit.total_seconds:.0f} s: half are told within {fit.median_error:.1%}, 90 % within "
        f"{fit.p90_error:.1%}; sums of groups:"
    )
    lines += [f"{bias:+12.1%}  {name}" for name, bias in fit.bias.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended too
    try:
        main()
    except (BadAnswer, DeployError, ManifestError, ServerError) as error:
        sys.exit(f"bench.step_cost: {error}")
