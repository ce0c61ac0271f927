"""`python -m bench.capacity --model DIR`: is the plan right? The simulation against the server, request by request.

Two servers are started, of which one is frozen while the other is asked. One writes down its turns, from which comes
the profile that `deploy plan` simulates with; it is measured before, between and after the runs, since a shared host's
speed drifts. The other is `python -m serve` as it stands: a closed loop says how much it can do at all, then an open
loop of Poisson arrivals asks for a share of that, whatever is still unanswered. The same arrivals and lengths are
simulated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop
from tqdm import tqdm

from bench.connection import BadAnswer, Exchange, exchange
from bench.load import HOST, drive, request_bytes
from bench.machine import describe, without_folders
from bench.row import Load
from bench.score import Timing, read
from bench.server import Server, ServerError
from bench.step_cost import Measured, Traced, measure, serve_command
from deploy.capacity_profile import Profile
from deploy.errors import DeployError
from deploy.simulation import Outcome, simulate
from deploy.workload import Lengths, Visit, Workload
from proto.manifest import ManifestError
from serve.machine import cpu_quota
from train.tables import aligned

SHARES = (0.3, 0.6, 0.85)  # of what the server can do at all
CLIENTS = 32  # of the closed loop that finds that
COMPARED = ("ttft_mean", "ttft_p50", "ttft_p95", "ttft_p99", "itl_mean", "itl_p50", "itl_p99")
FIGURES = (*(f"{name}_ms" for name in COMPARED), "tokens_per_second")


@dataclass(frozen=True, slots=True)
class Replay:
    """Visits as they really were sent, seconds after the first was due, and what became of them."""

    visits: list[Visit]
    timings: list[Timing]

    def figures(self) -> dict[str, float]:
        """Of the answers, as `figures_of` an outcome."""
        ends = [visit.arrival + timing.arrivals[-1] for visit, timing in zip(self.visits, self.timings, strict=True)]
        first = np.array([timing.arrivals[0] for timing in self.timings])
        gaps = np.concatenate([np.diff(timing.arrivals) for timing in self.timings])
        tokens = sum(timing.output_tokens for timing in self.timings)
        seconds = max(ends) - self.visits[0].arrival
        return {**spread("ttft", first), **spread("itl", gaps), "tokens_per_second": tokens / seconds}

    def raw(self) -> list[str]:
        """For each request: seconds at which it was sent, tokens of prompt and answer, TTFT, time to the last token."""
        return [
            f"{visit.arrival:.4f} {visit.prompt} {visit.output} {timing.arrivals[0]:.4f} {timing.arrivals[-1]:.4f}"
            for visit, timing in zip(self.visits, self.timings, strict=True)
        ]


def spread(metric: str, seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    values = 1000 * np.asarray(seconds)
    percentiles = {f"{metric}_p{q}_ms": float(np.percentile(values, q)) for q in (50, 95, 99)}
    return {f"{metric}_mean_ms": float(values.mean()), **percentiles}


def figures_of(outcome: Outcome) -> dict[str, float]:
    return {
        **spread("ttft", outcome.ttft),
        **spread("itl", outcome.itl),
        "tokens_per_second": outcome.tokens_per_second,
    }


async def open_loop(port: int, visits: Sequence[Visit], requests: Sequence[bytes]) -> Replay:
    """Send each request when it is due, whatever is still unanswered. Raises BadAnswer if one fails."""
    began = time.perf_counter()
    tasks: list[asyncio.Task[Exchange]] = []
    for visit, request in zip(visits, requests, strict=True):
        await asyncio.sleep(began + visit.arrival - time.perf_counter())
        tasks.append(asyncio.create_task(exchange(HOST, port, request)))
    exchanges = await asyncio.gather(*tasks)
    sent = [Visit(one.sent - began, v.prompt, v.output) for one, v in zip(exchanges, visits, strict=True)]
    order = sorted(range(len(sent)), key=lambda number: sent[number].arrival)
    return Replay([sent[number] for number in order], [read(exchanges[number]) for number in order])


def ask(server: Server, visits: Sequence[Visit], seed: int) -> list[bytes]:
    source = random.Random(seed)
    return [request_bytes(Load(visit.prompt, visit.output, 1), server.model, source) for visit in visits]


def saturated(server: Server, visits: Sequence[Visit]) -> float:
    """Requests a second of a closed loop of CLIENTS."""
    run = uvloop.run(drive(server.port, ask(server, visits, 0), CLIENTS))
    for one in run.exchanges:
        read(one)
    return len(visits) / run.duration


def level(server: Server, workload: Workload, rate: float, seconds: float, capacity: int) -> Replay:
    visits = workload.visits(max(int(rate * seconds), 10), rate, capacity)
    return uvloop.run(open_loop(server.port, visits, ask(server, visits, 1)))


def compare(profile: Profile, replay: Replay) -> dict[str, Any]:
    """Measured, simulated, and the simulated figures over the measured ones, less 1."""
    found, told = replay.figures(), figures_of(outcome := simulate(profile, replay.visits))
    errors = {name: told[name] / found[name] - 1 for name in FIGURES if found[name]}
    rest = {"utilisation": outcome.utilisation, "waiting": outcome.waiting}
    return {"measured": found, "simulated": {**told, **rest}, "error": errors}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="our artifact")
    parser.add_argument("--prompt", default="64-256", help="tokens, as deploy plan takes them (default: %(default)s)")
    parser.add_argument("--output", default="32-96", help="tokens, the same (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=75.0, help="of each level (default: %(default)s)")
    parser.add_argument("--profile-seconds", type=float, default=20.0, help="each of four times (default: %(default)s)")
    parser.add_argument("--profile-out", type=Path, help="file for the profile")
    parser.add_argument("--out", type=Path, help="file for the whole result")
    return parser.parse_args()


def main() -> None:
    args = parse()
    workload = Workload(Lengths.parse(args.prompt), Lengths.parse(args.output))
    lengths = {"prompt": args.prompt, "output": args.output}
    document: dict[str, Any] = {"machine": describe(), "arguments": sys.argv[1:], **lengths}
    traced = Traced(args.model, cpu_quota()[0])
    plain = Server("pawl", partial(serve_command("serve"), args.model))
    measured = Measured()
    replays: list[tuple[float, float, Replay]] = []
    with traced.server as noting:
        about, capacity = traced.about(), traced.manifest.architecture.max_context
        noting.freeze()
        with plain:
            visits = workload.visits(4 * CLIENTS, 1.0, capacity)
            most = saturated(plain, visits)
            print(f"a closed loop of {CLIENTS}: {60 * most:.0f} requests a minute", file=sys.stderr)
            plain.freeze()
            for share in tqdm((*SHARES, 0.0), unit="level", disable=None):
                noting.thaw()
                measure(noting, args.profile_seconds, measured)
                noting.freeze()
                if share:
                    plain.thaw()
                    replays.append((share, share * most, level(plain, workload, share * most, args.seconds, capacity)))
                    plain.freeze()
    profile = traced.profile(about, measured)
    document |= {"about": about, "saturated_per_minute": 60 * most, "fit": msgspec.to_builtins(profile.fit)}
    document["levels"] = [
        {"share": share, "per_minute": 60 * rate, "requests": len(replay.visits), **compare(profile, replay)}
        for share, rate, replay in replays
    ]
    print(table(document["levels"]))
    if args.profile_out:
        profile.save(args.profile_out)
    if args.out:
        for one, (_, _, replay) in zip(document["levels"], replays, strict=True):
            one["raw"] = replay.raw()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(without_folders(json.dumps(document, indent=1)) + "\n")


def table(levels: list[dict[str, Any]]) -> str:
    head = ["of its capacity", "a minute", "requests"]
    for name in FIGURES:
        head += [name.removesuffix("_ms").replace("_", " "), "told", "error"]
    rows = []
    for one in levels:
        cells = [f"{one['share']:.0%}", f"{one['per_minute']:.0f}", str(one["requests"])]
        for name in FIGURES:
            cells += [
                f"{one['measured'][name]:.0f}",
                f"{one['simulated'][name]:.0f}",
                f"{one['error'].get(name, math.inf):+.0%}",
            ]
        rows.append(cells)
    return aligned(head, rows)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended too
    try:
        main()
    except (BadAnswer, DeployError, ManifestError, ServerError) as error:
        sys.exit(f"bench.capacity: {error}")
