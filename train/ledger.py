"""What happened to documents, by reason, with a few examples: one JSON file for each step and part of the data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from proto.redaction import redact


@dataclass(slots=True)
class Tally:
    """Of one reason. An example is where it was and how it began."""

    count: int = 0
    characters: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)


class Ledger:
    """Takes what one step of a pipeline drops; datatrove's filters know it as their `exclusion_writer`.

    Examples are cut to `cut` characters, and redacted as the data will be.
    """

    def __init__(self, folder: Path, step: str, *, examples: int, cut: int, redacted: tuple[str, ...]) -> None:
        self.folder = folder / step
        self.step = step
        self.examples = examples
        self.cut = cut
        self.redacted = redacted
        self._rank = 0
        self._tallies: dict[str, Tally] = {}

    def __enter__(self) -> Ledger:
        self._tallies = {}
        return self

    def __exit__(self, *_: object) -> None:
        if not self._tallies:  # a filter that dropped nothing was not told which part it worked on
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({reason: asdict(tally) for reason, tally in self._tallies.items()})
        (self.folder / f"{self._rank:05d}.json").write_text(text)

    def write(self, document: Any, rank: int = 0) -> None:
        """A document that was dropped. A step without reasons of its own gives its name."""
        self._rank = rank
        reason = document.metadata.get("filter_reason", self.step)
        start = redact(document.text[: self.cut], self.redacted).text
        example = {"where": document.id, "text": start}
        if match := document.metadata.get("match"):
            example["match"] = match
        self.add(reason, characters=len(document.text), example=example)

    def add(self, reason: str, *, count: int = 1, characters: int = 0, example: dict[str, str] | None = None) -> None:
        tally = self._tallies.setdefault(reason, Tally())
        tally.count += count
        tally.characters += characters
        if example and len(tally.examples) < self.examples:
            tally.examples.append(example)

    def of_rank(self, rank: int) -> Ledger:
        """For steps that add by themselves and write no documents."""
        self._rank = rank
        return self

    def load(self) -> dict[str, Tally]:
        """All parts together, the most frequent reason first."""
        merged: dict[str, Tally] = {}
        for path in sorted(self.folder.glob("*.json")):
            for reason, part in json.loads(path.read_text()).items():
                whole = merged.setdefault(reason, Tally())
                whole.count += part["count"]
                whole.characters += part["characters"]
                whole.examples = (whole.examples + part["examples"])[: self.examples]
        return dict(sorted(merged.items(), key=lambda item: (-item[1].count, item[0])))
