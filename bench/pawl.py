"""Our side: the server on an artifact, and the engine alone if `bench.engine` is there.

`python -m bench.engine --model DIR --loads JSON` prints, as its last line, a JSON list with an object per load:
`output_throughput` (tokens per second of decoding alone) and `prefill_throughput`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from bench.row import Load, Row
from bench.server import Server
from proto.manifest import WEIGHTS
from proto.manifest import load as load_manifest
from serve.machine import cpu_quota

NAME = "pawl"


def server(model: Path, loads: list[Load]) -> Server:
    """With the defaults of `python -m serve`, records included, but for room: as many slots as clients."""
    manifest = load_manifest(model)  # a broken artifact is an error here, not after the peers' runs
    slots = max(load.concurrency for load in loads)

    def command(port: int, scratch: Path) -> list[str]:
        options = {
            "model": model,
            "http-port": port,
            "grpc-port": 0,
            "threads": cpu_quota()[0],
            "slots": slots,
            "max-context": max(load.input_len + load.output_len for load in loads),
            "max-queue": max(slots, 64),
            "records": scratch / "records.sqlite",
        }
        return [sys.executable, "-m", "serve", *(str(x) for key, value in options.items() for x in (f"--{key}", value))]

    return Server(NAME, command, manifest.files[WEIGHTS].size_bytes)


def engine_rows(model: Path, loads: list[Load]) -> list[Row]:
    """Decoding and prefill without a server, in a process of its own; nothing if there is no `bench.engine`."""
    if importlib.util.find_spec("bench.engine") is None:
        return []
    argument = json.dumps([asdict(load) for load in loads])
    done = subprocess.run(
        [sys.executable, "-m", "bench.engine", "--model", str(model), "--loads", argument],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return [Row(NAME, "engine", load, figure) for load, figure in zip(loads, figures, strict=True)]
