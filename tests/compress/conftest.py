"""Tiny random models of every family, a bare loop over the graphs made from them, and the command over one of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedModel

from compress.__main__ import main
from compress.checkpoint import Checkpoint
from compress.constants import WeightHook, write_weight
from compress.decoder import build
from compress.families import FAMILIES
from compress.graph import GraphBuilder
from compress.linear import multiply
from compress.operands import load
from compress.precisions import FLOAT
from compress.weight_file import WeightFile
from proto.manifest import GRAPH, Architecture, Precision, Recipe
from tests.serve.tiny import TEXT, make_checkpoint

VOCAB = 160
ROPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
GEMMA3 = {
    **ROPE,
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
    "pad_token_id": None,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCAB}
CONFIGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, ROPE),
    "mistral": (transformers.MistralConfig, {**ROPE, "head_dim": 16}),
    "qwen2": (transformers.Qwen2Config, ROPE),
    "qwen3": (transformers.Qwen3Config, {**ROPE, "head_dim": 32}),
    "gemma3_text": (transformers.Gemma3TextConfig, GEMMA3),
    "gpt2": (transformers.GPT2Config, GPT2),
}
FP32 = Recipe(name="fp32", default=FLOAT)
SMALL = ["--window", "64", "--calibration-windows", "4", "--held-out-windows", "2"]

# Of a product: [N, K].
WEIGHT = np.random.default_rng(1).normal(size=(40, 96)).astype(np.float32)

Run = Callable[..., int]


def make_model(family: str, directory: Path, **overrides: Any) -> PreTrainedModel:
    """A random model, saved into the directory; norms and biases are random too, so that folding them is tested."""
    make_config, sizes = CONFIGS[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config(**{**sizes, **overrides})).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = 1 - FAMILIES[family].norm_offset + 0.3 * noise if is_norm else 0.15 * noise
    model.tie_weights()
    model.save_pretrained(directory)
    return model


def expected_logits(model: PreTrainedModel, tokens: Sequence[int]) -> NDArray[np.float32]:
    """[tokens, vocab] by transformers."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].numpy()


class Graph:
    """A built graph with caches for some slots, read and written in place."""

    def __init__(self, directory: Path, architecture: Architecture, slots: int, capacity: int = 64) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.architecture = architecture
        is_int8 = any(value.type == "tensor(int8)" for value in self.session.get_inputs())
        shape = (slots, architecture.num_kv_heads, capacity, architecture.head_size)
        dtype = np.int8 if is_int8 else np.float32
        self.caches = {
            f"{kind}_cache{{}}.{i}": np.zeros(shape, dtype)
            for i in range(architecture.num_layers)
            for kind in ("key", "value")
        }

    def run(
        self, tokens: NDArray[Any], lengths: Sequence[int], first_slot: int = 0, outputs: Sequence[str] = ("logits",)
    ) -> list[NDArray[Any]]:
        """Run [batch, sequence] tokens in slots from the first on; row b then holds lengths[b] tokens."""
        batch = len(tokens)
        feeds = {
            "input_ids": np.asarray(tokens, np.int64),
            "seqlens_k": np.asarray(lengths, np.int32) - 1,
            "total_sequence_length": np.asarray(max(lengths), np.int32),
            "logits_rows": np.arange(tokens.size),
        }
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for template, cache in self.caches.items():
            rows = cache[first_slot : first_slot + batch]
            place = ("cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)
            binding.bind_input(template.format(""), *place)
            binding.bind_output(template.format("_out"), *place)
        for name in outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[len(self.caches) :]]

    def logits(self, tokens: Sequence[int], past: int = 0, slot: int = 0) -> NDArray[np.float32]:
        """One chunk of one slot: [tokens, vocab]."""
        return self.run(np.array([tokens]), [past + len(tokens)], slot)[0]


@pytest.fixture
def tokens() -> list[int]:
    return np.random.default_rng(0).integers(0, VOCAB, 30).tolist()


@pytest.fixture
def make_graph(tmp_path: Path) -> Callable[..., Graph]:
    """Build the checkpoint at a path; keywords go to `build`, but for `slots`."""
    built = 0

    def make(source: Path, recipe: Recipe = FP32, slots: int = 1, **options: Any) -> Graph:
        nonlocal built
        built += 1
        directory = tmp_path / f"graph{built}"
        directory.mkdir()
        return Graph(directory, build(Checkpoint(source), directory, recipe, **options), slots)

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """(model, directory) of a family with overrides of its configuration; made once a session."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def get(family: str, **overrides: Any) -> tuple[PreTrainedModel, Path]:
        key = f"{family}{sorted(overrides.items())}"
        if key not in made:
            directory = tmp_path_factory.mktemp(family)
            made[key] = make_model(family, directory, **overrides), directory
        return made[key]

    return get


@pytest.fixture(scope="session")
def reference() -> Callable[[PreTrainedModel, Sequence[int]], NDArray[np.float32]]:
    return expected_logits


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantize") / "checkpoint"
    make_checkpoint(directory)
    return directory


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 4)
    return path


@pytest.fixture
def compress(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`python -m compress ...` in this process; gives the exit status."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        return main()

    return run


@pytest.fixture
def quantize(compress: Run, checkpoint: Path, text: Path) -> Run:
    def run(output: Path, *flags: str, source: Path = checkpoint) -> int:
        given = ["--text", text, "--threads", "2", "--no-measure", *SMALL, *flags]
        return compress("quantize", source, "-o", output, *given)

    return run


@pytest.fixture
def run_product(tmp_path: Path) -> Callable[..., NDArray[np.float32]]:
    """One product x [..., K] times a weight [N, K], at a precision; keywords go to `multiply`."""

    def run(
        x: np.ndarray,
        precision: Precision,
        hook: WeightHook | None = None,
        weight: np.ndarray = WEIGHT,
        parts: int = 1,
        **options: int,
    ) -> np.ndarray:
        with WeightFile(tmp_path) as file:
            write_weight(file, "product", weight, precision, hook, parts)
            graph = GraphBuilder(file)
            graph.input("x", np.float32, [f"axis{i}" for i in range(x.ndim)])
            graph.output("y", np.float32, [f"axis{i}" for i in range(x.ndim - 1)] + [len(weight)])
            operand = load(graph, "product", precision, weight.shape, parts)
            multiply(graph, "product", "x", operand, precision, weight.shape, output="y", **options)
            graph.save(tmp_path / GRAPH)
        session = ort.InferenceSession(tmp_path / GRAPH, providers=["CPUExecutionProvider"])
        return session.run(["y"], {"x": x})[0]

    return run
