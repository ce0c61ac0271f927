"""An artifact as something that `train eval` can judge: run by the runner that will serve it, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from compress.generations import generate
from compress.reading import CHUNK, score
from compress.runners import forms_here, open_streams
from proto.manifest import load
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
        self._form = forms_here(directory)[0]  # the one that would be served here
        self._streams = open_streams(
            directory, self._form, manifest.architecture, streams=STREAMS, capacity=self._context, threads=threads
        )

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
                batch = tokens[start : start + STREAMS]
                answers += generate(self._streams, batch, self._eos, sampling.max_tokens)
                bar.update(min(STREAMS, len(tokens) - start))
        return [self._tokenization.decode(answer) for answer in answers]

    def _score(self, windows: list[Window]) -> list[float]:
        sums = []
        for window in tqdm(windows, desc=f"{self._name}: texts", unit="window", disable=None):
            total = 0.0
            for start in range(0, len(window.tokens) - 1, CHUNK):
                end = min(start + CHUNK, len(window.tokens) - 1)
                rows = score(self._streams.runner, window.tokens, start, end)
                found = rows[np.arange(end - start), window.tokens[start + 1 : end + 1]]
                total += float(found[max(0, window.first - 1 - start) :].sum(dtype=np.float64))
            sums.append(total)
        return sums
