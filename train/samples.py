"""From records to sequences of tokens, each with a mask of what is learnt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from train.conversations import Refused, Renderer, Rendering, Turns, check_messages
from train.data import Record, SkipReport
from train.errors import DataError
from train.sequences import Encoder, TokenSequence, pieces, shorten

TooLong = Literal["skip", "cut"]
CONVERSATION = {"messages", "prompt", "completion"}
CHARACTERS_AT_ONCE = 1_000_000  # of text given to the tokenizer, which shares them out over the cores


class Shape(StrEnum):
    """What records are to be: see COLUMNS."""

    TEXT = "text"
    CHAT = "chat"
    PAIRS = "pairs"
    THUMBS = "thumbs"
    CLASSES = "classes"


COLUMNS = {
    Shape.TEXT: '"text", or "messages", or "prompt" and "completion"',
    Shape.CHAT: '"messages", or "prompt" and "completion"',
    Shape.PAIRS: '"prompt", "chosen" and "rejected", or the last two as messages that begin alike; "weight" if wished',
    Shape.THUMBS: '"prompt", "completion" and "label" (true or false); "weight" if wished',
    Shape.CLASSES: '"text" or "messages", and "label" (a string or an integer); "weight" if wished',
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence, but for text (its pieces, one after another) and pairs (the chosen and the rejected)."""

    sequences: list[TokenSequence]
    weight: float = 1.0
    target: int | str = 0  # thumbs: 1 for up; classes: the label


@dataclass(frozen=True, slots=True)
class _Draft:
    """A sample before the tokenizer has seen it."""

    where: str
    renderings: list[Rendering]
    weight: float = 1.0
    target: int | str = 0


