"""What serving an artifact takes here: time and memory, of a process that does nothing else.

`python -m compress.speed` is that process: it decodes one stream, then many, through the runner that would serve them,
without a server, and prints what it took as JSON. Nothing is ever judged by it: a busy machine gives other figures.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from compress.runners import Streams, open_streams
from proto.manifest import Architecture, Form, Serving
from serve.machine import processor, resident_bytes
from serve.native import NativeUnavailable, instruction_set, library
from serve.plan import Plan

STREAMS = 16
CONTEXT = 64  # tokens before the first that is timed
WARM_UP = 4  # steps; the first ones allocate
STEPS = 24


def machine(threads: int) -> str:
    """For people: what figures were measured on."""
    try:
        found = f", {instruction_set(library())}"
    except NativeUnavailable:
        found = ""
    return f"{processor()}{found}, {threads} threads"


def measure(directory: Path, architecture: Architecture, form: Form, threads: int) -> Serving:
    """Raises RuntimeError with the process's last words if it fails."""
    model = msgspec.json.encode(architecture).decode()
    command = [sys.executable, "-m", "compress.speed", directory.resolve(), model, "--form", form]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [*map(str, command), "--threads", str(threads)], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the {form} form of {directory} cannot be served here: {done.stderr[-2000:]}")
    return msgspec.json.decode(done.stdout, type=Serving)


def time_steps(streams: Streams, count: int, vocab_size: int) -> float:
    """Median seconds of a step in which `count` streams get a token each, after `CONTEXT` random tokens."""
    random = np.random.default_rng(0)
    length = min(CONTEXT, streams.capacity - WARM_UP - STEPS)
    plan = Plan()
    for table in streams.tables[:count]:
        plan.add(table, 0, random.integers(vocab_size, size=length).tolist())
    streams.runner.run(plan)
    seconds = []
    for past in range(length, length + WARM_UP + STEPS):
        plan = Plan()
        for table in streams.tables[:count]:
            plan.add(table, past, random.integers(vocab_size, size=1).tolist())
        started = time.perf_counter()
        streams.runner.run(plan)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[WARM_UP:]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compress.speed", description="Time an artifact's runner.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("architecture", help="as in the manifest, JSON")
    parser.add_argument("--form", choices=("native", "stock"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    architecture = msgspec.json.decode(args.architecture, type=Architecture)
    capacity = min(CONTEXT + WARM_UP + STEPS, architecture.max_context)
    streams = open_streams(
        args.directory, args.form, architecture, streams=STREAMS, capacity=capacity, threads=args.threads
    )
    alone, together = (time_steps(streams, count, architecture.vocab_size) for count in (1, STREAMS))
    found = Serving(
        decode_milliseconds=round(1000 * alone, 3),
        tokens_per_second=round(STREAMS / together, 1),
        streams=STREAMS,
        context=min(CONTEXT, capacity - WARM_UP - STEPS),
        resident_bytes=resident_bytes(),
    )
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main()
