"""Personal data and secrets taken out of a record before it is written.

The kinds are those of `proto.redaction`; `presidio` adds Microsoft's analyser, if it is installed, which finds names
and places too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from proto.records import Feedback, Interaction
from proto.redaction import redact
from serve.settings import NONE, PRESIDIO
from serve.store import Record, StoreError

MAX_LABEL = 256  # characters that a label's value may have; a mark can be longer than what it stands for
T = TypeVar("T")


class Redactor:
    """Made from the value of `--redact`. Raises StoreError when Presidio is asked for and missing."""

    def __init__(self, kinds: str) -> None:
        names = [name for name in kinds.split(",") if name != NONE]
        self._kinds = [name for name in names if name != PRESIDIO]
        self._presidio = _presidio() if PRESIDIO in names else None

    def __call__(self, record: Record) -> Record:
        """The same record with marks such as `<EMAIL>`; its ids and its subject stay."""
        if isinstance(record, Feedback):
            value = self._walk(record.value)
            return msgspec.structs.replace(record, value=value, tags=self._labels(record.tags))
        params = dict(record.params)
        if "stop" in params:
            params["stop"] = self._walk(params["stop"])
        if "metadata" in params:
            params["metadata"] = self._labels(params["metadata"])
        changed: Interaction = msgspec.structs.replace(
            record,
            messages=self._walk(record.messages),
            prompt=self._walk(record.prompt),
            completion=self._walk(record.completion),
            params=params,
        )
        return changed

    def text(self, text: str) -> str:
        """A text with its marks."""
        if self._kinds:
            text = redact(text, self._kinds).text
        return text if self._presidio is None else self._presidio(text)

    def _walk(self, value: T) -> T:
        """The same value with all strings in it redacted, but for the names of fields."""
        changed: Any = value
        if isinstance(value, str):
            changed = self.text(value)
        elif isinstance(value, dict):
            changed = {name: self._walk(item) for name, item in value.items()}
        elif isinstance(value, list | tuple):
            changed = [self._walk(item) for item in value]
        return changed  # type: ignore[no-any-return]

    def _labels(self, labels: dict[str, str]) -> dict[str, str]:
        return {name: self.text(value)[:MAX_LABEL] for name, value in labels.items()}


def _presidio() -> Callable[[str], str]:
    try:
        import presidio_analyzer
    except ImportError as error:
        raise StoreError("--redact presidio needs `pip install presidio-analyzer` and a spaCy model") from error
    analyzer = presidio_analyzer.AnalyzerEngine()

    def mark(text: str) -> str:
        found = sorted(analyzer.analyze(text=text, language="en"), key=lambda r: (r.start, -r.end))
        pieces, position = [], 0
        for result in found:
            if result.start >= position:  # of two that overlap, the first
                pieces += [text[position : result.start], f"<{result.entity_type}>"]
                position = result.end
        return "".join([*pieces, text[position:]])

    return mark
