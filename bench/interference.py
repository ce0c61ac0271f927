"""`python -m bench.interference`: what long prompts do to those who are reading.

Streams of one server run side by side. Their inter-token latency is taken for some seconds without company, then for as
long again while a long prompt arrives each second that asks for one token. Prints one JSON object a system.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from bench.connection import BadAnswer, Connection, Exchange, exchange
from bench.load import HOST, request_bytes
from bench.machine import describe, without_folders
from bench.pawl import Pawl
from bench.peers.environment import PeerError
from bench.peers.roster import PEERS
from bench.row import Load
from bench.score import read
from bench.server import Server, ServerError
from bench.system import System
from proto.manifest import ManifestError

INTERVAL_SECONDS = 1.0  # between long prompts
SETTLE_SECONDS = 1.0  # from the last stream's first token to the quiet phase
POLL_SECONDS = 0.05
STREAM_PROMPT = 130  # tokens


@dataclass(frozen=True, slots=True)
class Phases:
    """Clock readings: the quiet phase is from `quiet` to `noisy`, the other from there to `end`."""

    quiet: float
    noisy: float
    end: float


async def drive(port: int, model: str, streams: list[bytes], long: Load, seconds: float) -> dict[str, Any]:
    """Both phases against a running server. The connections that are still open at the end are closed."""
    connections = [await start(port, request) for request in streams]
    while not all(started(connection.exchange) for connection in connections):
        if any(connection.closed for connection in connections):
            raise BadAnswer("a stream ended before all had begun; see the server's limits on slots and context")
        await asyncio.sleep(POLL_SECONDS)
    await asyncio.sleep(SETTLE_SECONDS)
    quiet, source = time.perf_counter(), random.Random(1)
    await asyncio.sleep(seconds)
    noisy = time.perf_counter()
    arriving: list[asyncio.Task[Exchange]] = []
    while (now := time.perf_counter()) < noisy + seconds:
        arriving.append(asyncio.create_task(exchange(HOST, port, request_bytes(long, model, source))))
        await asyncio.sleep(min(INTERVAL_SECONDS, noisy + seconds - now))
    phases = Phases(quiet, noisy, time.perf_counter())
    answered = [task.result() for task in arriving if task.done()]
    while time.perf_counter() < phases.end + seconds and not all(
        connection.closed or connection.exchange.pieces[-1][0] > phases.end for connection in connections
    ):
        await asyncio.sleep(POLL_SECONDS)
    ended = sum(connection.closed for connection in connections)
    for task in arriving:
        task.cancel()
    for connection in connections:
        connection.close()
    await asyncio.gather(*arriving, *(connection.ended() for connection in connections), return_exceptions=True)
    return score([connection.exchange for connection in connections], phases) | {
        "streams_ended_early": ended,
        "long_prompts_sent": len(arriving),
        **score_long(answered),
    }


async def start(port: int, request: bytes) -> Connection:
    transport, connection = await asyncio.get_running_loop().create_connection(Connection, HOST, port)
    connection.exchange.sent = time.perf_counter()
    transport.write(request)
    return connection


def started(exchange: Exchange) -> bool:
    return any(b"data: " in piece for _, piece in exchange.pieces)


def score(streams: list[Exchange], phases: Phases) -> dict[str, Any]:
    """Gaps between successive events of a stream: quiet, those within that phase; noisy, those that touch the other."""
    gaps = [
        pair for exchange in streams for pair in itertools.pairwise(time for time, _ in exchange.events(whole=False))
    ]
    quiet = _figures([b - a for a, b in gaps if phases.quiet <= a and b < phases.noisy], phases.noisy - phases.quiet)
    noisy = _figures([b - a for a, b in gaps if phases.noisy <= b and a < phases.end], phases.end - phases.noisy)
    ratios = {f"{key}_ratio": noisy[key] / quiet[key] for key in ("median_itl_ms", "p99_itl_ms") if quiet[key]}
    return {"streams": len(streams), "quiet": quiet, "noisy": noisy, **ratios}


def score_long(answered: list[Exchange]) -> dict[str, Any]:
    """How many long prompts had their whole answer before the end, and how long the median of these took."""
    waits = []
    errors = set()
    for one in answered:
        try:
            waits.append(read(one).arrivals[0])
        except BadAnswer as error:
            errors.add(str(error))
    median = {"long_prompt_median_ttft_ms": 1e3 * float(np.median(waits))} if waits else {}
    return {"long_prompts_answered": len(waits), **median, "errors": sorted(errors)}


def _figures(gaps: list[float], seconds: float) -> dict[str, float]:
    values = np.array(gaps or [0.0]) * 1e3
    return {
        "tokens_per_second": len(gaps) / seconds,
        "median_itl_ms": float(np.median(values)),
        "p99_itl_ms": float(np.percentile(values, 99)),
        "max_itl_ms": float(values.max()),
    }


def measure(server: Server, streams: Load, long: Load, seconds: float) -> dict[str, Any]:
    with server:
        requests = [request_bytes(streams, server.model, random.Random(seed)) for seed in range(streams.concurrency)]
        figures = uvloop.run(drive(server.port, server.model, requests, long, seconds))
    return {"system": server.name, "part": "interference", **figures}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.interference", description=__doc__)
    parser.add_argument("--model", type=Path, help="our artifact; without it only the peers are measured")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[], help="those that ship a server")
    parser.add_argument("--streams", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=4000, help="the long prompts (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase (default: %(default)s)")
    parser.add_argument("--context", type=int, default=8192, help="the model's, in tokens (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file for the whole result")
    return parser.parse_args()


def main() -> None:
    args = parse()
    systems: list[System] = [PEERS[name]() for name in args.peers]
    if args.model is not None:
        systems.append(Pawl(args.model))
    streams = Load(STREAM_PROMPT, args.context - STREAM_PROMPT, args.streams)
    long = Load(args.input_len, 1, 1)
    room = Load(STREAM_PROMPT, args.context - STREAM_PROMPT, 2 * args.streams)  # as many slots again for the long ones
    document: dict[str, Any] = {"machine": describe(), "arguments": sys.argv[1:], "results": []}
    for system in systems:
        system.prepare()
        if server := system.server([room]):
            document["results"].append(measure(server, streams, long, args.seconds))
            print(json.dumps(document["results"][-1]), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(without_folders(json.dumps(document, indent=1)) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended too
    try:
        main()
    except (BadAnswer, ManifestError, PeerError, ServerError) as error:
        sys.exit(f"bench.interference: {error}")