class SampleMaker:
    """Makes samples of at most `context` tokens of records of one shape.

    Text is cut into pieces, each starting with the last token of the one before, so that every token is foretold
    once. Other samples that are too long are skipped, or with `too_long` "cut" shortened: examples of classes at the
    end, the others at the start of the prompt (a first token that is the tokenizer's BOS stays). An answer whose
    start was cut off is not learnt, and what has nothing to learn is skipped; the prompt of a pair is cut alike for
    both answers. Reasons and places go to `report`.
    """

    def __init__(
        self,
        tokenizer: Any,
        shape: Shape,
        context: int,
        report: SkipReport,
        *,
        too_long: TooLong = "skip",
        labels: Sequence[str] = (),
    ) -> None:
        """`tokenizer` is a fast one of transformers; `labels` are the names of the classes, if they are known.

        Raises DataError if the tokenizer or the context does not do.
        """
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} is no fast tokenizer; give one with a tokenizer.json")
        if tokenizer.eos_token_id is None and shape != Shape.CLASSES:
            raise DataError("the tokenizer has no EOS token to end a text with; set eos_token in tokenizer_config.json")
        if context < 2:
            raise DataError(f"a context of {context} tokens has nothing to learn; give at least 2")
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer)
        self._encoder = Encoder(tokenizer, end_text=shape != Shape.CLASSES)
        self._shape = shape
        self._context = context
        self._report = report
        self._too_long = too_long
        self._labels = frozenset(labels)
        self._draft: Callable[[Record], _Draft] = {
            Shape.TEXT: self._text,
            Shape.CHAT: self._chat,
            Shape.PAIRS: self._pair,
            Shape.THUMBS: self._thumb,
            Shape.CLASSES: self._class,
        }[shape]

    def make(self, records: Iterable[Record]) -> Iterator[Sample]:
        """In the records' order. Raises DataError for a record without the columns of the shape."""
        drafts: list[_Draft] = []
        size = 0
        for record in records:
            try:
                draft = self._draft(record)
            except Refused as error:
                self._report.bad(f"refused by the chat template: {error}", record.where)
                continue
            drafts.append(draft)
            size += sum(len(rendering.text) for rendering in draft.renderings)
            if size >= CHARACTERS_AT_ONCE:
                yield from self._finish(drafts)
                drafts, size = [], 0
        yield from self._finish(drafts)

    # From a record to a draft, by shape.

    def _text(self, record: Record) -> _Draft:
        said: Turns
        if "text" in record.columns or not record.columns.keys() & CONVERSATION:
            said = self._string(record, "text")
        elif "messages" in record.columns:
            said = self._messages(record, "messages")
        else:
            said = self._renderer.join(self._turns(record, "prompt"), self._turns(record, "completion"))
        return _Draft(record.where, [self._renderer.whole(said, record.where)])

    def _chat(self, record: Record) -> _Draft:
        if "messages" in record.columns or not record.columns.keys() & CONVERSATION:
            return _Draft(record.where, [self._renderer.conversation(self._messages(record, "messages"), record.where)])
        prompt, completion = self._turns(record, "prompt"), self._turns(record, "completion")
        return _Draft(record.where, [self._renderer.answered(prompt, completion, record.where)])

    def _pair(self, record: Record) -> _Draft:
        chosen, rejected = self._turns(record, "chosen"), self._turns(record, "rejected")
        if "prompt" in record.columns or isinstance(chosen, str) or isinstance(rejected, str):
            prompt = self._turns(record, "prompt")
        else:
            pairs = zip(chosen, rejected, strict=False)
            common = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
            prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
        if chosen == rejected:
            self._report.skip("chosen and rejected are the same", record.where)
            return _Draft(record.where, [])
        answers = [self._renderer.answered(prompt, answer, record.where) for answer in (chosen, rejected)]
        return _Draft(record.where, answers, self._weight(record))

    def _thumb(self, record: Record) -> _Draft:
        prompt, completion = self._turns(record, "prompt"), self._turns(record, "completion")
        label = self._column(record, "label", bool)
        rendering = self._renderer.answered(prompt, completion, record.where)
        return _Draft(record.where, [rendering], self._weight(record), int(label))

    def _class(self, record: Record) -> _Draft:
        said: Turns
        if "text" not in record.columns and "messages" in record.columns:
            said = self._messages(record, "messages")
        else:
            said = self._string(record, "text")
        rendering = self._renderer.whole(said, record.where)
        label: int | str = self._column(record, "label", int, str)
        if isinstance(label, bool):
            raise self._wrong(record, '"label" is bool')
        if self._labels and str(label) not in self._labels:
            raise DataError(f"{record.where}: the label {label!r} is none of {', '.join(sorted(self._labels))}")
        return _Draft(record.where, [rendering], self._weight(record), label)

    # Columns.

    def _column(self, record: Record, name: str, *types: type) -> Any:
        if name not in record.columns:
            raise self._wrong(record, f'there is no column "{name}"')
        value = record.columns[name]
        if not isinstance(value, types):
            raise self._wrong(record, f'"{name}" is {type(value).__name__}')
        return value

    def _wrong(self, record: Record, what: str) -> DataError:
        found = ", ".join(f'"{name}"' for name in record.columns) or "none"
        return DataError(
            f"{record.where}: {what}; the columns found are {found}, and {self._shape} wants {COLUMNS[self._shape]}"
        )

    def _string(self, record: Record, name: str) -> str:
        return str(self._column(record, name, str))

    def _messages(self, record: Record, name: str) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = self._column(record, name, list)
        check_messages(messages, name, record.where)
        return messages

    def _turns(self, record: Record, name: str) -> Any:
        """A string or a list of messages."""
        value = self._column(record, name, str, list)
        if not isinstance(value, str):
            check_messages(value, name, record.where)
        return value

    def _weight(self, record: Record) -> float:
        if record.columns.get("weight") is None:
            return 1.0
        weight = float(self._column(record, "weight", int, float))
        if not (math.isfinite(weight) and weight >= 0):
            raise self._wrong(record, f'"weight" is {weight}, not a number from 0 up')
        return weight

    # From drafts to samples.

    def _finish(self, drafts: Sequence[_Draft]) -> Iterator[Sample]:
        renderings = [rendering for draft in drafts for rendering in draft.renderings]
        sequences = iter(self._encoder.encode(renderings))
        for draft in drafts:
            own = [next(sequences) for _ in draft.renderings]
            if own and (fitted := self._fit(own, draft)):
                yield Sample(fitted, draft.weight, draft.target)

    def _fit(self, sequences: list[TokenSequence], draft: _Draft) -> list[TokenSequence]:
        """Within the context; none if the sample is skipped."""
        if self._shape in (Shape.TEXT, Shape.CLASSES):
            whole = sequences[0]
            of_use = whole.can_learn if self._shape == Shape.TEXT else len(whole.tokens)
            if not of_use or not draft.renderings[0].text.strip():
                return self._skip("empty text", draft)
            if self._shape == Shape.TEXT:
                return pieces(whole, self._context)
            if self._too_long == "cut":
                return [whole.part(0, self._context)]
        else:
            if not all(sequence.can_learn for sequence in sequences):
                return self._skip("no answer", draft)
            sequences = [sequence.part(0, sequence.end) for sequence in sequences]
        excess = max(len(sequence.tokens) for sequence in sequences) - self._context
        if excess <= 0:
            return sequences
        if self._too_long == "cut":
            sequences = [shorten(sequence, excess, self._tokenizer.bos_token_id) for sequence in sequences]
            if all(sequence.can_learn for sequence in sequences):
                return sequences
        return self._skip("too long", draft)

    def _skip(self, reason: str, draft: _Draft) -> list[TokenSequence]:
        self._report.skip(reason, draft.where)
        return []
