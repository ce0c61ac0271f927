"""The records in a PostgreSQL database, which several servers may share.

The password is libpq's business: in the URL, in `PGPASSWORD` or in `~/.pgpass`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from psycopg import conninfo, errors

from serve.rows import Row
from serve.store import SCHEMA_VERSION, Store, StoreError

CONNECT_SECONDS = 3
STATEMENT_SECONDS = 30  # a commit that takes longer is refused
WRITERS_LOCK = 0x7061776C  # "pawl": held while rows are written, by one server at a time

# Statistics would copy people's words into the catalogue, where no erasure finds them.
SCHEMA = f"""
CREATE TABLE interactions (
    sequence BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    created TEXT COLLATE "C" NOT NULL,
    subject TEXT,
    record TEXT NOT NULL,
    content TEXT
);
ALTER TABLE interactions ALTER subject SET STATISTICS 0, ALTER record SET STATISTICS 0, ALTER content SET STATISTICS 0;
CREATE INDEX interactions_created ON interactions (created);
CREATE INDEX interactions_subject ON interactions (subject) WHERE subject IS NOT NULL;
CREATE TABLE feedback (
    sequence BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    inference_id TEXT NOT NULL REFERENCES interactions (id) ON DELETE CASCADE,
    metric_name TEXT NOT NULL,
    idempotency_key TEXT UNIQUE,
    record TEXT NOT NULL
);
ALTER TABLE feedback ALTER idempotency_key SET STATISTICS 0, ALTER record SET STATISTICS 0;
CREATE INDEX feedback_inference ON feedback (inference_id);
CREATE TABLE pawl_schema (version INTEGER NOT NULL);
INSERT INTO pawl_schema VALUES ({SCHEMA_VERSION});
"""

Connection = psycopg.Connection[Any]


class PostgresStore(Store):
    """`url` is libpq's: `postgresql://user@host/database?option=value`."""

    errors = (psycopg.Error,)

    def __init__(self, url: str) -> None:
        try:
            known = conninfo.conninfo_to_dict(url)
        except psycopg.ProgrammingError as error:
            raise StoreError(f"--records is no PostgreSQL URL: {str(error).strip()}") from error
        super().__init__(f"PostgreSQL database {known.get('dbname', '')!r} at {known.get('host', 'localhost')}")
        self._url = url

    def size(self) -> int:
        query = "SELECT pg_total_relation_size('interactions') + pg_total_relation_size('feedback')"
        with self._reader() as db:
            return int(db.execute(query).fetchone()[0])  # type: ignore[index]

    def is_full(self, error: Exception) -> bool:
        return isinstance(error, errors.DiskFull)

    def may_pass(self, error: Exception) -> bool:
        return isinstance(error, psycopg.OperationalError)  # among them DiskFull

    def _open(self, **options: Any) -> Connection:
        return psycopg.connect(
            self._url,
            autocommit=True,
            connect_timeout=CONNECT_SECONDS,
            tcp_user_timeout=1000 * STATEMENT_SECONDS,
            application_name="pawl",
            **options,
        )

    def _connect(self) -> Connection:
        db = self._open(options=f"-c statement_timeout={STATEMENT_SECONDS}s -c synchronous_commit=on")
        try:
            self._begin(db)
            if self._check_schema(db) == 0:
                db.execute(SCHEMA)
            db.execute("COMMIT")
        except psycopg.Error as error:
            db.close()
            if self.may_pass(error):
                raise
            raise StoreError(f"{self.name} cannot be used: {error}") from error
        except BaseException:
            db.close()
            raise
        return db

    @contextmanager
    def _reader(self) -> Iterator[Connection]:
        try:
            db = self._open(options="-c default_transaction_read_only=on")
            with db:
                if self._check_schema(db) == 0:
                    raise StoreError(f"{self.name} cannot be read: it has no records")
                yield db
        except psycopg.Error as error:
            raise StoreError(f"{self.name} cannot be read: {error}") from error

    def _check_schema(self, db: Connection) -> int:
        tables = "SELECT count(*) FROM pg_tables WHERE schemaname = current_schema() AND tablename = ANY(%s)"
        if not db.execute(tables, (["pawl_schema"],)).fetchone()[0]:  # type: ignore[index]
            if db.execute(tables, (["interactions", "feedback"],)).fetchone()[0]:  # type: ignore[index]
                raise StoreError(f"{self.name} is a database of something else; name another one with --records")
            return 0
        version = int(db.execute("SELECT version FROM pawl_schema").fetchone()[0])  # type: ignore[index]
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{self.name} was written by another Pawl (schema {version}; this one knows {SCHEMA_VERSION}). "
                "Run that one, or name another database with --records."
            )
        return version

    def _begin(self, db: Connection) -> None:
        db.execute(f"BEGIN; SELECT pg_advisory_xact_lock({WRITERS_LOCK})")  # in one message

    def _undo(self, db: Connection, error: BaseException) -> bool:
        with suppress(psycopg.Error):
            db.execute("ROLLBACK")
        return not db.closed and not db.broken

    def _purge(self) -> str:
        # VACUUM FULL writes new files. The database's own log keeps the old rows until its segments go.
        self._db.execute("SET statement_timeout = 0")
        try:
            self._db.execute("VACUUM FULL interactions")
            self._db.execute("VACUUM FULL feedback")
            self._db.execute("SELECT pg_switch_wal()")
            self._db.execute("CHECKPOINT")
        except errors.InsufficientPrivilege:
            return "the database's write-ahead log, until its old segments are overwritten, and its backups"
        finally:
            self._db.execute(f"SET statement_timeout = '{STATEMENT_SECONDS}s'")
        return "the database's backups, and its write-ahead log if wal_recycle is on"

    def _run(self, db: Connection, query: str, values: Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        return db.execute(query.replace("?", "%s"), values)

    def _among(self, column: str) -> str:
        return f"{column} = ANY(?)"

    def _set(self, values: Iterable[str]) -> list[str]:
        return list(values)

    def _insert(self, db: Connection, columns: str, rows: Sequence[Row]) -> None:
        if rows:
            with db.cursor() as cursor:
                cursor.executemany(f"INSERT INTO {columns} VALUES ({', '.join(['%s'] * len(rows[0]))})", rows)
