"""Steps of the curation's pipelines that datatrove does not have: reading, keeping parts in order, redaction."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import exact_dedup, minhash
from loguru import logger
from tqdm import tqdm

from proto.redaction import redact
from train.content import text_of, texts_of, with_texts
from train.data import SkipReport, Source
from train.ledger import Ledger

# In every process that loads these steps: datatrove logs each, and shows bars where there is no terminal.
logger.disable("datatrove")
for _module in (exact_dedup, minhash):
    _module.tqdm = functools.partial(_module.tqdm, disable=True)

Documents = Iterator[Any]


def quiet(data: Documents | None, rank: int = 0, world_size: int = 1) -> Documents | None:
    """Does nothing, but a process that is given a pipeline with it loads this module."""
    return data


class Read(PipelineStep):  # type: ignore[misc]
    """Records of the inputs; what is no record or has no text goes to a ledger.

    With as many files as parts a part takes whole files, otherwise every so many-th record of all.
    """

    type = "read"
    name = "records"

    def __init__(self, sources: list[Source], counts: Ledger, unreadable: Ledger) -> None:
        super().__init__()
        self.sources = sources
        self.counts = counts
        self.unreadable = unreadable

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Documents:
        by_file = len(self.sources) >= world_size
        broken = SkipReport(max_bad_share=1.0)
        counts, unreadable = self.counts.of_rank(rank), self.unreadable.of_rank(rank)
        sources = self.sources[rank::world_size] if by_file else self.sources
        size = sum(source.num_bytes for source in sources)
        bar = tqdm(total=size, desc="read", unit="B", unit_scale=True, leave=False, disable=rank > 0 or None)
        with bar, counts, unreadable:
            records = (record for source in sources for record in source.read(broken, bar.update))
            for number, record in enumerate(records):
                if not by_file and number % world_size != rank:
                    continue
                document = _document(record.columns, record.where)
                if document.text.strip():
                    counts.add("read", characters=len(document.text))
                    yield document
                else:
                    reason = "empty text" if texts_of(record.columns) else "no column with text"
                    unreadable.add(reason, example={"where": record.where})
            for reason, count in broken.counts.items() if by_file or rank == 0 else ():
                for place in broken.places[reason]:
                    unreadable.add(reason, count=0, example={"where": place})
                unreadable.add(reason, count=count)


class WritePart(PipelineStep):  # type: ignore[misc]
    """Part number `rank` as JSON lines, written even if it is empty: what follows finds documents by place.

    With `counts` it is the last: the records alone, and counted.
    """

    type = "write"
    name = "part"

    def __init__(self, folder: Path, counts: Ledger | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.counts = counts

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            (self.folder / part_name(rank)).open("w", encoding="utf-8", newline="\n") as file,
            self.counts.of_rank(rank) if self.counts else contextlib.nullcontext() as counts,
        ):
            for document in data:
                columns = _columns(document)
                if counts:
                    counts.add("kept", characters=len(text_of(columns)))
                file.write(to_json(columns if counts else {"where": document.id, "columns": columns}) + "\n")
                yield document


class ReadPart(PipelineStep):  # type: ignore[misc]
    """What WritePart wrote between two stages. datatrove's own reader would skip an empty part and shift the others."""

    type = "read"
    name = "part"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Documents:
        with (self.folder / part_name(rank)).open(encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                yield _document(entry["columns"], entry["where"])


class Redact(PipelineStep):  # type: ignore[misc]
    """Personal data and secrets, in all texts of a record."""

    type = "format"
    name = "redaction"

    def __init__(self, kinds: tuple[str, ...], ledger: Ledger) -> None:
        super().__init__()
        self.kinds = kinds
        self.ledger = ledger

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        with self.ledger.of_rank(rank) as ledger:
            for document in data:
                counts: Counter[str] = Counter()

                def change(text: str, counts: Counter[str] = counts) -> str:
                    done = redact(text, self.kinds)
                    counts.update(done.counts)
                    return done.text

                columns = with_texts(_columns(document), change)
                for kind, count in counts.items():
                    ledger.add(kind, count=count)
                yield _document(columns, document.id)


def comparable(document: Any) -> str:
    """What exact de-duplication compares: the text, whatever its blanks and its form of Unicode."""
    return " ".join(unicodedata.normalize("NFC", document.text).split())


def part_name(rank: int) -> str:
    return f"{rank:05d}.jsonl"


def to_json(columns: dict[str, Any]) -> str:
    """One line. What JSON has no word for becomes text, and numbers that are none become null."""
    try:
        return json.dumps(columns, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_finite(columns), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _document(columns: dict[str, Any], where: str) -> Any:
    return Document(text=text_of(columns), id=where, metadata={"columns": columns})


def _columns(document: Any) -> dict[str, Any]:
    """The record, with the lines gone that C4's filter took from plain text. Of chats it only judges."""
    columns: dict[str, Any] = document.metadata["columns"]
    if texts_of(columns) == [columns.get("text")]:
        return {**columns, "text": document.text}
    return columns
