"""Filters by quality: datatrove's for English prose, and one for code. None needs a network."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.c4_filters import C4QualityFilter
from datatrove.pipeline.filters.fineweb_quality_filter import FineWebQualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from train.ledger import Ledger
from train.stdlib import GENERATED, GENERATED_WITHIN

_WORD = re.compile(r"\w+(?:[.'’-]\w+)*|([^\w\s])\1*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|\Z)")
MAX_LINE = 1000
MAX_MEAN_LINE = 100
MIN_ALPHABETIC = 0.25


class Words(WordTokenizer):  # type: ignore[misc]
    """Words, and punctuation apart from them, by a rule.

    datatrove's own for English is spaCy's, a large package for this; NLTK's asks for a download.
    """

    def word_tokenize(self, text: str) -> list[str]:
        return [match[0] for match in _WORD.finditer(text)]

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        if text[ends[-1] if ends else 0 :].strip():
            ends.append(len(text))
        return list(zip([0, *ends], ends, strict=False))


class CodeFilter(BaseFilter):  # type: ignore[misc]
    """The rules for source files of Codex (Chen et al. 2021, 3.1) and StarCoder (Li et al. 2023, 3.2)."""

    name = "code"

    def filter(self, doc: Any) -> bool | tuple[bool, str]:
        lines = doc.text.splitlines() or [""]
        if GENERATED.search(doc.text[:GENERATED_WITHIN]):
            return False, "code_generated"
        if max(map(len, lines)) > MAX_LINE:
            return False, "code_long_line"
        if sum(map(len, lines)) > MAX_MEAN_LINE * len(lines):
            return False, "code_mean_line"
        if sum(map(str.isalpha, doc.text)) < MIN_ALPHABETIC * len(doc.text):
            return False, "code_alphabetic"
        return True


def make_filter(name: str, ledger: Ledger) -> Any:
    """A step that drops what `name` (see FILTERS) does not let through, into `ledger`."""
    return _MAKERS[name](ledger)


# datatrove takes a tokenizer where it asks for a language.
_MAKERS: dict[str, Callable[[Ledger], Any]] = {
    "gopher-quality": lambda ledger: GopherQualityFilter(language=Words(), exclusion_writer=ledger),
    "gopher-repetition": lambda ledger: GopherRepetitionFilter(language=Words(), exclusion_writer=ledger),
    "c4": lambda ledger: C4QualityFilter(language=Words(), exclusion_writer=ledger),
    "fineweb": lambda ledger: FineWebQualityFilter(language=Words(), exclusion_writer=ledger),
    "code": CodeFilter,
}
