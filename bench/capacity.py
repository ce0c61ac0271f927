"""`python -m bench.capacity --model DIR`: is the plan right? The simulation against the server, request by request.

The real server, which notes its turns, is asked through HTTP. A closed loop says how much it can do at all; then an
open loop of Poisson arrivals asks for a share of that, whatever is still unanswered. The same arrivals and lengths are
simulated, by a profile that is measured in parts before, between and after these levels, as `bench.step_cost` does.

A shared host's speed drifts from minute to minute, which no plan can know. So it is told apart: how much longer than by
the profile the turns of each level took, and what the plan would have said had it known.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from bench.step_cost import Measured, Traced, measure
from deploy.capacity_profile import Profile
from deploy.errors import DeployError
from deploy.simulation import Outcome, simulate
from deploy.workload import Lengths, Visit, Workload
from proto.manifest import ManifestError
from serve.machine import cpu_quota
from train.tables import aligned

SHARES = (0.3, 0.6, 0.85)  # of what the server can do at all
CLIENTS = 32  # of the closed loop that finds that
ROUNDS = 5  # requests of each; the first and the last are not counted, when not all are there
REFUSED = b"HTTP/1.1 503 "
COMPARED = ("ttft_mean", "ttft_p50", "ttft_p95", "ttft_p99", "itl_mean", "itl_p50", "itl_p99")
FIGURES = (*(f"{name}_ms" for name in COMPARED), "tokens_per_second")


@dataclass(frozen=True, slots=True)
class Replay:
    """Visits as they really were sent, seconds after the first was due, and what became of them."""

    visits: list[Visit]
    timings: list[Timing | None]  # None: refused, since the queue was full

    def figures(self) -> dict[str, float]:
        """Of the answers, as `figures_of` an outcome."""
        answered = [(visit, timing) for visit, timing in zip(self.visits, self.timings, strict=True) if timing]
        first = np.array([timing.arrivals[0] for _, timing in answered])
        gaps = np.concatenate([np.diff(timing.arrivals) for _, timing in answered])
        tokens = sum(timing.output_tokens for _, timing in answered)
        seconds = max(visit.arrival + timing.arrivals[-1] for visit, timing in answered) - self.visits[0].arrival
        return {
            **spread("ttft", first),
            **spread("itl", gaps),
            "tokens_per_second": tokens / seconds,
            "refused": len(self.visits) - len(answered),
        }

    def raw(self) -> list[str]:
        """For each request: seconds at which it was sent, tokens of prompt and answer, TTFT, time to the last token."""
        return [
            f"{visit.arrival:.4f} {visit.prompt} {visit.output} "
            + (f"{timing.arrivals[0]:.4f} {timing.arrivals[-1]:.4f}" if timing else "refused")
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
        "refused": outcome.refused,
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
    return Replay([sent[number] for number in order], [answer_of(exchanges[number]) for number in order])


def answer_of(one: Exchange) -> Timing | None:
    """None if it was refused with 503. Raises BadAnswer for any other failure."""
    return None if one.pieces and one.pieces[0][1].startswith(REFUSED) else read(one)


def ask(server: Server, visits: Sequence[Visit], seed: int) -> list[bytes]:
    source = random.Random(seed)
    return [request_bytes(Load(visit.prompt, visit.output, 1), server.model, source) for visit in visits]


def saturated(server: Server, visits: Sequence[Visit]) -> float:
    """Requests a second of a closed loop of CLIENTS while all of them are there."""
    run = uvloop.run(drive(server.port, ask(server, visits, 0), CLIENTS))
    ends = sorted(one.sent + read(one).arrivals[-1] for one in run.exchanges)[CLIENTS:-CLIENTS]
    return (len(ends) - 1) / (ends[-1] - ends[0])


def compare(profile: Profile, replay: Replay, times: float) -> dict[str, Any]:
    """Measured; planned; and planned by turns that take so many times as long. Errors are shares of the measured."""
    measured = replay.figures()
    found: dict[str, Any] = {"measured": measured}
    for name, model in (("planned", profile.model), ("at_its_speed", profile.model.scaled(times))):
        outcome = simulate(msgspec.structs.replace(profile, model=model), replay.visits)
        told = {**figures_of(outcome), "utilisation": outcome.utilisation, "waiting": outcome.waiting}
        found[name] = told | {"error": {key: told[key] / measured[key] - 1 for key in FIGURES if measured[key]}}
    return found


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


@dataclass(slots=True)
class Session:
    """What clients saw of the server, and when."""

    about: str = ""  # what the server says of itself
    most: float = 0.0  # requests a second
    profiled: Measured = field(default_factory=Measured)
    levels: list[tuple[Measured, Replay]] = field(default_factory=list)


def measure_all(args: argparse.Namespace, workload: Workload, traced: Traced) -> Session:
    """Parts of the profile, and levels between them. No prompt is sent twice: its beginning would be reused."""
    session = Session()
    with traced.server as server:
        session.about, capacity = traced.about(), traced.manifest.architecture.max_context
        most = session.most = saturated(server, workload.visits(ROUNDS * CLIENTS, 1.0, capacity))
        note(f"a closed loop of {CLIENTS}: {60 * most:.0f} requests a minute")
        for number, share in enumerate(tqdm((*SHARES, 0.0), unit="level", disable=None)):
            session.profiled += measure(server, args.profile_seconds, seed=number)
            if share:
                visits = workload.visits(max(int(share * most * args.seconds), 10), share * most, capacity)
                requests, began = ask(server, visits, seed=len(SHARES) + 2 + number), time.perf_counter()
                replay = uvloop.run(open_loop(server.port, visits, requests))
                session.levels.append((Measured([(began, time.perf_counter())]), replay))
                note(f"{share:.0%}: {json.dumps(replay.figures())}")
    return session


def main() -> None:
    args = parse()
    workload = Workload(Lengths.parse(args.prompt), Lengths.parse(args.output))
    document: dict[str, Any] = {"machine": describe(), "arguments": sys.argv[1:]}
    with tempfile.TemporaryDirectory(prefix="pawl-bench-") as scratch:
        traced = Traced(args.model, cpu_quota()[0], Path(scratch) / "trace.json")
        session = measure_all(args, workload, traced)
        profile = traced.profile(session.about, session.profiled)
        slower = [profile.model.slower(*traced.turns(when)) for when, _ in session.levels]
    document |= {"about": session.about, "prompt": args.prompt, "output": args.output}
    document |= {"saturated_per_minute": 60 * session.most, "fit": msgspec.to_builtins(profile.fit)}
    document["levels"] = [
        {
            "share": share,
            "per_minute": 60 * share * session.most,
            "requests": len(replay.visits),
            "turns_over_profile": times,
            **compare(profile, replay, times),
        }
        for share, times, (_, replay) in zip(SHARES, slower, session.levels, strict=True)
    ]
    print(table(document["levels"]))
    if args.profile_out:
        profile.save(args.profile_out)
    if args.out:
        for told, (_, replay) in zip(document["levels"], session.levels, strict=True):
            told["raw"] = replay.raw()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(without_folders(json.dumps(document, indent=1)) + "\n")


def table(levels: list[dict[str, Any]]) -> str:
    """A line a level and figure."""
    head = ["level, figure", "a minute", "measured", "planned", "error", "turns took", "planned by that", "error"]
    rows = []
    for one in levels:
        for name in FIGURES:
            errors = [f"{one[way]['error'].get(name, math.inf):+.0%}" for way in ("planned", "at_its_speed")]
            rows.append(
                [
                    f"{one['share']:.0%} {name.removesuffix('_ms').replace('_', ' ')}",
                    f"{one['per_minute']:.0f}",
                    f"{one['measured'][name]:.0f}",
                    f"{one['planned'][name]:.0f}",
                    errors[0],
                    f"x {one['turns_over_profile']:.2f}",
                    f"{one['at_its_speed'][name]:.0f}",
                    errors[1],
                ]
            )
    return aligned(head, rows)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended too
    try:
        main()
    except (BadAnswer, DeployError, ManifestError, ServerError) as error:
        sys.exit(f"bench.capacity: {error}")
