"""Choice: from a row of logits to a token.

Everything is computed per row, from that row and the request's own random generator alone, so that a seed gives the
same tokens whatever else is in the batch.

A draw walks the tokens by falling probability, equal ones by id, until their sum passes a random share of the whole.
top_k, top_p and min_p each keep a beginning of that order. So a few of the most probable tokens, which a runner may
have found already, nearly always decide; more of the row is sorted only when the walk goes further.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.plan import Floats, Output
from serve.request import SamplingParams, TokenLogprob

NUM_SORTED = (64, 1024)  # tokens of a row that are sorted first, if the runner has not, and next; then all
Doubles = NDArray[np.float64]


class Sampler:
    """One request's way of choosing; remembers what its penalties need."""

    def __init__(self, params: SamplingParams, prompt: list[int], vocab_size: int, stop_ids: tuple[int, ...]) -> None:
        self.params = params
        self._vocab_size = vocab_size
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._bias = np.array(params.logit_bias, dtype=np.float64).reshape(-1, 2)
        self._stop_ids = list(stop_ids)
        self._counts: NDArray[np.int32] | None = None  # output tokens, [vocabulary]
        self._seen: NDArray[np.bool_] | None = None  # prompt or output tokens, [vocabulary]
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            self._counts = np.zeros(vocab_size, np.int32)
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[prompt] = True
        self._adjusts = bool(params.logit_bias) or self._counts is not None

    def choose(self, output: Output, row: int, num_output: int) -> tuple[int, TokenLogprob | None]:
        """The token behind `num_output` others, from a row of `output`, and its log-probability if asked for."""
        p = self.params
        if self._adjusts or num_output < p.min_tokens:
            adjusted = self._adjust(output.logits[row], num_output)
            plain = Output(adjusted[None], adjusted[None], [0])
            token = int(adjusted.argmax()) if p.temperature == 0 else self._draw(plain, 0)
        elif p.temperature == 0:
            found = output.candidates
            token = int(output.logits[row].argmax() if found is None else found[row, 0])
        else:
            token = self._draw(output, row)
        if self._counts is not None and self._seen is not None:
            self._counts[token] += 1
            self._seen[token] = True
        return token, None if p.logprobs is None else logprob(output.logits[row], token, p.logprobs)

    def _adjust(self, logits: Floats, num_output: int) -> Floats:
        p = self.params
        logits = logits.copy()
        if self._counts is not None and self._seen is not None:
            scaled = np.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
            logits = np.where(self._seen, scaled, logits)
            logits -= p.frequency_penalty * self._counts + p.presence_penalty * (self._counts > 0)
            logits = logits.astype(np.float32)
        if len(self._bias):
            logits[self._bias[:, 0].astype(np.int64)] += self._bias[:, 1].astype(np.float32)
        if num_output < p.min_tokens:
            logits[self._stop_ids] = -np.inf
        return logits

    def _draw(self, output: Output, row: int) -> int:
        """Draw from a row. What the output has found of it already is not computed again, nor are logits fetched."""
        share = self._random.random()
        temperature = self.params.temperature
        order: NDArray[np.integer]
        if output.candidates is None or output.total is None:
            logits = output.logits[row]
            total = float(np.exp((logits - logits.max()) / np.float32(temperature)).sum(dtype=np.float64))
            order = _largest(logits, NUM_SORTED[0])
            kept = logits[order]
        else:
            total, order = float(output.total[row]), output.candidates[row]
            kept = output.logits[row][order] if output.candidate_logits is None else output.candidate_logits[row]
        while True:
            kept = kept.astype(np.float64)
            weights = np.exp((kept - kept[0]) / temperature)
            at = self._walk(weights, total, share, whole=len(order) == self._vocab_size)
            if at is not None:
                return int(order[at])
            logits = output.logits[row]
            order = _largest(logits, NUM_SORTED[1] if len(order) < NUM_SORTED[1] else len(logits))
            kept = logits[order]

    def _walk(self, weights: Doubles, total: float, share: float, *, whole: bool) -> int | None:
        """How far the draw goes in `weights`, which fall from 1; None if that is beyond their end.

        `total` is the sum of the whole row's weights, of which these are a beginning, or all if `whole`.
        """
        p = self.params
        cumulative = weights.cumsum()
        end, mass = len(weights), total
        if p.top_k > 0 and (p.top_k <= end or whole):
            whole, end = True, min(p.top_k, end)
            mass = float(cumulative[end - 1])
        elif p.top_k:
            return None
        if p.top_p < 1:  # the fewest that hold top_p of the mass (arXiv:1904.09751)
            kept = int(cumulative[:end].searchsorted(p.top_p * mass)) + 1
            if kept <= end:
                whole, end = True, kept
            mass = float(cumulative[end - 1])
        if p.min_p > 0:
            kept = int((-weights[:end]).searchsorted(-p.min_p, side="right"))
            if kept < end:
                whole, end = True, kept
            mass = float(cumulative[end - 1])
        if (p.top_p < 1 or p.min_p > 0) and not whole:
            return None
        at = int(cumulative[:end].searchsorted(share * mass, side="right"))
        return at if at < end else end - 1 if whole else None


def prompt_logprobs(output: Output, rows: Sequence[int], tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of `tokens`, each under its row of `output`, computed at temperature 1, and of the `top` best.

    A runner that has found the largest logits and their sum has done nearly all of it.
    """
    if output.candidates is None or output.total is None:
        return [logprob(output.logits[row], token, top) for row, token in zip(rows, tokens, strict=True)]
    at = np.asarray(rows)[:, None]
    best = output.candidates[at[:, 0], : max(top, 1)]
    ids = np.concatenate([np.asarray(tokens, np.int32)[:, None], best], axis=1)
    values = output.logits[at, ids].astype(np.float64)
    values -= values[:, 1:2] + np.log(output.total[at].astype(np.float64))
    return [
        TokenLogprob(token, own, tuple(zip(named[:top], found[:top], strict=True)))
        for (token, *named), (own, *found) in zip(ids.tolist(), values.tolist(), strict=True)
    ]


def logprob(logits: Floats, token: int, top: int) -> TokenLogprob:
    """Log-probability of `token` and of the `top` most probable tokens under the raw logits."""
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
    best = _largest(logits, top)
    return TokenLogprob(token, float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in best))


def _largest(values: Floats, count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest, largest first, equal ones by index."""
    if count >= len(values):
        return _sorted(values)
    least = np.partition(values, len(values) - count)[len(values) - count] if count else np.inf
    above = np.flatnonzero(values > least)
    index = np.concatenate([above, np.flatnonzero(values == least)[: count - len(above)]])
    index.sort()
    return index[np.argsort(-values[index], kind="stable")]


def _sorted(values: Floats) -> NDArray[np.int64]:
    """All indices, as `_largest`. Two passes of numpy's radix sort, which it has for 16 bits: 4 times faster."""
    bits = (values + np.float32(0)).view(np.int32)  # the sum makes -0 equal to 0
    keys = np.where(bits < 0, bits, bits ^ 0x7FFFFFFF).view(np.uint32)  # ascending where the floats fall
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    return order[np.argsort((keys >> 16).astype(np.uint16)[order], kind="stable")]
