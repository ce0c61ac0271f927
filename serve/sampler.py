"""Choice: from a row of logits to a token.

Everything is computed per row, from that row and the request's own random generator alone, so that a seed gives the
same tokens whatever else is in the batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serve.plan import Floats
from serve.request import SamplingParams, TokenLogprob

TOP_P_CANDIDATES = 1024  # sorted first; the whole vocabulary only if they hold less than top_p


class Sampler:
    """One request's way of choosing; remembers what its penalties need."""

    def __init__(self, params: SamplingParams, prompt: list[int], vocab_size: int, stop_ids: tuple[int, ...]) -> None:
        self.params = params
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._bias = np.array(params.logit_bias, dtype=np.float64).reshape(-1, 2)
        self._stop_ids = list(stop_ids)
        self._counts: NDArray[np.int32] | None = None  # output tokens, [vocabulary]
        self._seen: NDArray[np.bool_] | None = None  # prompt or output tokens, [vocabulary]
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            self._counts = np.zeros(vocab_size, np.int32)
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[prompt] = True

    def choose(self, logits: Floats, num_output: int) -> tuple[int, TokenLogprob | None]:
        """The next token from `logits`, [vocabulary], and its log-probability if asked for."""
        adjusted = self._adjust(logits, num_output)
        token = int(adjusted.argmax()) if self.params.temperature == 0 else self._draw(adjusted)
        if self._counts is not None and self._seen is not None:
            self._counts[token] += 1
            self._seen[token] = True
        return token, None if self.params.logprobs is None else logprob(logits, token, self.params.logprobs)

    def _adjust(self, logits: Floats, num_output: int) -> Floats:
        p = self.params
        banned = self._stop_ids if num_output < p.min_tokens else []
        if not banned and not len(self._bias) and self._counts is None:
            return logits
        logits = logits.copy()
        if self._counts is not None and self._seen is not None:
            scaled = np.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
            logits = np.where(self._seen, scaled, logits)
            logits -= p.frequency_penalty * self._counts + p.presence_penalty * (self._counts > 0)
            logits = logits.astype(np.float32)
        if len(self._bias):
            logits[self._bias[:, 0].astype(np.int64)] += self._bias[:, 1].astype(np.float32)
        logits[banned] = -np.inf
        return logits

    def _draw(self, logits: Floats) -> int:
        p = self.params
        candidates: NDArray[np.int64] | None = None  # None: the whole vocabulary, unsorted
        weights = np.exp((logits - logits.max()) / np.float32(p.temperature)).astype(np.float64)
        if 0 < p.top_k < len(weights):
            candidates = _largest(weights, p.top_k)
        if p.top_p < 1:
            candidates = _nucleus(weights, candidates, p.top_p)
        if candidates is not None:
            weights = weights[candidates]
        if p.min_p > 0:
            weights = np.where(weights >= p.min_p * weights.max(), weights, 0.0)
        cumulative = weights.cumsum()
        index = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        index = min(index, len(cumulative) - 1)
        return index if candidates is None else int(candidates[index])


def logprob(logits: Floats, token: int, top: int) -> TokenLogprob:
    """Log-probability of `token` and of the `top` most probable tokens under the raw logits."""
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits.astype(np.float64) - peak).sum()))
    best = _largest(logits, top)[:top]
    return TokenLogprob(token, float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in best))


def _largest(values: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest, largest first, equal ones by index."""
    count = min(count, len(values))
    # argpartition alone would pick arbitrarily among values equal to the smallest kept one; the set is still exact
    # for a given row, since numpy's selection is deterministic.
    index = np.argpartition(values, len(values) - count)[len(values) - count :] if count < len(values) else None
    index = np.arange(len(values)) if index is None else np.sort(index)
    return index[np.argsort(-values[index], kind="stable")]


def _nucleus(weights: NDArray[np.float64], candidates: NDArray[np.int64] | None, top_p: float) -> NDArray[np.int64]:
    """The smallest set of most probable candidates that holds `top_p` of their mass (arXiv:1904.09751)."""
    if candidates is None:
        goal = top_p * weights.sum()
        candidates = _largest(weights, TOP_P_CANDIDATES)
        if weights[candidates].sum() < goal:
            candidates = _largest(weights, len(weights))
    else:
        goal = top_p * weights[candidates].sum()
    kept = int(np.searchsorted(weights[candidates].cumsum(), goal)) + 1
    return candidates[:kept]
