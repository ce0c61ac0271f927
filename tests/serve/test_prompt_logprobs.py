"""Log-probabilities of prompts over real graphs: those of the model, the same however and beside whatever computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from compress.reading import score
from proto.manifest import NATIVE_GRAPH, Manifest, load
from serve.block_cache import BlockCache
from serve.choices import Block, Choices
from serve.engine import Engine
from serve.metrics import Metrics
from serve.native import library
from serve.native_runner import NativeRunner
from serve.request import Request, TokenLogprob
from serve.runner import StockRunner, open_session
from serve.scheduler import Scheduler
from serve.tokenizer import Tokenizer
from tests.serve.tiny import CAPACITY, CHUNK, SLOTS, TEXT, ListChannel, ask, deliver, finish, quantize_tiny

NUM_BLOCKS = 40
TOP = 5
MakeEngine = Callable[..., Engine]
Values = NDArray[np.float64]


@pytest.fixture(scope="module")
def make_native(artifact: Path, manifest: Manifest) -> MakeEngine:
    sessions = {threads: open_session(artifact, threads, NATIVE_GRAPH, library()) for threads in (1, 2)}

    def make(chunk: int = 512, threads: int = 2) -> Engine:
        runner = NativeRunner(sessions[threads], manifest.architecture, num_blocks=NUM_BLOCKS, capacity=CAPACITY)
        scheduler = Scheduler(
            BlockCache(NUM_BLOCKS, CAPACITY),
            max_running=SLOTS,
            max_queue=64,
            prefill_chunk=chunk,
            any_chunking=True,
            itl_limit=2.0,
            speculate=True,
        )
        choices = Choices(threads, "test", CAPACITY, SLOTS, "test", Block(64, 0, "int8"), NUM_BLOCKS)
        return Engine(
            runner,
            scheduler,
            Tokenizer(artifact),
            Metrics("tiny").engine(manifest, choices),
            deliver,
            eos_token_ids=tuple(manifest.architecture.eos_token_ids),
            vocab_size=manifest.architecture.vocab_size,
            request_timeout_seconds=600,
        )

    return make


@pytest.fixture(scope="module")
def exact(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in full precision."""
    target = tmp_path_factory.mktemp("exact") / "exact"
    return quantize_tiny(artifact.parent / "checkpoint", target, recipe="fp32", kv="fp32")


@pytest.fixture
def make_stock(exact: Path, make_engine: MakeEngine) -> MakeEngine:
    session = open_session(exact, 2)
    architecture = load(exact).architecture
    return lambda: make_engine(StockRunner(session, architecture, num_slots=SLOTS, capacity=CAPACITY, max_rows=CHUNK))


@pytest.fixture(scope="module")
def prompts(artifact: Path) -> list[list[int]]:
    tokenizer = Tokenizer(artifact)
    return [tokenizer.encode(TEXT[99 * i :])[:length] for i, length in enumerate((1, 2, 16, 63, 70, 150, CAPACITY))]


@pytest.fixture(scope="module")
def expected(artifact: Path, prompts: list[list[int]]) -> list[Values]:
    """What transformers says behind each token of the prompts, [tokens, vocabulary]."""
    model = transformers.LlamaForCausalLM.from_pretrained(artifact.parent / "checkpoint", dtype=torch.float64).eval()
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].log_softmax(-1).numpy() for prompt in prompts]


def scored(prompt: list[int], **params: Any) -> Request:
    return ask(prompt, **{"max_tokens": 0, "prompt_logprobs": TOP, "temperature": 0} | params)


def scores(engine: Engine, prompts: list[list[int]], **params: Any) -> list[list[TokenLogprob]]:
    """Of each prompt, all at once."""
    requests = [scored(prompt, **params) for prompt in prompts]
    finish(engine, *requests)
    found = []
    for request in requests:
        assert isinstance(request.channel, ListChannel)
        first, *rest = request.channel.chunks
        assert not any(chunk.prompt_logprobs for chunk in rest)
        found.append(first.prompt_logprobs)
    return found


