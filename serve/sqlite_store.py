"""The records in one SQLite file: WAL, synced at every commit, deleted rows overwritten."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from serve.rows import Row
from serve.store import SCHEMA_VERSION, Store, StoreError

log = logging.getLogger(__name__)

BUSY_SECONDS = 30  # another process erases
WAL_BYTES = 16 << 20

# AUTOINCREMENT never gives a number twice, so a cursor kept by a reader stays right after rows are erased.
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
CREATE INDEX IF NOT EXISTS interactions_created ON interactions (created);
CREATE INDEX IF NOT EXISTS interactions_subject ON interactions (subject) WHERE subject IS NOT NULL;
CREATE TABLE IF NOT EXISTS feedback (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    inference_id TEXT NOT NULL REFERENCES interactions (id) ON DELETE CASCADE,
    metric_name TEXT NOT NULL,
    idempotency_key TEXT UNIQUE,
    record TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS feedback_inference ON feedback (inference_id);
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""


class SqliteStore(Store):
    """`path` is the file; SQLite keeps its log beside it, as `-wal` and `-shm`."""

    errors = (sqlite3.Error, OSError)

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def disk(self) -> tuple[int, int] | None:
        usage = shutil.disk_usage(self.path.parent)
        return usage.free, usage.total

    def size(self) -> int:
        files = [self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal", "-shm")]
        return sum(file.stat().st_size for file in files if file.exists())

    def is_full(self, error: Exception) -> bool:
        if isinstance(error, OSError):
            return error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _code(error) == sqlite3.SQLITE_FULL

    def may_pass(self, error: Exception) -> bool:
        return self.is_full(error) or _code(error) == sqlite3.SQLITE_IOERR or getattr(error, "errno", 0) == errno.EIO

    def _connect(self) -> sqlite3.Connection:
        db = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Prompts are private. SQLite gives its WAL the mode of the file.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            version = self._check_schema(db)
            for pragma in (
                "journal_mode = WAL",
                "synchronous = FULL",
                "foreign_keys = ON",
                "secure_delete = ON",
                f"journal_size_limit = {WAL_BYTES}",
            ):
                db.execute(f"PRAGMA {pragma}")
            if version == 0:
                db.executescript(SCHEMA)
        except BaseException as error:
            if db is not None:
                db.close()
            if isinstance(error, sqlite3.Error | OSError) and not self.may_pass(error):
                raise StoreError(f"{self.path} cannot be opened: {error}") from error
            raise
        return db

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        db = None
        try:
            try:
                db = sqlite3.connect(f"file:{quote(str(self.path))}?mode=ro", uri=True, timeout=BUSY_SECONDS)
                if self._check_schema(db) == 0:
                    raise StoreError(f"{self.path} cannot be read: it has no records")
                yield db
            except sqlite3.Error as error:
                raise StoreError(f"{self.path} cannot be read: {error}") from error
        finally:
            if db is not None:
                db.close()

    def _check_schema(self, db: sqlite3.Connection) -> int:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version not in (0, SCHEMA_VERSION):
            raise StoreError(
                f"{self.path} was written by another Pawl (schema {version}; this one knows {SCHEMA_VERSION}). "
                "Run that one, or name another file with --records."
            )
        if version == 0 and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise StoreError(f"{self.path} is a database of something else; name another file with --records")
        return version

    def _begin(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN IMMEDIATE")

    def _undo(self, db: sqlite3.Connection, error: BaseException) -> bool:
        # After a failed sync the connection must live: a new one would find the commit in the WAL, and so bring back
        # what was refused.
        try:
            if db.in_transaction:
                db.execute("ROLLBACK")
        except sqlite3.Error as second:
            log.warning("records: rollback failed: %s", second)
            return False
        return not isinstance(error, sqlite3.Error) or self.may_pass(error)

    def _purge(self) -> str:
        # secure_delete overwrites rows, but not the stale copies in the gaps of pages that were balanced; a new file
        # has none. The log goes when nobody reads it any more.
        self._db.execute("VACUUM")
        if self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            raise StoreError(
                f"{self.path}-wal still holds deleted records: a reader has kept it for {BUSY_SECONDS} s. "
                "End that reader, then do this again."
            )
        return ""

    def _run(self, db: sqlite3.Connection, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return db.execute(query, values)

    def _among(self, column: str) -> str:
        return f"{column} IN (SELECT value FROM json_each(?))"

    def _set(self, values: Iterable[str]) -> str:
        return json.dumps(list(values))

    def _insert(self, db: sqlite3.Connection, columns: str, rows: Sequence[Row]) -> None:
        if rows:
            db.executemany(f"INSERT INTO {columns} VALUES ({', '.join('?' * len(rows[0]))})", rows)


def _code(error: BaseException) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
