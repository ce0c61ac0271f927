"""Who is compared in `bench.compression`: each reads token windows with its own quantized weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.pawl import Pawl
from bench.peers.environment import run
from bench.peers.llama_cpp import LlamaCpp
from bench.peers.onnxruntime_genai import OnnxruntimeGenai
from bench.peers.openvino_genai import PRECISION, OpenVinoGenai
from bench.row import Load
from bench.system import System
from compress import speed
from compress.base_model import import_base
from compress.checkpoint import Checkpoint, Floats
from compress.decoder import build
from compress.families import describe
from compress.reading import RunnerReference
from compress.reference import Reference
from compress.runners import forms_here, open_streams
from compress.scores import log_softmax
from compress.stream import FULL
from proto.manifest import GRAPH, WEIGHTS, Architecture, Form, load

LOADS = [Load(speed.CONTEXT, 64, count) for count in (1, speed.STREAMS)]

Windows = Sequence[Sequence[int]]


class Contestant(Protocol):
    """Made without cost; `prepare` comes before everything else."""

    @property
    def name(self) -> str:
        """As the table shows it."""

    def prepare(self) -> None:
        """Raises an error for what cannot be had here."""

    def size_bytes(self) -> int:
        """Of the weights, as they are stored."""

    def log_probabilities(self, windows: Windows) -> Iterator[Floats]:
        """[tokens - 1, vocabulary] of each window."""

    def speeds(self) -> tuple[float, float] | None:
        """Tokens a second of 1 and 16 streams."""


def engine_speeds(system: System) -> tuple[float, float]:
    alone, together = (row.output_throughput for row in system.engine_rows(LOADS))
    return alone, together


def read(directory: Path, form: Form, architecture: Architecture, windows: Windows, threads: int) -> Iterator[Floats]:
    capacity = max(map(len, windows))
    streams = open_streams(directory, form, architecture, streams=1, capacity=capacity, threads=threads)
    reader = RunnerReference(streams.runner, windows)
    for number, window in enumerate(windows):
        yield reader.log_probabilities(number, 0, len(window) - 1)


class Artifact:
    """Ours, in the form that would be served here."""

    def __init__(self, directory: Path, threads: int) -> None:
        self.manifest = load(directory)
        self.form = forms_here(directory)[0]
        self.name = f"pawl {self.manifest.recipe.name} ({self.form})"
        self._directory = directory
        self._threads = threads

    def prepare(self) -> None:
        """It was made before."""

    def size_bytes(self) -> int:
        return self.manifest.files[WEIGHTS].size_bytes

    def log_probabilities(self, windows: Windows) -> Iterator[Floats]:
        return read(self._directory, self.form, self.manifest.architecture, windows, self._threads)

    def speeds(self) -> tuple[float, float]:
        return engine_speeds(Pawl(self._directory))


class Llama:
    """llama.cpp's weights, dequantized by its own rules and run in float32."""

    def __init__(self, checkpoint: Path, form: str, scratch: Path, threads: int) -> None:
        self.system = LlamaCpp(form)
        self.name = self.system.name
        self._folder = scratch / form
        self._threads = threads

    def prepare(self) -> None:
        self.system.prepare()

    def size_bytes(self) -> int:
        return self.system.weight_bytes()

    def log_probabilities(self, windows: Windows) -> Iterator[Floats]:
        import_base(self._folder, self.system.model_file, report=lambda text: None)
        checkpoint = Checkpoint(self._folder)
        reader = Reference(checkpoint, describe(checkpoint), windows, threads=self._threads)
        shutil.rmtree(self._folder)
        for number, window in enumerate(windows):
            yield reader.log_probabilities(number, 0, len(window) - 1)

    def speeds(self) -> tuple[float, float]:
        return engine_speeds(self.system)


class OpenVino:
    """OpenVINO's weights by optimum-intel, read by OpenVINO itself in an environment of its own."""

    def __init__(self, checkpoint: Path, form: str, scratch: Path, threads: int) -> None:
        self.system = OpenVinoGenai(form)
        self.name = self.system.name
        self._folder = scratch / f"openvino-{form}"
        self._threads = threads

    def prepare(self) -> None:
        self.system.prepare()

    def size_bytes(self) -> int:
        return self.system.weight_bytes()

    def log_probabilities(self, windows: Windows) -> Iterator[Floats]:
        self._folder.mkdir()
        options = {
            "model": str(self.system.model / "openvino_model.xml"),
            "threads": self._threads,
            "precision": PRECISION,
            "windows": [list(window) for window in windows],
            "folder": str(self._folder),
        }
        run([self.system.environment.python, "-m", "bench.peers.openvino_genai_reader", json.dumps(options)])
        for number in range(len(windows)):
            yield log_softmax(np.load(self._folder / f"{number}.npy")[:-1])
        shutil.rmtree(self._folder)

    def speeds(self) -> tuple[float, float]:
        return engine_speeds(self.system)


class OnnxQuantizer:
    """ONNX Runtime's own quantizers, on our float32 graph; its head is the embedding, which they leave in float32."""

    def __init__(self, checkpoint: Path, form: str, scratch: Path, threads: int) -> None:
        self.name = f"onnxruntime {form}"
        self._checkpoint = Checkpoint(checkpoint)
        self._form = form
        self._threads = threads
        self._environment = OnnxruntimeGenai().environment  # has what the quantizers import
        self._folder = scratch / form.replace(" ", "-")
        self._architecture = describe(self._checkpoint).architecture(1)

    def prepare(self) -> None:
        float32 = self._folder / "float32"
        float32.mkdir(parents=True)
        self._architecture = build(self._checkpoint, float32, FULL)
        self._environment.prepare()
        module = "bench.peers.onnxruntime_quantizers"
        run([self._environment.python, "-m", module, float32 / GRAPH, self._folder / GRAPH, self._form])
        shutil.rmtree(float32)

    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._folder.iterdir() if path.name != GRAPH)

    def log_probabilities(self, windows: Windows) -> Iterator[Floats]:
        return read(self._folder, "stock", self._architecture, windows, self._threads)

    def speeds(self) -> tuple[float, float]:
        found = speed.measure(self._folder, self._architecture, "stock", self._threads)
        return 1000 / found.decode_milliseconds, found.tokens_per_second


class BitsAndBytes:
    """LLM.int8() or NF4, as training loads a teacher: through transformers. It serves nothing, and is not timed."""

    def __init__(self, checkpoint: Path, form: str, scratch: Path, threads: int) -> None:
        self.name = {"int8": "bitsandbytes LLM.int8()", "nf4": "bitsandbytes NF4"}[form]
        self._checkpoint = checkpoint
        self._form = form
        self._network: Any = None

    def prepare(self) -> None:
        import torch

        from train.model import load_model

        quantization: Any = self._form
        self._network = load_model(self._checkpoint, dtype=torch.float32, quantization=quantization).network

    def size_bytes(self) -> int:
        """Of all that its state holds, each storage once."""
        held = {tensor.data_ptr(): tensor.nbytes for tensor in self._network.state_dict().values()}
        return sum(held.values())

    def log_probabilities(self, windows: Windows) -> Iterator[Floats]:
        import torch

        for window in windows:
            with torch.no_grad():
                logits = self._network(torch.tensor([list(window)])).logits[0, :-1]
            yield log_softmax(logits.float().numpy())

    def speeds(self) -> None:
        return None
