"""A closed loop of clients against `/v1/completions`, the same for every server.

Prompts are random token ids, so that nothing is shared between requests; `ignore_eos` and greedy choice make every
answer `output_len` tokens long. `python -m bench.load --port 8000` loads a server that runs already.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import uvloop

from bench.connection import Exchange, exchange
from bench.loop import TOKEN_IDS
from bench.row import Load
from bench.score import score

HOST = "127.0.0.1"
WARM_UP_TOKENS = 8


def request_bytes(load: Load, model: str, random_source: random.Random) -> bytes:
    """A whole HTTP request."""
    prompt = random_source.choices(TOKEN_IDS, k=load.input_len)
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": load.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass(frozen=True, slots=True)
class Run:
    """Answers, the seconds from the first send to the last byte, and this process's processor time in them."""

    exchanges: list[Exchange]
    duration: float
    processor: float


async def drive(port: int, requests: Iterable[bytes], concurrency: int) -> Run:
    """Every request once, `concurrency` at a time."""
    remaining: Iterator[bytes] = iter(requests)
    exchanges: list[Exchange] = []

    async def client() -> None:
        while (request := next(remaining, None)) is not None:
            exchanges.append(await exchange(HOST, port, request))

    started, processor = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return Run(exchanges, time.perf_counter() - started, time.process_time() - processor)


def run_load(port: int, model: str, load: Load, *, num_requests: int, seed: int) -> dict[str, Any]:
    """Warm up, measure, and return vLLM's figures. Another seed makes other prompts."""
    source = random.Random(seed)
    warm = Load(load.input_len, WARM_UP_TOKENS, load.concurrency)
    uvloop.run(drive(port, [request_bytes(warm, model, source) for _ in range(load.concurrency)], load.concurrency))
    requests = [request_bytes(load, model, source) for _ in range(num_requests)]
    run = uvloop.run(drive(port, requests, load.concurrency))
    pieces = sum(len(exchange.pieces) for exchange in run.exchanges)
    cost = {"num_prompts": num_requests, "client_us_per_piece": 1e6 * run.processor / max(pieces, 1)}
    return score(run.exchanges, run.duration) | cost


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="", help="model name to ask for (default: %(default)r)")
    parser.add_argument("--concurrency", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--num-requests", type=int, default=0, help="(default: twice the concurrency)")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    load = Load(args.input_len, args.output_len, args.concurrency)
    num_requests = args.num_requests or 2 * args.concurrency
    print(json.dumps(run_load(args.port, args.model, load, num_requests=num_requests, seed=args.seed)))


if __name__ == "__main__":
    main()
