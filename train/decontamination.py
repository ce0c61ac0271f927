"""Training documents that hold text of the evaluation files are dropped: any n-gram of words in common is enough.

After GPT-3 (Brown et al. 2020, appendix C). N-grams of which half or more are repetitions do not count. Texts are
compared as datatrove simplifies them: small letters, no punctuation, no accents, all numbers equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.text import simplify_text

from train.content import TEXT_COLUMNS, texts_of
from train.data import SkipReport, read
from train.ledger import Ledger

FEWEST_WORDS = 8  # of a text shorter than an n-gram, which is then looked for whole; below that, too much would match


class Index:
    """Hashes of the n-grams of the evaluation files."""

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self.too_short = 0  # texts that cannot be looked for
        self._hashes: dict[int, set[int]] = {}  # by the n-gram's words

    def add(self, text: str) -> None:
        words = simplify_text(text).split()
        if len(words) < min(self.ngram, FEWEST_WORDS):
            self.too_short += 1
            return
        length = min(self.ngram, len(words))
        # rows of zeros and the like are in common with every table
        telling = (
            key for key, start in _ngrams(words, length) if len(set(words[start : start + length])) > length // 2
        )
        self._hashes.setdefault(length, set()).update(telling)

    def match(self, text: str) -> str | None:
        """The first n-gram in common."""
        words = simplify_text(text).split()
        for length, hashes in self._hashes.items():
            for key, start in _ngrams(words, length):
                if key in hashes:
                    return " ".join(words[start : start + length])
        return None


def read_index(paths: tuple[Path, ...], ngram: int) -> Index:
    """Of all texts in the files; in a record without the columns that we know, of all its strings.

    What a system message says is left out: it is the same in thousands of chats.
    """
    index = Index(ngram)
    for record in read(paths, SkipReport(max_bad_share=1.0)):
        known = any(name in record.columns for name in TEXT_COLUMNS)
        for text in texts_of(record.columns, system=False) if known else _strings(record.columns):
            index.add(text)
    return index


class Decontaminate(BaseFilter):  # type: ignore[misc]
    """The index is made in each process that runs the step: it would be too large to send along."""

    name = "decontamination"

    def __init__(self, paths: tuple[Path, ...], ngram: int, ledger: Ledger) -> None:
        super().__init__(ledger)
        self.paths = paths
        self.ngram = ngram
        self._index: Index | None = None

    def filter(self, doc: Any) -> bool | tuple[bool, str]:
        self._index = self._index or read_index(self.paths, self.ngram)
        if match := self._index.match(doc.text):
            doc.metadata["match"] = match
            return False, "contaminated"
        return True


def _ngrams(words: list[str], length: int) -> Iterator[tuple[int, int]]:
    for start in range(len(words) - length + 1):
        yield xxhash.xxh64_intdigest(" ".join(words[start : start + length]).encode()), start


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
