"""A running server as a target: OpenAI's completions and chat, and vLLM's /tokenize. Ours, vLLM's and others."""

from __future__ import annotations

import functools
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from train.errors import TrainError
from train.evaluation.options import Options
from train.evaluation.targets import Likelihood, Passage, Prompt, Sampling, Unable
from train.evaluation.tokenization import LocalTokenization, ServerTokenization, Tokenization
from train.evaluation.windows import Window, log_likelihoods, window_shape

TIMEOUT_SECONDS = 600.0
TRIES = 6
FIRST_PAUSE_SECONDS = 0.5  # doubled at each further try: 15 seconds in all
BUSY = (429, 503)

T = TypeVar("T")
R = TypeVar("R")


class Refused(TrainError):
    """The server answered with an error of its own."""

    def __init__(self, path: str, status: int, text: str) -> None:
        super().__init__(f"{path} answers {status}: {text[:300]}")
        self.status = status


class ServerTarget:
    """Raises TrainError if no server answers at the URL."""

    def __init__(self, url: str, options: Options) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = os.environ.get(options.key_variable, "")
        listed = self._call("/v1/models")["data"]
        if not options.model and not listed:
            raise TrainError(f"{self.url}/v1/models lists no model; name one with --model")
        self.model = options.model or str(listed[0]["id"])
        self.tokenizer_directory = options.tokenizer
        self._options = options

    def describe(self) -> dict[str, Any]:
        return {"kind": "server", "url": self.url, "model": self.model}

    def header(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        def one(number: int) -> str:
            prompt = prompts[number]
            body = {
                "model": self.model,
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": 1,
                "seed": sampling.seed + number,
                **({"stop": list(sampling.stop)} if sampling.stop else {}),
            }
            if isinstance(prompt, str):
                return str(self._post("/v1/completions", body | {"prompt": prompt})["choices"][0]["text"])
            answer = self._post("/v1/chat/completions", body | {"messages": list(prompt)})
            return str(answer["choices"][0]["message"]["content"] or "")

        return self._all(one, range(len(prompts)), "generating", "answer")

    def log_likelihoods(self, passages: Sequence[Passage]) -> list[Likelihood]:
        tokenization, (window, stride) = self._reading
        return log_likelihoods(passages, tokenization, self.score, window, stride)

    def score(self, windows: list[Window]) -> list[float]:
        return self._all(self._score, windows, "reading", "window")

    def _score(self, window: Window) -> float:
        body = {"model": self.model, "prompt": window.tokens, "max_tokens": 0, "echo": True, "logprobs": 1}
        try:
            values = self._post("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
        except Refused as error:
            raise Unable(f"the server gives no log-probabilities of a prompt (echo with logprobs): {error}") from error
        except (KeyError, TypeError) as error:
            raise Unable("the server ignores echo with logprobs: it gives no log-probabilities of a prompt") from error
        if len(values) != len(window.tokens):
            raise Unable(f"the server gives {len(values)} log-probabilities for {len(window.tokens)} tokens")
        return float(sum(values[window.first :]))

    @functools.cached_property
    def _reading(self) -> tuple[Tokenization, tuple[int, int]]:
        """How texts are tokenized, and windows cut: asked of the server when first needed."""
        tokenization: Tokenization
        try:
            told = self._post("/tokenize", {"model": self.model, "prompt": "a"})
            context = int(told["max_model_len"])
        except (Refused, KeyError, TypeError) as error:
            if not (self.tokenizer_directory and self._options.window):
                raise Unable(
                    f"the server does not tell its tokens and context by /tokenize ({error}); "
                    "give --tokenizer DIR and --window TOKENS"
                ) from error
            context = self._options.window
        shape = window_shape(self._options.window, self._options.stride, context)
        if self.tokenizer_directory:
            tokenization = LocalTokenization(Path(self.tokenizer_directory))
        else:
            tokenization = ServerTokenization(self._post, self.model)
        return tokenization, shape

    def _all(self, one: Callable[[T], R], items: Sequence[T], text: str, unit: str) -> list[R]:
        with ThreadPoolExecutor(self._options.batch) as pool:
            futures = [pool.submit(one, item) for item in items]
            try:
                return [future.result() for future in tqdm(futures, desc=text, unit=unit, disable=None)]
            finally:
                pool.shutdown(cancel_futures=True)  # the others, if one has failed

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._call(path, json.dumps(body).encode())

    def _call(self, path: str, body: bytes | None = None) -> Any:
        """The answer's JSON; waits for a server that is busy. Raises Refused, or TrainError if none answers."""
        headers = self.header() | ({"Content-Type": "application/json"} if body else {})
        request = urllib.request.Request(self.url + path, body, headers)
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    text = error.read().decode(errors="replace")
                if error.code not in BUSY or attempt == TRIES - 1:
                    raise Refused(path, error.code, text) from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise TrainError(f"{self.url}{path} does not answer ({error}); is the server running?") from error
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
        raise AssertionError("unreachable: the last try returns or raises")
