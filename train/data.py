"""Records from disk as a stream: JSON lines, Parquet, plain text, folders saved by Hugging Face `datasets`."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from train.errors import DataError

ROWS_AT_ONCE = 1024  # of a table, made into Python objects
PLACES_KEPT = 3  # examples of each reason in a report
FEWEST_RECORDS = 100_000  # on which the share of bad records is judged before the end is seen

Progress = Callable[[int], object]  # takes the bytes that were read since the last call


class Kind(StrEnum):
    JSON_LINES = "json lines"
    PARQUET = "parquet"
    TEXT = "text"
    SAVED = "saved by datasets"


KINDS = {
    ".jsonl": Kind.JSON_LINES,
    ".jsonl.gz": Kind.JSON_LINES,
    ".parquet": Kind.PARQUET,
    ".txt": Kind.TEXT,
    ".md": Kind.TEXT,
    ".py": Kind.TEXT,
}


@dataclass(frozen=True, slots=True)
class Record:
    """The columns of one record, and the line or row (from 1) of the file that it came from."""

    columns: dict[str, Any]
    path: Path
    row: int

    @property
    def where(self) -> str:
        return f"{self.path}:{self.row}"


@dataclass(slots=True)
class SkipReport:
    """What was left out, by reason, with the first few places of each.

    A record that is broken is bad; one that is sound but of no use is only skipped. If the bad ones are more than
    `max_bad_share` of all (one is always forgiven), the data are taken to be wrong. Judged as reading goes, as if
    at least FEWEST_RECORDS had been read, and exactly at the end.
    """

    max_bad_share: float = 0.001
    num_records: int = 0
    num_bad: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    first_bad: str = ""

    def skip(self, reason: str, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < PLACES_KEPT:
            places.append(where)

    def bad(self, reason: str, where: str) -> None:
        """Raises DataError if there are too many by now."""
        self.skip(reason, where)
        self.num_bad += 1
        self.first_bad = self.first_bad or f"{where} ({reason})"
        self._judge(max(self.num_records, FEWEST_RECORDS))

    def finish(self) -> None:
        """Raises DataError if too many records were bad."""
        self._judge(self.num_records)

    def _judge(self, num_records: int) -> None:
        if self.num_bad > max(1, self.max_bad_share * num_records):
            raise DataError(
                f"{self.num_bad:,} of {self.num_records:,} records so far are bad, the first at {self.first_bad}; "
                f"at most {self.max_bad_share:.3%} may be; correct or remove them"
            )

    def __str__(self) -> str:
        lines = [f"{sum(self.counts.values()):,} of {self.num_records:,} records skipped"]
        for reason, count in sorted(self.counts.items()):
            places = self.places[reason]
            more = ", ..." if count > len(places) else ""
            lines.append(f"  {reason}: {count:,} ({', '.join(places)}{more})")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Source:
    """One file, or one folder saved by `datasets`."""

    path: Path
    kind: Kind

    @property
    def files(self) -> list[Path]:
        """Those that hold the records, in order."""
        if self.kind != Kind.SAVED:
            return [self.path]
        state = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
        return [self.path / item["filename"] for item in state["_data_files"]]

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def read(self, report: SkipReport, progress: Progress) -> Iterator[Record]:
        """Raises DataError if the file is not of its kind."""
        if self.num_bytes == 0:
            report.num_records += 1
            report.skip("empty file", f"{self.path}:1")
            return
        rows = {
            Kind.JSON_LINES: _json_lines,
            Kind.PARQUET: _parquet,
            Kind.TEXT: _text,
            Kind.SAVED: _saved,
        }[self.kind]
        for row, found in rows(self.path, progress):
            report.num_records += 1
            if isinstance(found, str):
                report.bad(found, f"{self.path}:{row}")
            else:
                yield Record(found, self.path, row)


# Row numbers with their columns, or with the reason why they have none.
Rows = Iterator[tuple[int, dict[str, Any] | str]]


def find_sources(path: Path) -> list[Source]:
    """What `path` names: a file, a folder saved by `datasets`, or all files of known kinds below a folder, sorted.

    Raises DataError if there is nothing that can be read.
    """
    if not path.exists():
        raise DataError(f"there is no {path}; give a file or a folder that exists")
    if path.is_dir():
        return _in_folder(path)
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{path} has an unknown extension; known are {', '.join(KINDS)} and folders of them")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; give a file with records")
    return [Source(path, kind)]


def read(paths: Sequence[Path], report: SkipReport | None = None, progress: Progress | None = None) -> Iterator[Record]:
    """The records of all `paths`, in order. Bad ones are counted in `report`.

    Raises DataError for a path that cannot be read or gives no record, and if too many records are bad.
    """
    report = report or SkipReport()
    for path in paths:
        empty = True
        for source in find_sources(path):
            for record in source.read(report, progress or (lambda _: None)):
                empty = False
                yield record
        if empty:
            report.finish()
            raise DataError(f"{path} holds no records" + (f": {report}" if report.counts else ""))
    report.finish()


def _kind(path: Path) -> Kind | None:
    name = path.name.lower()
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), None)


def _in_folder(folder: Path) -> list[Source]:
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        if "train" not in names:
            raise DataError(f"{folder} has no split train but {', '.join(names)}; give {folder / names[0]}, say")
        folder /= "train"
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return [Source(folder, Kind.SAVED)]
    sources = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and (kind := _kind(path)):
            sources.append(Source(path, kind))
    if not sources:
        raise DataError(f"{folder} has nothing to read: no file with one of {', '.join(KINDS)}")
    return sources


def _json_lines(path: Path, progress: Progress) -> Rows:
    zipped = path.suffix.lower() == ".gz"
    with path.open("rb") as file, gzip.GzipFile(fileobj=file) if zipped else nullcontext(file) as stream:
        reported = 0
        try:
            for row, line in enumerate(stream, 1):
                if row == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield row, _parse(line)
                if row % ROWS_AT_ONCE == 0:
                    progress(file.tell() - reported)
                    reported = file.tell()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is no whole gzip file ({error}); make it again") from error
        progress(file.tell() - reported)


def _parse(line: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return "broken UTF-8"
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(value, dict):
        return "not a JSON object"
    # Half of a surrogate pair can be escaped in JSON but is no character, and no tokenizer takes it.
    if b"\\ud" in line.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "broken Unicode"
    return value


def _text(path: Path, progress: Progress) -> Rows:
    data = path.read_bytes()
    try:
        yield 1, {"text": data.decode("utf-8-sig")}
    except UnicodeDecodeError:
        yield 1, "broken UTF-8"
    progress(len(data))


def _parquet(path: Path, progress: Progress) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=ROWS_AT_ONCE)  # one row group after another
            yield from _table_rows(batches, file.metadata.num_rows, path.stat().st_size, progress)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no sound Parquet file ({error}); make it again") from error


def _saved(path: Path, progress: Progress) -> Rows:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path)).with_format("arrow")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no sound folder of `datasets` ({error}); save it again") from error
    size = Source(path, Kind.SAVED).num_bytes
    yield from _table_rows(dataset.iter(batch_size=ROWS_AT_ONCE), len(dataset), size, progress)


def _table_rows(tables: Iterable[Any], num_rows: int, num_bytes: int, progress: Progress) -> Rows:
    """`tables` are Arrow tables or record batches with `num_rows` rows in all."""
    row = 0
    for table in tables:
        try:
            values: list[dict[str, Any] | str] = table.to_pylist()
        except UnicodeDecodeError:
            values = [_row(table.slice(number, 1)) for number in range(table.num_rows)]
        before = num_bytes * row // num_rows
        for value in values:
            row += 1
            yield row, value
        progress(num_bytes * row // num_rows - before)


def _row(table: Any) -> dict[str, Any] | str:
    try:
        columns: dict[str, Any] = table.to_pylist()[0]
    except UnicodeDecodeError:
        return "broken UTF-8"
    return columns
