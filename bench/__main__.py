"""`python -m bench`: our server and its peers in one run, turn by turn.

1 bandwidth of memory; 2 engines alone; 3 all servers started; 4 for each load and round, each server in turn with the
others frozen; 5 the table, the file, and the same document as the last line. The machine should be otherwise idle: a
peer whose threads spin loses far more than its share to a neighbour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.bandwidth import read_bandwidth
from bench.load import run_load
from bench.machine import describe, without_folders
from bench.pawl import Pawl
from bench.peers.environment import PeerError
from bench.peers.roster import PEERS
from bench.row import Load, Row, median_row
from bench.server import Server, ServerError
from bench.system import System
from bench.table import table
from proto.manifest import ManifestError

MIN_REQUESTS = 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Compare Pawl with its peers in one run.")
    parser.add_argument("--model", type=Path, help="our artifact; without it only the peers are measured")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[], help="what to compare with, baseline first")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="(default: %(default)s)")
    parser.add_argument("--input-len", type=int, nargs="+", default=[130], help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="the median counts (default: %(default)s)")
    parser.add_argument(
        "--parts", nargs="+", choices=("engine", "http"), default=["engine", "http"], help="what to run"
    )
    parser.add_argument("--out", type=Path, help="file for the whole result")
    args = parser.parse_args()
    if args.model is None and not args.peers:
        parser.error("nothing to measure: give --model, --peers or both")
    return args


def measure_engines(systems: list[System], loads: list[Load], rounds: int, failures: list[str]) -> Iterator[Row]:
    for _ in range(rounds):
        for system in systems:
            try:
                yield from system.engine_rows(loads)
                note(f"engine of {system.name}: done")
            except PeerError as error:  # the others' figures are worth keeping
                failures.append(f"{system.name}: {error}")
                note(failures[-1])


def start(servers: list[Server], stack: contextlib.ExitStack, failures: list[str]) -> Iterator[Server]:
    """Those that answer, frozen; `stack` ends them."""
    for server in servers:
        try:
            stack.enter_context(server)
        except ServerError as error:
            failures.append(str(error))
            note(failures[-1])
            continue
        server.freeze()
        note(f"{server.name}: first answer after {server.startup_seconds:.2f} s")
        yield server


def measure_servers(servers: list[Server], loads: list[Load], rounds: int) -> Iterator[Row]:
    for load in loads:
        num_requests = max(2 * load.concurrency, MIN_REQUESTS)
        for turn in range(rounds):
            for server in servers:
                server.thaw()
                figures = run_load(server.port, server.model, load, num_requests=num_requests, seed=turn)
                server.freeze()
                yield Row(server.name, "http", load, figures)


def medians(rows: list[Row]) -> list[Row]:
    groups: dict[tuple[str, str, Load], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.system, row.part, row.load), []).append(row)
    return [median_row(group) for group in groups.values()]


def limits(rows: list[Row], weight_bytes: dict[str, int], bandwidth: float) -> dict[str, Any]:
    """Per system: the most tokens per second that memory allows one stream, and the share of it that was reached."""
    found: dict[str, Any] = {}
    for name, size in weight_bytes.items():
        limit = bandwidth / size
        alone = [row for row in rows if row.system == name and row.load.concurrency == 1]
        shares = {f"{row.part}_{row.load.input_len}_share": row.output_throughput / limit for row in alone}
        found[name] = {"weight_bytes": size, "limit_tokens_per_second": limit, **shares}
    return found


def add_engine_shares(rows: list[Row]) -> None:
    """To HTTP rows: their share of the same closed loop without a server, where the engine part measured that."""
    bare = {(row.system, row.load): row.figures.get("closed_loop_throughput") for row in rows if row.part == "engine"}
    for row in rows:
        if row.part == "http" and (most := bare.get((row.system, row.load))):
            row.figures["engine_share"] = row.output_throughput / most


def main() -> int:
    args = parse()
    failures: list[str] = []
    document: dict[str, Any] = {"machine": describe(), "arguments": sys.argv[1:], "failures": failures}
    systems: list[System] = [PEERS[name]() for name in args.peers]
    if args.model is not None:
        systems.append(Pawl(args.model))
    for system in systems:
        system.prepare()
    document["systems"] = {system.name: system.version for system in systems}
    loads = [Load(n, args.output_len, c) for n in args.input_len for c in args.concurrency]
    bandwidth = read_bandwidth()
    document["read_bandwidth_bytes_per_second"] = bandwidth
    note(f"memory is read at {bandwidth / 1e9:.1f} GB/s")

    started = time.monotonic()
    rows: list[Row] = []
    if "engine" in args.parts:
        rows += measure_engines(systems, loads, args.rounds, failures)
    if "http" in args.parts:
        candidates = [server for system in systems if (server := system.server(loads))]
        with contextlib.ExitStack() as stack:
            servers = list(start(candidates, stack, failures))
            for row in measure_servers(servers, loads, args.rounds):
                rows.append(row)
                note(f"{row.system} {row.load}: {row.output_throughput:.0f} tok/s, {row.figures['failed']} failed")
            document["servers"] = {
                server.name: {
                    "startup_seconds": server.startup_seconds,
                    "peak_bytes": server.peak_bytes(),
                    "command": server.arguments,
                }
                for server in servers
            }
    document["seconds"] = round(time.monotonic() - started)
    summary = medians(rows)
    add_engine_shares(summary)
    document["limits"] = limits(summary, {system.name: system.weight_bytes() for system in systems}, bandwidth)
    document["results"] = [row.document() for row in summary]
    print(table(summary, systems[0].name))
    for name, share in document["limits"].items():
        print(f"{name}: {json.dumps(share)}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        whole = document | {"rounds": [row.document() for row in rows]}
        args.out.write_text(without_folders(json.dumps(whole, indent=1)) + "\n")
    print(without_folders(json.dumps(document)))
    return 1 if failures else 0


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended too
    try:
        sys.exit(main())
    except (ManifestError, PeerError, ServerError) as error:
        sys.exit(f"bench: {error}")
