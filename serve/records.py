"""The log of interactions and feedback: one SQLite file, one writer thread, acknowledged means durable.

1. Callers put records into one bounded queue and never wait for the disk.
2. The writer takes up to 64 of them, or what came within 5 ms, and commits them together (WAL, synchronous=FULL).
3. Feedback is acknowledged after the commit. The queue keeps the order, so feedback that follows its interaction
   finds it, whether or not that was written before.
4. When the disk fails, feedback is refused and interactions are lost and counted; each batch tries anew.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from proto import records
from proto.records import Feedback, Interaction
from serve import store
from serve.errors import InternalError, InvalidRequest, PawlError, Unavailable

log = logging.getLogger(__name__)

GROUP_ROWS = 64
GROUP_SECONDS = 0.005
RETRY_SECONDS = 5


@dataclass(slots=True)
class _Write:
    """One entry of the queue: an interaction's row, or a feedback and the future that waits for it."""

    row: store.Row
    feedback: Feedback | None = None
    reply: asyncio.Future[str] | None = None
    result: str | PawlError = ""
    size: int = field(init=False)  # bytes, near enough to bound the queue's memory

    def __post_init__(self) -> None:
        self.size = sum(len(value or "") for value in self.row)

    def answer(self) -> None:
        if self.reply is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.reply.get_loop().call_soon_threadsafe(_settle, self.reply, self.result)


@dataclass(eq=False)
class Records:
    """`lost` is called with a number of interactions, from any thread, whenever some cannot be kept."""

    path: Path
    lost: Callable[[int], None] = lambda count: None
    max_queue: int = 4096
    max_queue_bytes: int = 64 << 20

    failing: bool = field(default=False, init=False)  # the last batch could not be written
    _queue: deque[_Write] = field(default_factory=deque, init=False)
    _queue_bytes: int = field(default=0, init=False)
    _closing: bool = field(default=False, init=False)
    _wake: threading.Condition = field(default_factory=threading.Condition, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _db: sqlite3.Connection | None = field(default=None, init=False)

    def start(self) -> None:
        """Open or create the file and start the writer. Raises StoreError when the file is not ours to use."""
        try:
            self._db = self._open()
        except (sqlite3.Error, OSError) as error:
            if not _disk_failed(error):
                raise store.StoreError(f"{self.path} cannot be opened: {error}") from error
            self._report(error)  # serve all the same; the writer tries again
        self._thread = threading.Thread(target=self._write_all, name="records", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Write what is queued, then stop. Later records are refused."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def interaction(self, record: Interaction) -> None:
        """Keep an interaction; never waits and never raises."""
        try:
            row = store.interaction_row(record)
        except Exception:  # a record that cannot be written is our fault, and no reason to stop
            log.exception("interaction %r cannot be recorded", record.id)
            self.lost(1)
            return
        if not self._put(_Write(row)):
            self.lost(1)

    async def feedback(self, feedback: Feedback) -> str:
        """Keep a feedback; returns its id, or that of the first with its idempotency key, once it is on disk.

        Raises NotFound for an unknown inference id, InvalidRequest, and Unavailable when the disk fails.
        """
        try:
            row = store.feedback_row(feedback)
        except records.RecordError as error:
            raise InvalidRequest(str(error), param=error.field or None) from error
        reply = asyncio.get_running_loop().create_future()
        if not self._put(_Write(row, feedback, reply)):
            raise Unavailable("feedback cannot be stored now: too many records wait for the disk; try again")
        return str(await reply)

    def get(self, id: str) -> Interaction:
        """The interaction of that id, content included if it was kept. Raises NotFound."""
        return store.read_interaction(self.path, id)

    def scan(self, since: int = 0) -> Iterator[store.Judged]:
        """Feedback after the cursor `since`, in the order it was stored, each with its interaction."""
        return store.scan_feedback(self.path, since)

    def _open(self) -> sqlite3.Connection:
        return store.open_writer(self.path)

    def _put(self, write: _Write) -> bool:
        with self._wake:
            full = len(self._queue) >= self.max_queue or self._queue_bytes + write.size > self.max_queue_bytes
            if full or self._closing:
                return False
            self._queue.append(write)
            self._queue_bytes += write.size
            if len(self._queue) in (1, GROUP_ROWS):
                self._wake.notify()
            return True

    def _take(self) -> list[_Write]:
        """The next batch; empty when all is written and the log is closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._queue or self._closing)
            self._wake.wait_for(lambda: len(self._queue) >= GROUP_ROWS or self._closing, GROUP_SECONDS)
            batch = [self._queue.popleft() for _ in range(min(GROUP_ROWS, len(self._queue)))]
            self._queue_bytes -= sum(write.size for write in batch)
            return batch

    def _write_all(self) -> None:
        while batch := self._take():
            try:
                lost = self._commit(batch)
            except Exception as error:  # whatever it is, the writer lives on
                self._drop(error)
                problem = "feedback cannot be stored now: the records cannot be written; try again"
                for write in batch:
                    write.result = Unavailable(problem, retry_after_seconds=RETRY_SECONDS)
                lost = sum(write.feedback is None for write in batch)
            else:
                if self.failing:
                    log.warning("records are written again to %s", self.path)
                self.failing = False
            if lost:
                self.lost(lost)
            for write in batch:
                write.answer()
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()

    def _commit(self, batch: list[_Write]) -> int:
        """Write a batch in one transaction and set the results; returns how many interactions were refused."""
        if self._db is None:
            self._db = self._open()
        db, lost = self._db, 0
        db.execute("BEGIN IMMEDIATE")
        for write in batch:
            try:
                if write.feedback is None:
                    store.insert_interaction(db, write.row)
                else:
                    write.result = store.insert_feedback(db, write.feedback, write.row)
            except sqlite3.IntegrityError as error:  # an id given twice undoes this row only
                log.error("record %r refused: %s", write.row[0], error)
                lost += write.feedback is None
                write.result = InternalError(f"the feedback id {write.row[0]} exists already")
        db.execute("COMMIT")
        return lost

    def _drop(self, error: Exception) -> None:
        """Undo the transaction. The next batch goes to the same connection, or to a new one if this is beyond use.

        A new one would find a commit in the WAL whose sync failed, and so bring back what was refused.
        """
        self._report(error)
        if self._db is None:
            return
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if _disk_failed(error):
                return
        except sqlite3.Error as second:
            log.warning("records: rollback failed: %s", second)
        with suppress(sqlite3.Error):
            self._db.close()
        self._db = None

    def _report(self, error: Exception) -> None:
        if not self.failing:  # once, not with every batch
            log.error("records cannot be written to %s: %s; inference goes on without them", self.path, error)
        self.failing = True


def _disk_failed(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def _settle(reply: asyncio.Future[str], result: str | PawlError) -> None:
    if reply.done():  # the caller gave up; what was stored stays stored
        return
    if isinstance(result, str):
        reply.set_result(result)
    else:
        reply.set_exception(result)
