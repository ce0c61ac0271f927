"""A snapshot: feedback and the interactions it judges, taken out of the records into Parquet for training and reports.

It begins after a cursor, `since`, and ends at another, `until`, where the next one begins. Its `lineage.json` names
every record in it, so that `python -m serve records erase` finds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from deploy.errors import DeployError
from proto.lineage import FolderLineage, read, write
from proto.records import Feedback, Interaction, utc_now
from serve.settings import Settings
from serve.store import Judged, StoreError, open_store
from train.flags import option
from train.folders import new_folder

INTERACTIONS = "interactions.parquet"
FEEDBACK = "feedback.parquet"
PAGE_ROWS = 1024
(RECORDS,) = (item.default for item in fields(Settings) if item.name == "records")  # where the server keeps them

_TEXT, _COUNT, _FLOAT = pa.string(), pa.int64(), pa.float64()
# JSON where the record holds objects. A value lies in the column of its type.
INTERACTION_SCHEMA = pa.schema(
    {
        **dict.fromkeys(("id", "created", "model", "model_digest", "endpoint", "messages"), _TEXT),
        **dict.fromkeys(("prompt", "completion", "params"), _TEXT),
        **dict.fromkeys(("prompt_tokens", "completion_tokens", "cached_tokens"), _COUNT),
        **dict.fromkeys(("ttft_seconds", "duration_seconds", "mean_logprob"), _FLOAT),
        **dict.fromkeys(("finish_reason", "subject", "request_id"), _TEXT),
    }
)
FEEDBACK_SCHEMA = pa.schema(
    {
        "sequence": _COUNT,
        **dict.fromkeys(("id", "created", "inference_id", "metric_name"), _TEXT),
        "value_boolean": pa.bool_(),
        "value_number": pa.float64(),
        "value_text": _TEXT,
        **dict.fromkeys(("tags", "idempotency_key", "source"), _TEXT),
    }
)
JSON_FIELDS = ("messages", "params", "tags")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    output: Path = field(metadata={"help": "folder to make", "parse": Path, "positional": True})
    records: str = option(RECORDS, "SQLite file or postgresql:// URL of interactions and feedback")
    since: int = option(0, "cursor: take feedback stored after it, such as the `until` of the last snapshot")
    unjudged: bool = option(False, "also take the interactions that nobody judged")


def run(options: Snapshot) -> int:
    lineage = snapshot(options)
    counts = f"{len(lineage.feedback)} feedback and {len(lineage.interactions)} interactions"
    print(f"{options.output}: {counts}, since {lineage.since} until {lineage.until}")
    return 0


def snapshot(options: Snapshot) -> FolderLineage:
    """Make the folder, whole or not at all. Raises DeployError, and TrainError if it exists already."""
    try:
        store = open_store(options.records)
        with new_folder(options.output) as folder:
            folder.chmod(0o700)  # people's words
            with (
                _Table(folder / INTERACTIONS, INTERACTION_SCHEMA) as interactions,
                _Table(folder / FEEDBACK, FEEDBACK_SCHEMA) as feedback,
            ):
                until = options.since
                for judged in tqdm(store.scan(options.since), desc="feedback", disable=None):
                    interactions.add(_row(judged.interaction))
                    feedback.add(_feedback_row(judged.sequence, judged.feedback))
                    until = judged.sequence
                if options.unjudged:
                    for logged in tqdm(store.interactions(), desc="interactions", disable=None):
                        interactions.add(_row(logged.interaction))
            lineage = FolderLineage(
                kind="snapshot",
                created=utc_now(),
                command=f"python -m deploy snapshot --since {options.since}" + " --unjudged" * options.unjudged,
                interactions=list(interactions.ids),
                feedback=list(feedback.ids),
                oldest=interactions.oldest,
                since=options.since,
                until=until,
            )
            write(folder, lineage)
    except StoreError as error:
        raise DeployError(str(error)) from error
    return lineage


def judgements(folder: Path) -> Iterator[Judged]:
    """A snapshot's feedback, each with its interaction. Raises OSError, LineageError and RecordError."""
    read(folder)
    rows = pq.read_table(folder / INTERACTIONS).to_pylist()
    interactions = {row["id"]: msgspec.convert(_decoded(row), Interaction) for row in rows}
    for page in pq.ParquetFile(folder / FEEDBACK).iter_batches(PAGE_ROWS):
        for row in page.to_pylist():
            sequence = row.pop("sequence")
            values = [row.pop(name) for name in ("value_boolean", "value_number", "value_text")]
            value = next(value for value in values if value is not None)
            feedback = msgspec.convert(_decoded(row) | {"value": value}, Feedback)
            yield Judged(sequence, feedback, interactions[feedback.inference_id])


def _row(record: Interaction | Feedback) -> dict[str, Any]:
    row: dict[str, Any] = msgspec.to_builtins(record)
    for name in JSON_FIELDS:
        if row.get(name) is not None:
            row[name] = msgspec.json.encode(row[name]).decode()
    return row


def _feedback_row(sequence: int, feedback: Feedback) -> dict[str, Any]:
    value = feedback.value
    kind = "boolean" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"
    return _row(feedback) | {"sequence": sequence, f"value_{kind}": value}


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: msgspec.json.decode(v) if name in JSON_FIELDS and v is not None else v for name, v in row.items()}


class _Table:
    """A Parquet file that grows by pages; of rows with the same id it takes the first."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.ids: dict[str, None] = {}
        self.oldest: str | None = None
        self._rows: list[dict[str, Any]] = []
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")

    def add(self, row: dict[str, Any]) -> None:
        if row["id"] in self.ids:
            return
        self.ids[row["id"]] = None
        self.oldest = min(self.oldest or row["created"], row["created"])
        self._rows.append(row)
        if len(self._rows) == PAGE_ROWS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._writer.close()


COMMANDS = {"snapshot": (Snapshot, run)}
