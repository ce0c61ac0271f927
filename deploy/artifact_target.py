"""An artifact as something that `train eval` can judge: run by the runner that will serve it, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from compress.gate import CHUNK, score
from proto.manifest import NATIVE_GRAPH, load
from serve.block_cache import blocks_for
from serve.native import NativeUnavailable, library
from serve.native_runner import NativeRunner
from serve.plan import Plan, Runner
from serve.runner import StockRunner, open_session
from serve.tokenizer import Tokenizer
from train.errors import TrainError
from train.evaluation.targets import Likelihood, Passage, Prompt, Sampling
from train.evaluation.tokenization import Messages, prompt_tokens
from train.evaluation.windows import Window, log_likelihoods, window_shape

LARGEST_CONTEXT = 1024  # tokens that a text is read by
STREAMS = 8  # answers generated at once


class ArtifactTokenization:
    """The artifact's own, as the server has it."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = Tokenizer(directory)

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special)

    def render(self, messages: Messages) -> list[int]:
        if len(messages) == 1 and not self._tokenizer.has_chat_template:
            return self.encode(messages[0]["content"], special=True)  # as it was learnt
        text = self._tokenizer.render_chat([dict(message) for message in messages])
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids))


class ArtifactTarget:
    """A `train.evaluation.targets.Target`; greedy answers only. `name` is what progress bars say."""

    def __init__(self, directory: Path, *, threads: int, name: str) -> None:
        """Raises ManifestError if the artifact is not whole."""
        manifest = load(directory)
        self._name = name
        self._digest = manifest.digest
        self._context = min(manifest.architecture.max_context, LARGEST_CONTEXT)
        self._eos = manifest.architecture.eos_token_ids
        self._tokenization = ArtifactTokenization(directory)
        self._runner, self._tables, self._form = _open(directory, self._context, threads)

    def describe(self) -> dict[str, Any]:
        return {"version": self._digest, "form": self._form, "context": self._context}

    def log_likelihoods(self, passages: Sequence[Passage]) -> list[Likelihood]:
        length, stride = window_shape(0, 0, self._context)
        return log_likelihoods(passages, self._tokenization, self._score, length, stride)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """Raises TrainError if a prompt leaves no room for an answer."""
        if sampling.temperature or sampling.stop:
            raise TrainError("an artifact answers with its most probable tokens only; leave out temperature and stop")
        tokens = [prompt_tokens(self._tokenization, prompt) for prompt in prompts]
        for prompt in tokens:
            if len(prompt) >= self._context:
                raise TrainError(f"a prompt has {len(prompt)} tokens, and {self._context} are read; shorten it")
        answers: list[list[int]] = []
        with tqdm(total=len(tokens), desc=f"{self._name}: answers", unit="prompt", disable=None) as bar:
            for start in range(0, len(tokens), STREAMS):
                answers += self._answer(tokens[start : start + STREAMS], sampling.max_tokens)
                bar.update(min(STREAMS, len(tokens) - start))
        return [self._tokenization.decode(answer) for answer in answers]

    def _score(self, windows: list[Window]) -> list[float]:
        sums = []
        for window in tqdm(windows, desc=f"{self._name}: texts", unit="window", disable=None):
            total = 0.0
            for start in range(0, len(window.tokens) - 1, CHUNK):
                end = min(start + CHUNK, len(window.tokens) - 1)
                rows = score(self._runner, window.tokens, start, end)
                found = rows[np.arange(end - start), window.tokens[start + 1 : end + 1]]
                total += float(found[max(0, window.first - 1 - start) :].sum(dtype=np.float64))
            sums.append(total)
        return sums

    def _answer(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """At most STREAMS prompts at once."""
        answers: list[list[int]] = [[] for _ in prompts]
        plan = Plan()
        for table, prompt in zip(self._tables, prompts, strict=False):
            plan.add(table, 0, prompt)
        running = list(range(len(prompts)))
        while running:
            output = self._runner.run(plan)
            for number, row in zip(running, output.rows, strict=True):
                answers[number].append(int(output.logits[row].argmax()))
            running = [
                number
                for number in running
                if answers[number][-1] not in self._eos
                and len(answers[number]) < min(max_tokens, self._context - len(prompts[number]))
            ]
            plan = Plan()
            for number in running:
                answer = answers[number]
                plan.add(self._tables[number], len(prompts[number]) + len(answer) - 1, answer[-1:])
        return answers


def _open(directory: Path, capacity: int, threads: int) -> tuple[Runner, list[Sequence[int]], str]:
    """The form that would be served here, with a cache for STREAMS sequences, and the blocks of each."""
    architecture = load(directory).architecture
    if (directory / NATIVE_GRAPH).exists():
        try:
            session = open_session(directory, threads, NATIVE_GRAPH, library())
        except NativeUnavailable:
            pass
        else:
            width = blocks_for(capacity)
            native = NativeRunner(session, architecture, num_blocks=STREAMS * width, capacity=capacity)
            return native, [range(i * width, (i + 1) * width) for i in range(STREAMS)], "native"
    session = open_session(directory, threads)
    stock = StockRunner(session, architecture, num_slots=STREAMS, capacity=capacity, max_rows=capacity)
    return stock, [[slot] for slot in range(STREAMS)], "stock"
