"""OpenVINO GenAI's continuous batching pipeline, on the checkpoint exported by optimum-intel with quantized weights.

It ships no OpenAI server of its own.
"""

from __future__ import annotations

from bench.peers.environment import Environment, base_model, run
from bench.peers.loop_process import Options, rows
from bench.row import Load, Row
from serve.machine import cpu_quota

VERSION = "2026.4.1.0"
GROUPS = {"int4": ["--group-size", "64"]}  # the tool's own 128 does not divide the model's 576 channels
PRECISION = "f32"  # of the arithmetic; LOG.md has the alternative


class OpenVinoGenai:
    """`weights` is a format of optimum-intel's: "int8", "int4"."""

    version = VERSION

    def __init__(self, weights: str = "int8") -> None:
        self.weights = weights
        self.name = f"OpenVINO GenAI {weights}"
        self.environment = Environment("openvino_genai", VERSION)
        self.model = self.environment.home / f"smollm2-135m-{weights}"

    def prepare(self) -> None:
        self.environment.prepare()
        if not self.model.is_dir():
            partial = self.model.with_suffix(".part")
            what = ["--task", "text-generation-with-past", "--weight-format", self.weights]
            what += GROUPS.get(self.weights, [])
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
