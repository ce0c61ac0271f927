"""Our engine alone: scheduler, runner and sampler in this process, no server. Prints a JSON list with
an object per load.

Per load: what `bench.loop` measures of every engine, and the same closed loop that the HTTP clients make, each finished
request being followed by the next: what a server in front can at most keep.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

from bench.loop import measure, most_tokens, prompts
from bench.row import Load
from proto.manifest import Manifest, load
from serve.choices import Choices
from serve.engine import Engine
from serve.forms import pick
from serve.machine import cpu_quota
from serve.metrics import Metrics
from serve.request import Channel, Chunk, Request, SamplingParams
from serve.settings import Settings
from serve.tokenizer import Tokenizer

ROUNDS_PER_CLIENT = 2  # requests of the closed loop per client, as through HTTP


class Sink:
    """A channel that keeps nothing."""

    closed = False

    def send(self, chunk: Chunk) -> None:
        """Forget it."""


def discard(batch: list[tuple[Channel, Chunk]]) -> None:
    """Nobody listens."""


def request(prompt: list[int], max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return Request(id="bench", prompt=prompt, params=params, channel=Sink())


class Driven:
    """Our engine as `bench.loop` wants it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.requests: list[Request] = []

    def submit(self, prompts: list[list[int]], max_tokens: int) -> None:
        self.requests = [request(prompt, max_tokens) for prompt in prompts]
        self.engine.submit(*self.requests)

    def step(self) -> list[int]:
        self.engine.step()
        if any(request.finish_reason == "error" for request in self.requests):
            raise RuntimeError("a request failed in the engine; its log says why")
        return [len(request.output) for request in self.requests]


class Bench:
    """One session; an engine per load, with as many slots as clients."""

    def __init__(self, model: Path) -> None:
        self.manifest: Manifest = load(model)
        self.settings = Settings(model=model, speculate=False)  # random prompts are no text that repeats itself
        self.threads, why = cpu_quota()
        self.form = pick(self.settings.form, self.manifest)
        self.session = self.form.open(model, self.threads)
        self.tokenizer = Tokenizer(model)
        self.random = random.Random(0)
        self.why = why

    def engine(self, load: Load) -> Engine:
        slots, capacity = load.concurrency, load.input_len + most_tokens(load)
        architecture = self.manifest.architecture
        block = self.form.block(self.manifest, capacity)
        num_blocks = slots * -(-capacity // block.tokens)
        choices = Choices(self.threads, self.why, capacity, slots, "clients", block, num_blocks)
        runner, scheduler = self.form.build(self.session, self.manifest, self.settings, choices)
        return Engine(
            runner,
            scheduler,
            self.tokenizer,
            Metrics("bench").engine(self.manifest, choices),
            discard,
            eos_token_ids=tuple(architecture.eos_token_ids),
            vocab_size=architecture.vocab_size,
            request_timeout_seconds=math.inf,
        )

    def measure(self, load: Load) -> dict[str, float]:
        figures = measure(Driven(self.engine(load)), load, self.random)
        return figures | {"closed_loop_throughput": self._closed_loop(load)}

    def _closed_loop(self, load: Load) -> float:
        engine = self.engine(load)
        asked = [prompt for _ in range(ROUNDS_PER_CLIENT) for prompt in prompts(load, self.random)]
        started = time.perf_counter()
        engine.submit(*(request(prompt, load.output_len) for prompt in asked))  # a freed slot is taken at once
        while not engine.idle:
            engine.step()
        return len(asked) * load.output_len / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description="Measure our engine without a server.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--loads", required=True, help="JSON list of {input_len, output_len, concurrency}")
    args = parser.parse_args()
    bench = Bench(args.model)
    bench.measure(Load(64, 16, 1))  # warm-up: first runs allocate
    print(json.dumps([bench.measure(Load(**item)) for item in json.loads(args.loads)]))


if __name__ == "__main__":
    main()
