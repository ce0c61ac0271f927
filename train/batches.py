"""Batch number N as a pure function of the store, the seed and N."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.batch import IGNORE, Batch, Batches
from train.errors import TrainError
from train.packing import pack
from train.samples import Shape
from train.token_store import TokenStore

FORMAT_VERSION = 1
ROUND_TO = 8  # tokens, to which rows of examples are filled up: shapes recur, and tensor cores like it
Tokens = NDArray[np.int64]


class PackedBatches:
    """Text and chats: batches of `size` rows as long as the store's context, each packed with whole sequences."""

    def __init__(self, store: TokenStore, size: int, seed: int) -> None:
        self._store = store
        self._rows = pack(store.lengths, store.info.context)
        self._order = _Order(len(self._rows), size, seed)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.digest = _digest(store, "packed")

    @property
    def utilisation(self) -> float:
        """Share of the rows' tokens that are not padding."""
        return self._store.info.num_tokens / (len(self._rows) * self._store.info.context)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        numbers = self._order.batch(step)[part::parts]
        filler = _Filler(len(numbers), self._store.info.context, self._store.info.pad)
        for row, number in enumerate(numbers):
            for sequence in self._rows[number]:
                filler.add(row, self._store.tokens(sequence), self._store.learnt(sequence))
        return filler.finish()


class ExampleBatches:
    """Pairs, thumbs and classes: batches of `size` examples, laid out as Batch says.

    Rows are as long as the longest of the whole batch, rounded up to a multiple of 8. Thumbs: an example's second row
    is its prompt with the answer of the example after it in the batch (the last one's: of the first), cut to the
    context. Both are settled before the batch is divided into parts.
    """

    def __init__(self, store: TokenStore, size: int, seed: int) -> None:
        if store.info.shape == Shape.THUMBS and size < 2:
            raise TrainError(f"a batch of {size} has no other answer to compare with; give thumbs at least 2")
        self._store = store
        self._order = _Order(store.info.num_examples, size, seed)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.digest = _digest(store, "examples")

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        numbers = self._order.batch(step)
        shape = self._store.info.shape
        if shape == Shape.PAIRS:
            rows = [[self._sequence(2 * number), self._sequence(2 * number + 1)] for number in numbers]
        elif shape == Shape.THUMBS:
            own = [self._sequence(number) for number in numbers]
            rows = [[one, self._mismatch(one, other)] for one, other in zip(own, own[1:] + own[:1], strict=True)]
        else:
            rows = [[(tokens, np.zeros_like(learnt))] for tokens, learnt in map(self._sequence, numbers)]
        longest = max(len(tokens) for example in rows for tokens, _ in example)
        wanted = [sequence for example in rows[part::parts] for sequence in example]
        filler = _Filler(len(wanted), -(-longest // ROUND_TO) * ROUND_TO, self._store.info.pad)
        for row, (tokens, learnt) in enumerate(wanted):
            filler.add(row, tokens, learnt)
        table = self._store.examples[numbers[part::parts]]
        extras = {"weight": torch.from_numpy(table["weight"].copy())}
        if shape == Shape.THUMBS:
            extras["desirable"] = torch.from_numpy(table["target"] == 1)
        elif shape == Shape.CLASSES:
            extras["target"] = torch.from_numpy(table["target"].astype(np.int64))
            extras["last"] = torch.tensor([len(tokens) - 1 for tokens, _ in wanted])
        return filler.finish(extras)

    def _sequence(self, number: int) -> tuple[Tokens, NDArray[np.bool_]]:
        return self._store.tokens(number), self._store.learnt(number)

    def _mismatch(
        self, prompt: tuple[Tokens, NDArray[np.bool_]], answer: tuple[Tokens, NDArray[np.bool_]]
    ) -> tuple[Tokens, NDArray[np.bool_]]:
        """The first one's prompt with the second one's answer."""
        end, start = int(prompt[1].argmax()), int(answer[1].argmax())
        tokens, learnt = (np.concatenate([one[:end], other[start:]]) for one, other in zip(prompt, answer, strict=True))
        return tokens[: self._store.info.context], learnt[: self._store.info.context]


def open_batches(store: TokenStore, size: int, seed: int) -> Batches:
    """`size` rows a batch for text and chats, examples for the other shapes."""
    packed = store.info.shape in (Shape.TEXT, Shape.CHAT)
    return PackedBatches(store, size, seed) if packed else ExampleBatches(store, size, seed)


class _Order:
    """Numbers below `num` in an endless stream: one permutation of them after another, each by seed and epoch."""

    def __init__(self, num: int, size: int, seed: int) -> None:
        if size < 1 or seed < 0:
            raise TrainError(
                f"a batch of {size} by seed {seed} cannot be drawn; give a size of 1 or more, a seed from 0"
            )
        self._num, self._size, self._seed = num, size, seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)
        self.steps_per_epoch = -(-num // size)

    def batch(self, step: int) -> list[int]:
        places = range(step * self._size, (step + 1) * self._size)
        return [int(self._epoch(place // self._num)[place % self._num]) for place in places]

    def _permutation(self, epoch: int) -> Tokens:
        return np.random.default_rng([self._seed, epoch]).permutation(self._num)


class _Filler:
    """Rows being filled from the left. What stays empty is one more sequence, of which nothing is learnt."""

    def __init__(self, rows: int, length: int, pad: int) -> None:
        self._tokens = np.full((rows, length), pad, np.int64)
        self._labels = np.full((rows, length), IGNORE, np.int64)
        self._positions = np.empty((rows, length), np.int64)
        self._used = [0] * rows

    def add(self, row: int, tokens: Tokens, learnt: NDArray[np.bool_]) -> None:
        start = self._used[row]
        stop = start + len(tokens)
        self._tokens[row, start:stop] = tokens
        self._positions[row, start:stop] = np.arange(len(tokens))
        self._labels[row, start : stop - 1] = np.where(learnt[1:], tokens[1:], IGNORE)
        self._used[row] = stop

    def finish(self, extras: Mapping[str, Tensor] | None = None) -> Batch:
        for row, used in enumerate(self._used):
            self._positions[row, used:] = np.arange(self._positions.shape[1] - used)
        arrays = (self._tokens, self._positions, self._labels)
        tokens, positions, labels = (torch.from_numpy(array) for array in arrays)
        return Batch(tokens, positions, labels, extras or {}, sum(self._used))


def _digest(store: TokenStore, how: str) -> str:
    return hashlib.sha256(f"{store.info.digest} {how} {FORMAT_VERSION}".encode()).hexdigest()
