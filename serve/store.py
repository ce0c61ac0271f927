"""The SQLite file of interactions and feedback: its schema, what may be written, and how it is read back.

One connection writes, owned by `serve.records`; each reader opens its own.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import msgspec

from proto import records
from proto.records import Feedback, Interaction
from serve.errors import InvalidRequest, NotFound, PawlError

SCHEMA_VERSION = 1
PAGE_ROWS = 256

Row = tuple[str | None, ...]

# Content lies in its own column, so that it can expire before the rest. AUTOINCREMENT never gives a number twice,
# so a cursor kept by a reader stays right after rows are erased.
SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS interactions (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    created TEXT NOT NULL,
    subject TEXT,
    record TEXT NOT NULL,
    content TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS interactions_subject ON interactions (subject) WHERE subject IS NOT NULL;
CREATE TABLE IF NOT EXISTS feedback (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    inference_id TEXT NOT NULL REFERENCES interactions (id) ON DELETE CASCADE,
    idempotency_key TEXT UNIQUE,
    record TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS feedback_inference ON feedback (inference_id);
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

Content = tuple[list[dict[str, object]] | None, str | None, str | None]  # messages, prompt, completion


class StoreError(Exception):
    """The file is not ours to use; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A feedback with the interaction it judges. `sequence` is the cursor to continue from."""

    sequence: int
    feedback: Feedback
    interaction: Interaction


def open_writer(path: Path) -> sqlite3.Connection:
    """Open the file, making it if need be. Raises StoreError when it is not ours to use."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Prompts are private. SQLite gives its WAL the mode of the file.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        version = _check_schema(db, path)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute(f"PRAGMA journal_size_limit = {16 << 20}")
        if version == 0:
            db.executescript(SCHEMA)
    except BaseException:
        db.close()
        raise
    return db


def interaction_row(record: Interaction) -> Row:
    """What `insert_interaction` writes. Raises RecordError when the record breaks its contract."""
    content = (record.messages, record.prompt, record.completion)
    data = records.encode(msgspec.structs.replace(record, messages=None, prompt=None, completion=None))
    held = None if content == (None, None, None) else msgspec.json.encode(content).decode()
    return (record.id, record.created, record.subject, data.decode(), held)


def feedback_row(feedback: Feedback) -> Row:
    """What `insert_feedback` writes. Raises RecordError when the record breaks its contract."""
    return (feedback.id, feedback.inference_id, feedback.idempotency_key, records.encode(feedback).decode())


def insert_interaction(db: sqlite3.Connection, row: Row) -> None:
    db.execute("INSERT INTO interactions (id, created, subject, record, content) VALUES (?, ?, ?, ?, ?)", row)


def insert_feedback(db: sqlite3.Connection, feedback: Feedback, row: Row) -> str | PawlError:
    """Inside the writer's transaction: the id that stands for this feedback, or why it is refused."""
    if feedback.idempotency_key is not None:
        query = "SELECT record FROM feedback WHERE idempotency_key = ?"
        if found := db.execute(query, (feedback.idempotency_key,)).fetchone():
            first = records.decode(found[0], Feedback)
            if _said(first) == _said(feedback):
                return first.id
            problem = f"idempotency key {feedback.idempotency_key!r} was used for another feedback; use a new one"
            return InvalidRequest(problem, param="idempotency_key")
    if not db.execute("SELECT 1 FROM interactions WHERE id = ?", (feedback.inference_id,)).fetchone():
        return _not_found(feedback.inference_id)
    db.execute("INSERT INTO feedback (id, inference_id, idempotency_key, record) VALUES (?, ?, ?, ?)", row)
    return feedback.id


def read_interaction(path: Path, id: str) -> Interaction:
    """The interaction of that id. Raises NotFound."""
    with closing(_open_reader(path)) as db:
        row = db.execute("SELECT record, content FROM interactions WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise _not_found(id)
    return _interaction(*row)


def scan_feedback(path: Path, since: int = 0) -> Iterator[Judged]:
    """Feedback after the cursor `since`, in the order it was stored, each with its interaction."""
    query = """
        SELECT f.sequence, f.record, i.record, i.content
        FROM feedback f JOIN interactions i ON i.id = f.inference_id
        WHERE f.sequence > ? ORDER BY f.sequence LIMIT ?"""
    with closing(_open_reader(path)) as db:
        # In pages, since one long read would keep the WAL from being checkpointed.
        while page := db.execute(query, (since, PAGE_ROWS)).fetchall():
            for since, feedback, record, content in page:
                yield Judged(since, records.decode(feedback, Feedback), _interaction(record, content))


def _open_reader(path: Path) -> sqlite3.Connection:
    db = None
    try:
        db = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)
        _check_schema(db, path)
    except (sqlite3.Error, StoreError) as error:
        if db is not None:
            db.close()
        raise error if isinstance(error, StoreError) else StoreError(f"{path} cannot be read: {error}") from error
    return db


def _check_schema(db: sqlite3.Connection, path: Path) -> int:
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer Pawl (schema {version}; this one knows {SCHEMA_VERSION}). "
            "Run that one, or name another file with --records."
        )
    if version == 0 and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise StoreError(f"{path} is a database of something else; name another file with --records")
    return version


def _said(feedback: Feedback) -> tuple[str, str, bool | float | str]:
    return feedback.inference_id, feedback.metric_name, feedback.value


def _interaction(record: str, content: str | None) -> Interaction:
    found = records.decode(record, Interaction)
    if content is None:
        return found
    messages, prompt, completion = msgspec.json.decode(content, type=Content)
    return msgspec.structs.replace(found, messages=messages, prompt=prompt, completion=completion)


def _not_found(id: str) -> NotFound:
    return NotFound(f"no interaction has the id {id!r}", param="inference_id")
