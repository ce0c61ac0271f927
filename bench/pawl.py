"""Our side: the server on an artifact, and the engine alone in a process of its own."""

from __future__ import annotations

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

MIB = 1 << 20


class Pawl:
    """An artifact."""

    name = "pawl"

    def __init__(self, model: Path) -> None:
        self.model = model
        self.manifest = load_manifest(model)  # a broken artifact is an error here, not after the peers' runs
        self.version = f"{self.manifest.name} {self.manifest.digest[:12]}"

    def prepare(self) -> None:
        """It was made before."""

    def weight_bytes(self) -> int:
        return self.manifest.files[WEIGHTS].size_bytes

    def server(self, loads: list[Load]) -> Server:
        """With the defaults of `python -m serve`, records included, but for room: as many slots as clients."""
        slots = max(load.concurrency for load in loads)
        context = max(load.input_len + load.output_len for load in loads)
        kv_bytes = slots * context * self.manifest.kv_bytes_per_token

        def command(port: int, scratch: Path) -> list[str]:
            options = {
                "model": self.model,
                "http-port": port,
                "grpc-port": 0,
                "threads": cpu_quota()[0],
                "slots": slots,
                "max-context": context,
                "kv-budget-mib": -(-kv_bytes // MIB),
                "max-queue": max(slots, 64),
                "records": scratch / "records.sqlite",
            }
            given = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
            return [sys.executable, "-m", "serve", "--no-speculate", *given]  # random prompts repeat nothing

        return Server(self.name, command)

    def engine_rows(self, loads: list[Load]) -> list[Row]:
        argument = json.dumps([asdict(load) for load in loads])
        done = subprocess.run(
            [sys.executable, "-m", "bench.engine", "--model", str(self.model), "--loads", argument],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        return [Row(self.name, "engine", load, figure) for load, figure in zip(loads, figures, strict=True)]
