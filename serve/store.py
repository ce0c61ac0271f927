"""Where interactions and feedback are kept: `append -> acknowledgement`, `scan since`, `expire`, `erase subject`.

One class decides what may be written and how it is read back, in SQL that SQLite and PostgreSQL share; what they do
not share is in `serve.sqlite_store` and `serve.postgres_store`. One thread writes; each reader opens its own
connection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from proto import records
from proto.records import TEXT_METRICS, Feedback, Interaction
from serve.errors import InternalError, PawlError
from serve.rows import Row, feedback_row, interaction_row, not_found, read_interaction, repeated

SCHEMA_VERSION = 2
PAGE_ROWS = 256
POSTGRES = ("postgresql://", "postgres://")

Record = Interaction | Feedback

_COLUMNS = "i.sequence, i.record, i.content"
_MINE = "SELECT id FROM interactions WHERE subject = ? ORDER BY sequence"
_SAID_OF_MINE = """
    SELECT f.id FROM feedback f JOIN interactions i ON i.id = f.inference_id WHERE i.subject = ? ORDER BY f.sequence"""


class StoreError(Exception):
    """The store is not ours to use, or did not do all of its work; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A feedback with the interaction it judges. `sequence` is the cursor to continue from."""

    sequence: int
    feedback: Feedback
    interaction: Interaction


@dataclass(frozen=True, slots=True)
class Logged:
    """An interaction with what was said of it. `sequence` is the cursor to continue from."""

    sequence: int
    interaction: Interaction
    feedback: tuple[Feedback, ...]


@dataclass(frozen=True, slots=True)
class Erased:
    """The ids of what was a subject's. `left` says where the database may still hold it, "" for nowhere."""

    interactions: list[str] = field(default_factory=list)
    feedback: list[str] = field(default_factory=list)
    left: str = ""


