"""A request's life inside the engine: what was asked, how far it is, and what it answers.

A request stores few numbers and derives the rest. The order between them is asserted when they change:
`0 <= computed <= len(prompt) + len(output)`, where `computed` counts tokens whose keys and values lie in the cache.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from serve.cache import Table
from serve.errors import PawlError
from serve.speculation import Speculation

WATCHED_ONE_IN = 16  # requests
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. The defaults are the server's; validated in `serve.api`, trusted here."""

    max_tokens: int = 16  # 0: only the prompt is computed
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: a fresh seed per request
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0  # CTRL (arXiv:1909.05858): over prompt and output
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: none; k: the chosen token's and the k most probable
    prompt_logprobs: int | None = None  # the same of the prompt's tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token under the model (before temperature and penalties)."""

    token_id: int
    logprob: float | None  # None: of a prompt's first token, which nothing foretells
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most probable first


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts: `cached` of the prompt's tokens were reused from an earlier request."""

    prompt: int
    completion: int
    cached: int


@dataclass(slots=True)
class Chunk:
    """One step of an answer. The whole answer is the fold of its chunks; the last has a `finish_reason`."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of all the prompt's tokens, in the first chunk
    finish_reason: FinishReason | None = None
    usage: Usage | None = None  # in the last chunk
    error: PawlError | None = None  # with finish_reason "error", or "abort" by the server
    embedding: Sequence[float] | None = None  # only for embedding requests

    @property
    def num_named(self) -> int:
        """Tokens that its log-probabilities name."""
        return sum(1 + len(entry.top) for entry in self.logprobs)


class Channel(Protocol):
    """The request's own way back. Closing it cancels the request, in whatever state it is."""

    @property
    def closed(self) -> bool: ...

    def send(self, chunk: Chunk) -> None: ...


@dataclass(slots=True, eq=False)
class Request:
    """One sequence in the engine. `n > 1` is n requests; their common prefix is shared by the KV cache."""

    id: str
    prompt: list[int]
    params: SamplingParams
    channel: Channel
    embed: bool = False  # answer with the mean of the last hidden states instead of tokens
    arrival: float = field(default_factory=time.monotonic)  # seconds, monotonic

    output: list[int] = field(default_factory=list)
    table: Table | None = None  # while it runs
    computed: int = 0
    awaited: int | None = None  # where the latest plan computes a token that is not known yet: its flat position
    cached: int = 0  # tokens of the prompt that were computed already when it was first scheduled
    speculation: Speculation | None = None
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finish_reason: FinishReason | None = None
    hidden_sum: NDArray[np.float64] | None = None  # over the prompt so far, for embeddings: [hidden]
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of the prompt so far, if asked for
    watched: bool = False  # one of some, whose answers' log-probabilities are added up, to see drift by
    logprob_sum: float = 0.0  # of the output, if it is watched

    def __post_init__(self) -> None:
        self.watched = zlib.crc32(self.id.encode()) % WATCHED_ONE_IN == 0
        self.forget_sums()

    def forget_sums(self) -> None:
        """Begin anew with what is gathered from the prompt's chunks, unless all of it is there."""
        self.hidden_sum = None
        if self.scoring:
            self.prompt_logprobs = [TokenLogprob(self.prompt[0], None)]

    @property
    def length(self) -> int:
        """Tokens known so far."""
        return len(self.prompt) + len(self.output)

    @property
    def num_pending(self) -> int:
        """Tokens known and not computed."""
        return len(self.prompt) + len(self.output) - self.computed

    @property
    def prefilling(self) -> bool:
        """True while the prompt is not wholly in the cache."""
        return self.computed < len(self.prompt)

    @property
    def generates(self) -> bool:
        """Whether tokens are wanted behind the prompt."""
        return not self.embed and self.params.max_tokens > 0

    @property
    def temperature(self) -> float:
        """At which a runner is to sum up a row; a greedy choice needs no sum, but watching does, at 1."""
        return self.params.temperature or float(self.watched)

    @property
    def scoring(self) -> bool:
        """True while log-probabilities of the prompt's tokens are wanted and not all there."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt)

    @property
    def decoding(self) -> bool:
        """True while only the token chosen last is not computed."""
        return bool(self.output) and self.num_pending == 1

    @property
    def continues(self) -> bool:
        """Whether a token is awaited and, as far as is known, another one wanted behind it."""
        return self.awaited is not None and len(self.output) + 1 < self.params.max_tokens

    def span(self, start: int, end: int) -> list[int]:
        """The known tokens from position `start` up to `end`."""
        length = len(self.prompt)
        if start >= length:
            return self.output[start - length : end - length]
        return self.prompt[start:end] + (self.output[: end - length] if end > length else [])

    @property
    def usage(self) -> Usage:
        return Usage(prompt=len(self.prompt), completion=len(self.output), cached=self.cached)
