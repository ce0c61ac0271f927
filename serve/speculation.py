"""Whether, and how far, to draft for a request: as long as a draft yields more tokens than its time costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from serve.prompt_lookup import PromptLookup

MOST_DRAFTS = 8  # tokens
FIRST_GUESS = 0.5  # of the share of drafts accepted
WEIGHT = 0.15  # of a new draft in that share
PROBE_EVERY = 64  # tokens without a draft, after which one is tried in spite of the figures


class Speculation:
    """One request's drafts, and how well they do."""

    def __init__(self) -> None:
        self._lookup = PromptLookup()
        self._acceptance = FIRST_GUESS  # of a draft whose predecessors were accepted
        self._last_draft = 0  # length of the text at the last draft

    @property
    def length(self) -> int:
        """Tokens of the text so far."""
        return len(self._lookup)

    def extend(self, tokens: Sequence[int]) -> None:
        """The text has grown."""
        self._lookup.extend(tokens)

    def draft(self, most: int, price: float) -> list[int]:
        """At most `most` tokens that may come next. `price`: the share of a token that computing one more costs.

        The i-th draft is used with probability acceptance^i, so drafts pay up to log(price) / log(acceptance).
        """
        if self._acceptance <= price:
            number = 1 if self.length - self._last_draft >= PROBE_EVERY else 0
        elif price <= 0 or self._acceptance >= 1:
            number = MOST_DRAFTS
        else:
            number = int(math.log(price) / math.log(self._acceptance))
        drafts = self._lookup.draft(number) if (number := min(number, most, MOST_DRAFTS)) > 0 else []
        if drafts:
            self._last_draft = self.length
        return drafts

    def judge(self, accepted: int, refused: bool) -> None:
        """So many drafts were right, and whether the one behind them was wrong (and not just cut off)."""
        for _ in range(accepted):
            self._acceptance += WEIGHT * (1 - self._acceptance)
        if refused:
            self._acceptance -= WEIGHT * self._acceptance
