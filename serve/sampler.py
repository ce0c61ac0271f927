"""Choice: from a row of logits to a token.

Everything is computed per row, from that row and the request's own random generator alone, so that a seed gives the
same tokens whatever else is in the batch.

A draw walks the tokens by falling probability, equal ones by id, until their sum passes a random share of the whole.
top_k, top_p and min_p each keep a beginning of that order. So a few of the most probable tokens, which a runner may
have found already, nearly always decide; more of the row is sorted only when the walk goes further.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.plan import Floats, Output
from serve.request import SamplingParams, TokenLogprob

ALL = (0, 1, 0)  # top_k, top_p and min_p that leave every token
NUM_SORTED = (64, 1024)  # tokens of a row that are sorted first, if the runner has not, and next; then all
Doubles = NDArray[np.float64]


class Sampler:
    """One request's way of choosing; remembers what its penalties need."""

    def __init__(self, params: SamplingParams, prompt: list[int], vocab_size: int, stop_ids: tuple[int, ...]) -> None:
        self.params = params
        self.vocab_size = vocab_size
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._shares: list[float] = []
        self.way = (params.temperature, params.top_k, params.top_p, params.min_p)
        self._bias = np.array(params.logit_bias, dtype=np.float64).reshape(-1, 2)
        self._stop_ids = list(stop_ids)
        self._counts: NDArray[np.int32] | None = None  # output tokens, [vocabulary]
        self._seen: NDArray[np.bool_] | None = None  # prompt or output tokens, [vocabulary]
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            self._counts = np.zeros(vocab_size, np.int32)
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[prompt] = True
        self._adjusts = bool(params.logit_bias) or self._counts is not None

    def share(self, num_output: int) -> float:
        """What decides the draw of the token behind `num_output` others, 0 to 1, whenever it is asked for."""
        if self.params.temperature == 0:
            return 0.0
        while len(self._shares) <= num_output:
            self._shares.append(self._random.random())
        return self._shares[num_output]

    def draws(self, num_output: int) -> bool:
        """Whether the token behind `num_output` others is drawn from the row as it is: `draw` may do it."""
        return self.params.temperature > 0 and not self._adjusted(num_output)

    def choose(
        self, output: Output, row: int, num_output: int, drawn: int | None = None
    ) -> tuple[int, TokenLogprob | None]:
        """The token behind `num_output` others, from a row of `output`, and its log-probability if asked for.

        `drawn`: the token, if it was drawn already.
        """
        p = self.params
        if drawn is not None:
            token = drawn
        elif self._adjusted(num_output):
            adjusted = self._adjust(output.logits[row], num_output)
            plain = Output(adjusted[None], adjusted[None], [0])
            token = int(adjusted.argmax()) if p.temperature == 0 else draw(plain, [0], [self], [num_output])[0]
        elif p.temperature == 0:
            found = output.candidates
            token = int(output.logits[row].argmax() if found is None else found[row, 0])
        else:
            [token] = draw(output, [row], [self], [num_output])
        if self._counts is not None and self._seen is not None:
            self._counts[token] += 1
            self._seen[token] = True
        return token, None if p.logprobs is None else logprob(output.logits[row], token, p.logprobs)

    def _adjusted(self, num_output: int) -> bool:
        return self._adjusts or num_output < self.params.min_tokens

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


def draw(output: Output, rows: Sequence[int], samplers: Sequence[Sampler], num_outputs: Sequence[int]) -> list[int]:
    """The token behind `num_outputs` others from each of `rows`, by its own sampler, at a temperature above 0.

    All in one go, each as if alone. What the output has found of a row already is not computed again, nor are its
    logits fetched.
    """
    shares = np.array([sampler.share(number) for sampler, number in zip(samplers, num_outputs, strict=True)])
    ways = np.array([sampler.way for sampler in samplers])
    order: NDArray[np.integer]
    if output.candidates is None or output.total is None:
        logits = [output.logits[row] for row in rows]
        order = np.stack([_largest(row, NUM_SORTED[0]) for row in logits])
        kept = np.stack([row[best] for row, best in zip(logits, order, strict=True)])
        totals = np.array([_total(row, temperature) for row, temperature in zip(logits, ways[:, 0], strict=True)])
    else:
        at = np.array(rows)
        order, totals = output.candidates[at], output.total[at].astype(np.float64)
        found = output.candidate_logits
        kept = output.logits[at[:, None], order] if found is None else found[at]
    vocab_size = samplers[0].vocab_size
    places = _walk(kept, totals, shares, ways, whole=order.shape[1] == vocab_size)
    tokens: list[int] = []
    for i, (row, place, best) in enumerate(zip(rows, places.tolist(), order, strict=True)):
        if place >= 0:
            tokens.append(int(best[place]))
        else:
            tokens.append(_draw_further(output.logits[row], totals[i : i + 1], shares[i : i + 1], ways[i : i + 1]))
    return tokens


