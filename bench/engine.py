"""Our engine alone: scheduler, runner and sampler in this process, no server. See `bench.pawl` for what it prints.

Per load: prefill (all prompts, none decoding), decoding (all slots busy, no prefill), and the same closed loop that
the HTTP clients make, each finished request being followed by the next: what a server in front can at most keep.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

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


class Bench:
    """One session; an engine per load, with as many slots as clients."""

    def __init__(self, model: Path) -> None:
        self.manifest: Manifest = load(model)
        self.settings = Settings(model=model)
        self.threads, why = cpu_quota()
        self.form = pick(self.settings.form, self.manifest)
        self.session = self.form.open(model, self.threads)
        self.tokenizer = Tokenizer(model)
        self.random = np.random.default_rng(0)
        self.why = why

    def engine(self, load: Load) -> Engine:
        slots, capacity = load.concurrency, load.input_len + load.output_len
        architecture = self.manifest.architecture
        block = self.form.block(self.manifest, capacity)
        num_blocks = slots * -(-capacity // block.tokens)
        choices = Choices(self.threads, self.why, capacity, slots, "clients", block, num_blocks)
        runner, scheduler = self.form.build(self.session, self.manifest, self.settings, choices)
        return Engine(
            runner,
            scheduler,
            self.tokenizer,
            Metrics(self.manifest, "bench", choices),
            discard,
            eos_token_ids=tuple(architecture.eos_token_ids),
            vocab_size=architecture.vocab_size,
            request_timeout_seconds=self.settings.request_timeout_seconds,
        )

    def request(self, load: Load) -> Request:
        prompt = self.random.integers(100, self.manifest.architecture.vocab_size - 100, load.input_len).tolist()
        params = SamplingParams(max_tokens=load.output_len, temperature=0, ignore_eos=True)
        return Request(id="bench", prompt=prompt, params=params, channel=Sink())

    def measure(self, load: Load) -> dict[str, float]:
        engine = self.engine(load)
        runner_started = time.perf_counter()
        for _ in range(load.concurrency):  # one by one: nothing decodes meanwhile
            self._prefill_only(engine, load)
        prefill_seconds = time.perf_counter() - runner_started
        return {
            "output_throughput": self._decode(load),
            "prefill_throughput": load.concurrency * load.input_len / prefill_seconds,
            "closed_loop_throughput": self._closed_loop(load),
        }

    def _prefill_only(self, engine: Engine, load: Load) -> None:
        request = self.request(Load(load.input_len, 1, 1))
        engine.submit(request)
        while not engine.idle:
            engine.step()

    def _decode(self, load: Load) -> float:
        """Tokens per second of steps in which every slot decodes."""
        engine = self.engine(load)
        requests = [self.request(load) for _ in range(load.concurrency)]
        engine.submit(*requests)
        while any(request.prefilling for request in requests):
            engine.step()
        before, started = sum(len(request.output) for request in requests), time.perf_counter()
        while all(request.finish_reason is None for request in requests):
            engine.step()
        seconds = time.perf_counter() - started
        return (sum(len(request.output) for request in requests) - before) / seconds

    def _closed_loop(self, load: Load) -> float:
        engine = self.engine(load)
        requests = [self.request(load) for _ in range(ROUNDS_PER_CLIENT * load.concurrency)]
        started = time.perf_counter()
        engine.submit(*requests)  # those without a slot wait: a freed slot is taken at once
        while not engine.idle:
            engine.step()
        return len(requests) * load.output_len / (time.perf_counter() - started)


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
