"""Drafts from the request's own text: what followed the last time that its latest tokens occurred.

Prompt lookup decoding, after Saxena (2023). Summaries, edits, code and lists repeat their prompt and themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (4, 3, 2)  # tokens that must match, longest first


class PromptLookup:
    """An index of a growing text. A token costs the same whatever the length."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> position behind its latest occurrence but the last

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens. What ends with the text's last token is indexed once something follows it."""
        text, behind = self._tokens, self._next
        for token in tokens:
            at = len(text)
            for size in SIZES:
                if size <= at:
                    behind[tuple(text[at - size :])] = at
            text.append(token)

    def draft(self, most: int) -> list[int]:
        """What may come next, at most `most` tokens; where the match reaches the end, it is taken to repeat."""
        text = self._tokens
        for size in SIZES:
            if size <= len(text) and (at := self._next.get(tuple(text[-size:]))) is not None:
                if at + most <= len(text):
                    return text[at : at + most]
                period = len(text) - at
                return [text[at + i % period] for i in range(most)]
        return []
