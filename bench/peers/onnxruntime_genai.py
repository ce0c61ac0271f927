"""ONNX Runtime GenAI's generator on what its own model builder makes of the checkpoint: int8 weights, one stream.

It ships no server, and its generator takes no request while another runs, so more streams than one are left out.
"""

from __future__ import annotations

import json

from bench.peers.environment import Environment, base_model, run
from bench.peers.loop_process import Options, rows
from bench.row import Load, Row
from serve.machine import cpu_quota

VERSION = "0.18.0"
ACCURACY = "accuracy_level=4"  # integer products, the fast ones


class OnnxruntimeGenai:
    name = "ort-genai int8"
    version = VERSION

    def __init__(self) -> None:
        self.environment = Environment("onnxruntime_genai", VERSION)
        self.model = self.environment.home / "smollm2-135m-int8"

    def prepare(self) -> None:
        self.environment.prepare()
        if not self.model.is_dir():
            partial = self.model.with_suffix(".part")
            builder = [self.environment.python, "-m", "onnxruntime_genai.models.builder"]
            paths = ["-i", base_model(), "-o", partial, "-c", self.environment.home / "builder"]
            run([*builder, *paths, "-p", "int8", "-e", "cpu", "--extra_options", ACCURACY], {"HF_HUB_OFFLINE": "1"})
            partial.rename(self.model)

    def weight_bytes(self) -> int:
        """Without the embedding, which the builder leaves in float32: of that a token reads one row."""
        c = json.loads((base_model() / "config.json").read_text())
        embedding_bytes = 4 * int(c["vocab_size"]) * int(c["hidden_size"])
        return (self.model / "model.onnx.data").stat().st_size - embedding_bytes

    def server(self, loads: list[Load]) -> None:
        return None

    def engine_rows(self, loads: list[Load]) -> list[Row]:
        alone = [load for load in loads if load.concurrency == 1]
        if not alone:
            return []
        options = Options(str(self.model), cpu_quota()[0], alone, {})
        return rows(self.name, self.environment, "bench.peers.onnxruntime_genai_loop", options)
