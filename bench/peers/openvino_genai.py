"""OpenVINO GenAI's continuous batching pipeline, on the checkpoint exported by optimum-intel with int8 weights.

It ships no OpenAI server of its own.
"""

from __future__ import annotations

from bench.peers.environment import Environment, base_model, run
from bench.peers.loop_process import Options, rows
from bench.row import Load, Row
from serve.machine import cpu_quota

VERSION = "2026.4.1.0"
PRECISION = "f32"  # of the arithmetic; LOG.md has the alternative


class OpenVinoGenai:
    name = "OpenVINO GenAI int8"
    version = VERSION

    def __init__(self) -> None:
        self.environment = Environment("openvino_genai", VERSION)
        self.model = self.environment.home / "smollm2-135m-int8"

    def prepare(self) -> None:
        self.environment.prepare()
        if not self.model.is_dir():
            partial = self.model.with_suffix(".part")
            what = ["--task", "text-generation-with-past", "--weight-format", "int8"]
            tool = self.environment.python.with_name("optimum-cli")
            run([tool, "export", "openvino", "--model", base_model(), *what, partial], {"HF_HUB_OFFLINE": "1"})
            partial.rename(self.model)

    def weight_bytes(self) -> int:
        return (self.model / "openvino_model.bin").stat().st_size

    def server(self, loads: list[Load]) -> None:
        return None

    def engine_rows(self, loads: list[Load]) -> list[Row]:
        options = Options(str(self.model), cpu_quota()[0], loads, {"precision": PRECISION})
        return rows(self.name, self.environment, "bench.peers.openvino_genai_loop", options)