def _draw_further(logits: Floats, total: Doubles, share: Doubles, way: Doubles) -> int:
    """A draw that goes beyond the first tokens of its row."""
    for count in (NUM_SORTED[1], len(logits)):
        order = _largest(logits, count)
        place = _walk(logits[order][None], total, share, way, whole=len(order) == len(logits))[0]
        if place >= 0:
            break
    return int(order[place])


def _total(logits: Floats, temperature: float) -> float:
    return float(np.exp((logits - logits.max()) / np.float32(temperature)).sum(dtype=np.float64))


def _walk(kept: Floats, totals: Doubles, shares: Doubles, ways: Doubles, *, whole: bool) -> NDArray[np.int64]:
    """Where in its row of `kept` each draw ends, -1 if that is beyond the row's end.

    `kept` [rows, k] are the largest logits, `ways` [rows, 4] temperature, top_k, top_p and min_p, `totals` [rows] sums
    of the whole vocabulary's weights, of which the largest is 1. `whole`: the rows are the whole vocabulary.
    """
    temperature, top_k, top_p, min_p = ways.T
    values = kept.astype(np.float64)
    weights = np.exp((values - values[:, :1]) / temperature[:, None])
    cumulative = weights.cumsum(axis=1)
    size = kept.shape[1]
    if not (ways[:, 1:] != ALL).any():
        place = (cumulative <= (shares * totals)[:, None]).sum(axis=1)
        return np.minimum(place, size - 1) if whole else np.where(place < size, place, -1)
    # The first `end` of each row can be drawn, and weigh `mass`; unless they are `known`, there are more behind them.
    rows, end, known, mass = np.arange(len(kept)), np.full(len(kept), size), np.full(len(kept), whole), totals
    cut = (top_k > 0) & (whole | (top_k <= size))
    end, known = np.where(cut, np.minimum(top_k, size).astype(np.int64), end), known | cut
    mass = np.where(cut, cumulative[rows, end - 1], mass)
    lost = (top_k > 0) & ~cut
    # The fewest that hold top_p of the mass (arXiv:1904.09751).
    fewest = np.minimum((cumulative < (top_p * mass)[:, None]).sum(axis=1), end) + 1
    cut = (top_p < 1) & (fewest <= end)
    end, known = np.where(cut, fewest, end), known | cut
    mass = np.where(top_p < 1, cumulative[rows, end - 1], mass)
    likely = np.minimum((weights >= min_p[:, None]).sum(axis=1), end)
    cut = (min_p > 0) & (likely < end)
    end, known = np.where(cut, likely, end), known | cut
    mass = np.where(min_p > 0, cumulative[rows, end - 1], mass)
    place = (cumulative <= (shares * mass)[:, None]).sum(axis=1)
    inside = known | ((place < end) & (top_p >= 1) & (min_p <= 0))
    return np.where(inside & ~lost, np.minimum(place, end - 1), -1)


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


def token_logprob(output: Output, row: int, token: int, temperature: float) -> float:
    """Log-probability of `token` under a row of `output`, whose total is of `temperature`."""
    if temperature == 1 and output.candidates is not None and output.total is not None:
        ids = output.candidates[row].tolist()
        if token in ids:
            found, place = output.candidate_logits, ids.index(token)
            largest = output.logits[row, ids[0]] if found is None else found[row, 0]
            own = output.logits[row, token] if found is None else found[row, place]
            return float(own) - float(largest) - math.log(output.total[row])
    return logprob(output.logits[row], token, 0).logprob or 0.0


def logprob(logits: Floats, token: int, top: int) -> TokenLogprob:
    """Log-probability of `token` and of the `top` most probable tokens under the raw logits."""
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
    best = _largest(logits, top) if top else ()
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
