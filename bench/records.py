"""`python -m bench.records`: feedback that is acknowledged, which is durable, per second, on SQLite and PostgreSQL.

Each of so many clients sends the next feedback when its last one is acknowledged, so commits are shared as they are in
a server. The disk decides: its own time for a sync of 4 KiB stands beside the results.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from bench.machine import describe, without_folders
from bench.postgres import running
from proto.records import Feedback, Interaction, new_id, utc_now
from proto.redaction import KINDS
from serve.records import Records
from serve.redactor import Redactor
from serve.server import GIL_SWITCH_SECONDS
from serve.store import open_store

STORES = ("sqlite", "postgres")
SYNCS = 50


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.records", description="Acknowledged feedback per second.")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES), help="(default: both)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64, 256], help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where SQLite's file is made (default: the system's for such)")
    parser.add_argument("--out", type=Path, help="file for the whole result")
    return parser.parse_args()


def sync_seconds(folder: Path) -> float:
    """The median time that the disk takes to make 4 KiB durable."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(SYNCS):
            file.write(bytes(4096))
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times)


async def measure(url: str, num_clients: int, seconds: float) -> dict[str, float]:
    """Feedback per second and the time to its acknowledgement, through the server's own log, redaction included."""
    log = Records(open_store(url), Redactor(",".join(KINDS)))
    log.start()
    id = new_id("chatcmpl")
    log.interaction(
        Interaction(
            id=id,
            created=utc_now(),
            model="bench",
            model_digest="0" * 64,
            endpoint="chat",
            messages=[{"role": "user", "content": "Name three colours."}],
            completion="Red, green and blue.",
            prompt_tokens=12,
            completion_tokens=7,
            cached_tokens=0,
            ttft_seconds=0.05,
            duration_seconds=0.2,
            finish_reason="stop",
            request_id=id,
        )
    )
    times: list[float] = []

    async def client(until: float) -> None:
        while (began := time.perf_counter()) < until:
            key = new_id("key")
            await log.feedback(
                Feedback(
                    id=new_id("feedback"),
                    created=utc_now(),
                    inference_id=id,
                    metric_name="comment",
                    value="Blue is my favourite, so I liked this answer.",
                    idempotency_key=key,
                )
            )
            times.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(client(began + seconds) for _ in range(num_clients)))
    elapsed = time.perf_counter() - began
    await log.close()
    assert log.counts.feedback == len(times)
    times.sort()
    return {
        "acknowledged_per_second": round(len(times) / elapsed, 1),
        "p50_ms": round(1000 * times[len(times) // 2], 2),
        "p99_ms": round(1000 * times[int(0.99 * len(times))], 2),
    }


@contextlib.contextmanager
def place(store: str, folder: Path) -> Iterator[str]:
    if store == "sqlite":
        yield str(folder / "records.sqlite")
        return
    with running() as server:
        yield server.create("bench")


def main() -> int:
    args = parse()
    sys.setswitchinterval(GIL_SWITCH_SECONDS)
    document: dict[str, Any] = {"machine": describe(), "arguments": sys.argv[1:], "results": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        document["sync_ms"] = round(1000 * sync_seconds(folder), 3)
        print(f"the disk takes {document['sync_ms']} ms to make 4 KiB durable")
        for store in args.stores:
            with place(store, folder) as url:
                for count in args.clients:
                    figures = uvloop.run(measure(url, count, args.seconds))
                    row = {"store": store, "clients": count, **figures}
                    document["results"].append(row)
                    rate = figures["acknowledged_per_second"]
                    print(f"{store:9} {count:4} clients {rate:9.0f}/s, p50 {figures['p50_ms']} ms", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(without_folders(json.dumps(document, indent=1)) + "\n")
    print(without_folders(json.dumps(document)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