class Store(ABC):
    """`name` is how messages call the store; it holds no password."""

    name: str
    errors: tuple[type[Exception], ...]  # what the database raises, from every method

    def __init__(self, name: str) -> None:
        self.name = name
        self._db: Any = None

    # -- what is done with it -----------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the store for writing, making it if need be. Raises StoreError when it is not ours to use."""
        if self._db is None:
            self._db = self._connect()

    def close(self) -> None:
        if self._db is not None:
            self._db, db = None, self._db
            db.close()

    def check(self) -> None:
        """Raises StoreError unless there are records to read."""
        with self._reader():
            pass

    def append(self, batch: Sequence[Record]) -> list[str | PawlError]:
        """Write all in one transaction, durable on return: each one's id, or why it alone is refused.

        Feedback that repeats an idempotency key gets the first one's id. Whatever is raised, nothing was written.
        """
        with self._transaction() as db:
            ids = {record.id if isinstance(record, Interaction) else record.inference_id for record in batch}
            interactions = {row[0] for row in self._find(db, "SELECT id FROM interactions WHERE {id}", ids)}
            earlier = self._like(db, [record for record in batch if isinstance(record, Feedback)])
            feedback = {record.id for record in earlier}
            first = {record.idempotency_key: record for record in earlier if record.idempotency_key is not None}
            answers: list[str | PawlError] = []
            interaction_rows, feedback_rows = [], []
            for record in batch:
                answer: str | PawlError = record.id
                if isinstance(record, Interaction):
                    if record.id in interactions:
                        answer = InternalError(f"the interaction id {record.id} exists already")
                    else:
                        interactions.add(record.id)
                        interaction_rows.append(interaction_row(record))
                elif record.idempotency_key in first:
                    answer = repeated(first[record.idempotency_key], record)
                elif record.inference_id not in interactions:
                    answer = not_found(record.inference_id)
                elif record.id in feedback:
                    answer = InternalError(f"the feedback id {record.id} exists already")
                else:
                    feedback.add(record.id)
                    if record.idempotency_key is not None:
                        first[record.idempotency_key] = record
                    feedback_rows.append(feedback_row(record))
                answers.append(answer)
            self._insert(db, "interactions (id, created, subject, record, content)", interaction_rows)
            self._insert(db, "feedback (id, inference_id, metric_name, idempotency_key, record)", feedback_rows)
        return answers

    def get(self, id: str) -> Logged:
        """The interaction of that id, content included if it is still kept. Raises NotFound."""
        with self._reader() as db:
            found = list(self._logged(db, self._find(db, f"SELECT {_COLUMNS} FROM interactions i WHERE {{id}}", [id])))
        if not found:
            raise not_found(id)
        return found[0]

    def scan(self, since: int = 0) -> Iterator[Judged]:
        """Feedback after the cursor `since`, in the order it was stored, each with its interaction."""
        query = f"""
            SELECT f.sequence, f.record, {_COLUMNS} FROM feedback f JOIN interactions i ON i.id = f.inference_id
            WHERE f.sequence > ? ORDER BY f.sequence LIMIT ?"""
        with self._reader() as db:
            # In pages, since one long read would hold up SQLite's checkpoints and PostgreSQL's vacuum.
            while page := self._run(db, query, (since, PAGE_ROWS)).fetchall():
                for since, feedback, _, record, content in page:
                    yield Judged(since, records.decode(feedback, Feedback), read_interaction(record, content))

    def interactions(self, since: int = 0, subject: str | None = None) -> Iterator[Logged]:
        """Interactions after the cursor `since`, of all or of one subject, in the order they were stored."""
        whose = "" if subject is None else "AND i.subject = ?"
        query = f"SELECT {_COLUMNS} FROM interactions i WHERE i.sequence > ? {whose} ORDER BY i.sequence LIMIT ?"
        with self._reader() as db:
            while True:
                values = (since, PAGE_ROWS) if subject is None else (since, subject, PAGE_ROWS)
                page = self._run(db, query, values).fetchall()
                if not page:
                    return
                for entry in self._logged(db, page):
                    since = entry.sequence
                    yield entry

    def expire(self, content_before: str | None, metadata_before: str | None) -> int:
        """Delete what belongs to interactions created before these dates, and every trace of it in the files.

        Content is their text and the text said of them; with the metadata goes all of an interaction. None: keep.
        Returns how many rows changed.
        """
        changed = 0
        with self._transaction() as db:
            if metadata_before is not None:
                changed += self._run(db, "DELETE FROM interactions WHERE created < ?", (metadata_before,)).rowcount
            if content_before is not None:
                texts = ", ".join(f"'{name}'" for name in sorted(TEXT_METRICS))
                said = f"DELETE FROM feedback WHERE metric_name IN ({texts}) AND inference_id IN ({{}})"
                old = "SELECT id FROM interactions WHERE created < ?"
                changed += self._run(db, said.format(old), (content_before,)).rowcount
                held = "UPDATE interactions SET content = NULL WHERE created < ? AND content IS NOT NULL"
                changed += self._run(db, held, (content_before,)).rowcount
        if changed:
            self._purge()
        return changed

    def owned(self, subject: str) -> Erased:
        """What is a subject's, and would be erased."""
        with self._reader() as db:
            return self._owned(db, subject)

    def erase(self, subject: str) -> Erased:
        """Delete all of a subject's records, and every trace of them in the store's files. Can be repeated."""
        with self._transaction() as db:
            erased = self._owned(db, subject)
            self._run(db, "DELETE FROM interactions WHERE subject = ?", (subject,))  # and the feedback with them
        return replace(erased, left=self._purge())

    # -- what the databases do each in their way ----------------------------------------------------------------

    @abstractmethod
    def size(self) -> int:
        """Bytes that the records take, log included."""

    def disk(self) -> tuple[int, int] | None:
        """Bytes free and in all of the disk they are on, or None if that is not this machine's. Raises OSError."""
        return None

    @abstractmethod
    def is_full(self, error: Exception) -> bool:
        """True if an error of `append` means that there is no space left."""

    @abstractmethod
    def may_pass(self, error: Exception) -> bool:
        """True if an error of `open` is no reason to give up: a full disk, a database that is away."""

    @abstractmethod
    def _connect(self) -> Any:
        """A connection that writes, over the right schema. Raises StoreError."""

    @abstractmethod
    def _reader(self) -> AbstractContextManager[Any]:
        """A connection that only reads. Raises StoreError."""

    @abstractmethod
    def _begin(self, db: Any) -> None:
        """Begin a transaction that no other writer runs beside, so that the order of rows is that of commits."""

    @abstractmethod
    def _undo(self, db: Any, error: BaseException) -> bool:
        """Undo the transaction; False if the connection is of no more use."""

    @abstractmethod
    def _purge(self) -> str:
        """Remove what deleted rows left in the files; returns where something may be left."""

    @abstractmethod
    def _run(self, db: Any, query: str, values: Sequence[Any] = ()) -> Any:
        """Execute a query, whose parameters are written `?`; returns the cursor."""

    @abstractmethod
    def _among(self, column: str) -> str:
        """The condition that a column is one of the values that `_set` passes as one parameter."""

    @abstractmethod
    def _set(self, values: Iterable[str]) -> Any:
        """See `_among`."""

    @abstractmethod
    def _insert(self, db: Any, columns: str, rows: Sequence[Row]) -> None:
        """Insert rows into "table (columns)"."""

    # -- what they share ----------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        self.open()
        db = self._db
        try:
            self._begin(db)
            yield db
            db.execute("COMMIT")
        except BaseException as error:
            if not self._undo(db, error):
                self.close()
            raise

    def _find(self, db: Any, query: str, values: Iterable[str]) -> list[Any]:
        """The rows of a query that ends with a condition `{column}`, which is "is among the values"."""
        head, _, column = query.partition("{")
        return list(self._run(db, head + self._among(column.rstrip("}")), (self._set(values),)).fetchall())

    def _like(self, db: Any, given: list[Feedback]) -> list[Feedback]:
        """The stored feedback that has an id or an idempotency key of these."""
        if not given:
            return []
        query = f"SELECT record FROM feedback WHERE {self._among('id')} OR {self._among('idempotency_key')}"
        keys = [record.idempotency_key for record in given if record.idempotency_key is not None]
        rows = self._run(db, query, (self._set(record.id for record in given), self._set(keys))).fetchall()
        return [records.decode(row[0], Feedback) for row in rows]

    def _owned(self, db: Any, subject: str) -> Erased:
        found = [[row[0] for row in self._run(db, query, (subject,)).fetchall()] for query in (_MINE, _SAID_OF_MINE)]
        return Erased(found[0], found[1])

    def _logged(self, db: Any, page: list[Any]) -> Iterator[Logged]:
        query = "SELECT inference_id, record FROM feedback WHERE {inference_id}"
        kept = [(sequence, read_interaction(record, content)) for sequence, record, content in page]
        said: dict[str, list[Feedback]] = {interaction.id: [] for _, interaction in kept}
        for id, record in self._find(db, query, said):
            said[id].append(records.decode(record, Feedback))
        for sequence, interaction in kept:
            yield Logged(sequence, interaction, tuple(sorted(said[interaction.id], key=lambda f: f.created)))


def open_store(url: str) -> Store:
    """The store that a file name or a `postgresql://` URL names; nothing is opened yet."""
    if url.startswith(POSTGRES):
        from serve.postgres_store import PostgresStore  # its driver is loaded where it is used

        return PostgresStore(url)
    from serve.sqlite_store import SqliteStore

    return SqliteStore(Path(url))
