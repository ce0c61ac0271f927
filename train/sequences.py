"""Tokens with a mask of what is learnt, and how they are cut to the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.conversations import Rendering


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """tokens [length] uint32; learnt [length] bool, of which the first counts for nothing: nothing foretells it."""

    tokens: NDArray[np.uint32]
    learnt: NDArray[np.bool_]

    @property
    def can_learn(self) -> bool:
        return bool(self.learnt[1:].any())

    @property
    def end(self) -> int:
        """After the last token that is learnt; what follows it teaches nothing."""
        return int(np.flatnonzero(self.learnt)[-1]) + 1

    def part(self, start: int, stop: int) -> TokenSequence:
        return TokenSequence(self.tokens[start:stop], self.learnt[start:stop])


class Encoder:
    """Renderings to tokens, by a fast tokenizer of transformers. Texts end with EOS if `end_text`."""

    def __init__(self, tokenizer: Any, *, end_text: bool) -> None:
        self._tokenizer = tokenizer
        self._end = [tokenizer.eos_token_id] if end_text else []

    def encode(self, renderings: Sequence[Rendering]) -> list[TokenSequence]:
        made: dict[int, TokenSequence] = {}
        for plain in (False, True):  # a template writes its special tokens itself
            numbers = [number for number, rendering in enumerate(renderings) if rendering.plain == plain]
            if not numbers:
                continue
            encoded = self._tokenizer(
                [renderings[number].text for number in numbers],
                add_special_tokens=plain,
                return_attention_mask=False,
                return_offsets_mapping=any(renderings[number].learnt is not None for number in numbers),
                verbose=False,
            )
            offsets = encoded.get("offset_mapping", [[]] * len(numbers))
            for number, ids, places in zip(numbers, encoded["input_ids"], offsets, strict=True):
                made[number] = self._sequence(renderings[number], ids, places)
        return [made[number] for number in range(len(renderings))]

    def _sequence(self, rendering: Rendering, ids: list[int], offsets: list[tuple[int, int]]) -> TokenSequence:
        end = self._end if rendering.plain else []
        if end and ids[-1:] == end:  # the tokenizer has added it itself
            ids = ids[:-1]
        tokens = np.array([*ids, *end], np.uint32)
        if rendering.learnt is None:
            return TokenSequence(tokens, np.ones(len(tokens), np.bool_))
        learnt = np.zeros(len(tokens), np.bool_)
        first, last = np.array(offsets[: len(ids)], np.int64).reshape(-1, 2).T
        for start, stop in rendering.learnt:
            # A token that reaches over the start is learnt too: the answer's first letters are in it.
            learnt[: len(ids)] |= (last > start) & (first < stop)
        learnt[len(ids) :] = bool(rendering.learnt)
        return TokenSequence(tokens, learnt)


def pieces(sequence: TokenSequence, context: int) -> list[TokenSequence]:
    """Of at most `context` tokens, each from the last token of the one before: each token is foretold once."""
    starts = range(0, max(1, len(sequence.tokens) - 1), context - 1)
    return [sequence.part(start, start + context) for start in starts]


def shorten(sequence: TokenSequence, count: int, bos: int | None) -> TokenSequence:
    """Without `count` tokens at the start, after a `bos`. An answer that then has nothing before it is not learnt."""
    keep = int(sequence.tokens[0] == bos)
    tokens = np.delete(sequence.tokens, np.s_[keep : keep + count])
    learnt = np.delete(sequence.learnt, np.s_[keep : keep + count])
    learnt[keep:] &= ~np.logical_and.accumulate(learnt[keep:])
    return TokenSequence(tokens, learnt)
