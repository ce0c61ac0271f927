"""A tiny random chat model, requests to it, and a server process that serves it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from compress.quantize import Options, quantize
from serve.engine import Engine
from serve.request import Channel, Chunk, Request, SamplingParams

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "LICENSE").read_text()
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ["<|end|>", "<|start|>"]
VOCABULARY = 512
CAPACITY = 192
CHUNK = 16
SLOTS = 8


def make_checkpoint(directory: Path) -> None:
    """A random two-layer Llama with a byte-level tokenizer of its own."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data if parameter.dim() == 1 else 0.15 * torch.randn_like(parameter)
    model.tie_weights()
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def make_artifact(root: Path, /, **options: Any) -> Path:
    """The checkpoint, quantized with these options; `root` must be there."""
    make_checkpoint(root / "checkpoint")
    return quantize_tiny(root / "checkpoint", root / "tiny", **options)


def quantize_tiny(checkpoint: Path, target: Path, /, **options: Any) -> Path:
    """On little text, which is left beside `target`; fast, and whatever the gate says, unless options say otherwise."""
    text = target.with_name("text.txt")
    text.write_text(TEXT * 4)
    usual = {"text": text, "window": 64, "calibration_windows": 4, "held_out_windows": 2}
    usual |= {"force": True, "measure": False}
    quantize(checkpoint, target, Options(**{**usual, **options}), command="test", threads=2)
    return target


@dataclass
class ListChannel:
    """Keeps what was sent."""

    closed: bool = False
    chunks: list[Chunk] = field(default_factory=list)

    def send(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]


def deliver(batch: list[tuple[Channel, Chunk]]) -> None:
    for channel, chunk in batch:
        channel.send(chunk)


def ask(prompt: list[int], *, embed: bool = False, **params: Any) -> Request:
    return Request(id="r", prompt=prompt, params=SamplingParams(**params), channel=ListChannel(), embed=embed)


def finish(engine: Engine, *requests: Request) -> list[list[int]]:
    """Submit, run the engine until it is idle, and return the tokens of each."""
    if requests:
        engine.submit(*requests)
    while not engine.idle:
        engine.step()
    engine.scheduler.cache.check()
    assert engine.scheduler.cache.usage == 0
    return [request.channel.tokens for request in requests]  # type: ignore[attr-defined]


@dataclass
class Server:
    """A server process and where it listens."""

    process: subprocess.Popen[str]
    http_url: str
    grpc_address: str
    first_line: str
    records: Path


def start_server(served: Path, records: Path, *flags: str, how: str = "--model") -> Server:
    """`how`: what `served` is."""
    command = [sys.executable, "-m", "serve", how, str(served), "--http-port", "0", "--grpc-port", "0"]
    command += ["--records", str(records), "--slots", str(SLOTS), "--max-context", str(CAPACITY)]
    process = subprocess.Popen(
        [*command, "--prefill-chunk", str(CHUNK), *flags],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"(http://[\d.]+:\d+) and grpc://([\d.]+:\d+)", line)
    assert found, line
    return Server(process, found[1], found[2], line, records)


def stop_server(server: Server) -> int:
    """SIGTERM; returns the exit status."""
    server.process.terminate()
    status = server.process.wait(30)
    assert server.process.stdout is not None
    server.process.stdout.close()
    return status