def distance(found: list[list[TokenLogprob]], expected: list[Values], prompts: list[list[int]]) -> Values:
    """The differences of all log-probabilities, of the prompts' own tokens and of the most probable ones."""
    differences: list[float] = []
    for entries, table, prompt in zip(found, expected, prompts, strict=True):
        assert [entry.token_id for entry in entries] == prompt
        assert entries[0] == TokenLogprob(prompt[0], None)
        for at, entry in enumerate(entries[1:]):
            assert entry.logprob is not None
            differences.append(entry.logprob - table[at, entry.token_id])
            differences += [logprob - table[at, id] for id, logprob in entry.top]
    return np.array(differences)


def test_in_full_precision_they_are_those_of_transformers(
    artifact: Path, make_stock: MakeEngine, prompts: list[list[int]], expected: list[Values]
) -> None:
    found = scores(make_stock(), prompts)
    assert np.abs(distance(found, expected, prompts)).max() < 2e-4
    for entries, table in zip(found, expected, strict=True):
        best = np.argsort(-table, axis=1)[:, :TOP]
        assert [[id for id, _ in entry.top] for entry in entries[1:]] == best[:-1].tolist()


def test_in_int8_both_forms_are_near_them(
    make_native: MakeEngine, make_engine: MakeEngine, prompts: list[list[int]], expected: list[Values]
) -> None:
    spread = expected[-1].std()
    for engine in (make_native(), make_engine()):
        found = distance(scores(engine, prompts), expected, prompts)
        assert 1e-4 < np.sqrt(np.mean(found**2)) / spread < 0.1


def test_natively_they_are_the_gates_and_the_same_for_any_cut_number_of_threads_and_company(
    make_native: MakeEngine, prompts: list[list[int]]
) -> None:
    runner = make_native().runner
    whole = [score(runner, prompt, 0, len(prompt)).astype(np.float64) for prompt in prompts]
    found = scores(make_native(), prompts)
    assert np.abs(distance(found, whole, prompts)).max() < 1e-5
    assert [scores(make_native(), [prompt])[0] for prompt in prompts] == found
    assert scores(make_native(chunk=7, threads=1), prompts[::-1]) == found[::-1]
    assert scores(make_native(chunk=40), prompts[:-1], max_tokens=3, seed=1, temperature=1) == found[:-1]
    engine = make_native()
    finish(engine, *[ask(prompt, max_tokens=1) for prompt in prompts[:-1]])
    assert scores(engine, prompts) == found, "cached blocks are not reused"


@pytest.mark.parametrize("form", ["native", "stock"])
def test_running_streams_keep_their_tokens(
    make_native: MakeEngine, make_engine: MakeEngine, prompts: list[list[int]], form: str
) -> None:
    def streams() -> list[Request]:
        ways: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1, "seed": 3, "logprobs": 2}]
        return [ask(prompt, max_tokens=30, ignore_eos=True, **ways[i % 2]) for i, prompt in enumerate(prompts[:5])]

    make = make_native if form == "native" else make_engine
    alone = [finish(make(), request)[0] for request in streams()]
    apart = [scores(make(), [prompt])[0] for prompt in prompts]
    engine, running = make(), streams()
    engine.submit(*running)
    for _ in range(4):
        engine.step()
    assert scores(engine, prompts) == apart
    assert [request.output for request in running] == alone


def test_the_tokens_behind_a_scored_prompt_are_those_without_scores(
    make_native: MakeEngine, make_engine: MakeEngine, prompts: list[list[int]]
) -> None:
    for make in (make_native, make_engine):
        requests = [
            ask(prompt, max_tokens=9, temperature=1.0, seed=5, ignore_eos=True, logprobs=2) for prompt in prompts[:6]
        ]
        expected = finish(make(), *requests)
        with_scores = [
            Request(id="r", prompt=r.prompt, params=replace(r.params, prompt_logprobs=2), channel=ListChannel())
            for r in requests
        ]
        assert finish(make(), *with_scores) == expected
