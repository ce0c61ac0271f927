"""The log of interactions and feedback: one queue, one writer thread, acknowledged means durable.

1. Callers put records into one bounded queue and never wait for the disk.
2. The writer waits until there are 64 of them, or 5 ms, takes what there is by then, up to 512, redacts it and commits
   it together.
3. Feedback is acknowledged after the commit. The queue keeps the order, so feedback that follows its interaction
   finds it, whether or not that was written before.
4. When the store fails, feedback is refused and interactions are lost and counted; each batch tries anew.
5. Once a day the writer deletes what has become too old.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from proto import records
from proto.records import Feedback, Interaction
from serve.errors import InsufficientStorage, InternalError, InvalidRequest, PawlError, Unavailable
from serve.retention import Retention
from serve.store import Record, Store, StoreError

log = logging.getLogger(__name__)

GROUP_ROWS = 64  # enough to commit at once
MAX_ROWS = 512  # of one commit
GROUP_SECONDS = 0.005
RETRY_SECONDS = 5
MEASURE_EVERY_SECONDS = 10
EXPIRE_EVERY_SECONDS = 24 * 3600


@dataclass(slots=True)
class Counts:
    """What `serve.records_metrics` shows. Only the writer thread writes it, but for `lost` and `refused`."""

    interactions: int = 0  # committed
    feedback: int = 0  # acknowledged
    lost: int = 0  # interactions
    refused: int = 0  # feedback, because of the store
    failures: int = 0  # batches
    expired: int = 0  # rows
    store_bytes: int = 0
    last_write: float = 0.0  # Unix time
    failing: bool = False  # the last batch could not be written


@dataclass(slots=True)
class _Write:
    """One entry of the queue: a record, and for feedback the future that waits for it."""

    record: Record
    size: int  # bytes, to bound the queue's memory
    reply: asyncio.Future[str] | None = None


@dataclass(eq=False)
class Records:
    """`redact` changes each record before it is written, on the writer's thread."""

    store: Store
    redact: Callable[[Record], Record] = lambda record: record
    retention: Retention = field(default_factory=Retention)
    max_queue: int = 4096
    max_queue_bytes: int = 64 << 20

    counts: Counts = field(default_factory=Counts, init=False)
    queue_bytes: int = field(default=0, init=False)
    _queue: deque[_Write] = field(default_factory=deque, init=False)
    _closing: bool = field(default=False, init=False)
    _wake: threading.Condition = field(default_factory=threading.Condition, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _measure_at: float = field(default=0.0, init=False)
    _expire_at: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Open or create the store and start the writer. Raises StoreError when the store is not ours to use."""
        try:
            self.store.open()
        except self.store.errors as error:
            if not self.store.may_pass(error):
                raise StoreError(f"{self.store.name} cannot be opened: {error}") from error
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

    @property
    def queued(self) -> int:
        """How many records wait for the store."""
        return len(self._queue)

    def interaction(self, record: Interaction) -> None:
        """Keep an interaction; never waits and never raises."""
        try:
            kept = self._put(record)
        except Exception:  # a record that cannot be written is our fault, and no reason to stop
            log.exception("interaction %r cannot be recorded", record.id)
            kept = False
        self.counts.lost += not kept

    async def feedback(self, feedback: Feedback) -> str:
        """Keep a feedback; returns its id, or that of the first with its idempotency key, once it is on disk.

        Raises NotFound for an unknown inference id, InvalidRequest, InsufficientStorage when the disk is full, and
        Unavailable when the store fails in another way.
        """
        reply = asyncio.get_running_loop().create_future()
        try:
            kept = self._put(feedback, reply)
        except records.RecordError as error:
            raise InvalidRequest(str(error), param=error.field or None) from error
        if not kept:
            self.counts.refused += 1
            raise Unavailable("feedback cannot be stored now: too many records wait for the store; try again")
        return str(await reply)

    def _put(self, record: Record, reply: asyncio.Future[str] | None = None) -> bool:
        """False if there is no room. Raises RecordError when the record breaks its contract."""
        write = _Write(record, len(records.encode(record)), reply)
        with self._wake:
            full = len(self._queue) >= self.max_queue or self.queue_bytes + write.size > self.max_queue_bytes
            if full or self._closing:
                return False
            self._queue.append(write)
            self.queue_bytes += write.size
            if len(self._queue) in (1, GROUP_ROWS):
                self._wake.notify()
            return True

    def _take(self) -> list[_Write]:
        """The next batch; empty when there is something else to do, or the log is closing and all is written."""
        with self._wake:
            self._wake.wait_for(lambda: self._queue or self._closing, max(0, self._expire_at - time.monotonic()))
            self._wake.wait_for(lambda: len(self._queue) >= GROUP_ROWS or self._closing, GROUP_SECONDS)
            batch = [self._queue.popleft() for _ in range(min(MAX_ROWS, len(self._queue)))]
            self.queue_bytes -= sum(write.size for write in batch)
            return batch

    def _write_all(self) -> None:
        while (batch := self._take()) or not self._closing:
            if batch:
                self._write(batch)
            self._look_after()
        with suppress(*self.store.errors):
            self.store.close()

    def _write(self, batch: list[_Write]) -> None:
        """Commit a batch, count, and answer those who wait."""
        counts = self.counts
        batch = [write for write in batch if self._redacted(write)]
        results: list[str | PawlError]
        try:
            results = self.store.append([write.record for write in batch])
        except Exception as error:  # whatever it is, the writer lives on
            self._report(error)
            counts.failures += 1
            results = [self._refusal(error)] * len(batch)
            counts.refused += sum(write.reply is not None for write in batch)
        else:
            if counts.failing:
                log.warning("records are written again to %s", self.store.name)
            counts.failing = False
            counts.last_write = time.time()
        answers = []
        for write, result in zip(batch, results, strict=True):
            stored = isinstance(result, str)
            if write.reply is not None:
                counts.feedback += stored
                answers.append((write.reply, result))
            else:
                counts.interactions += stored
                counts.lost += not stored
        _answer(answers)

    def _redacted(self, write: _Write) -> bool:
        """Take personal data out of the record; what cannot be read through is not written at all."""
        try:
            write.record = self.redact(write.record)
        except Exception:
            log.exception("record %r cannot be redacted", write.record.id)
            self.counts.lost += write.reply is None
            if write.reply is not None:
                _answer([(write.reply, InternalError("the feedback cannot be redacted, and so it is not stored"))])
            return False
        return True

    def _refusal(self, error: Exception) -> PawlError:
        if self.store.is_full(error):
            problem = "feedback cannot be stored now: the disk of the records is full; free some space, then try again"
            return InsufficientStorage(problem, retry_after_seconds=RETRY_SECONDS)
        problem = "feedback cannot be stored now: the records cannot be written; try again"
        return Unavailable(problem, retry_after_seconds=RETRY_SECONDS)

    def _look_after(self) -> None:
        """Between batches, when the time has come: delete what is too old, and measure the store."""
        now = time.monotonic()
        try:
            if now >= self._expire_at:
                self._expire_at = now + EXPIRE_EVERY_SECONDS
                self.counts.expired += self.retention.apply(self.store)
            if now >= self._measure_at:
                self._measure_at = now + MEASURE_EVERY_SECONDS
                self.counts.store_bytes = self.store.size()
        except Exception as error:  # whatever it is, the writer lives on
            log.warning("records: %s", error)

    def _report(self, error: Exception) -> None:
        if not self.counts.failing:  # once, not with every batch
            log.error("records cannot be written to %s: %s; inference goes on without them", self.store.name, error)
        self.counts.failing = True


def _answer(answers: list[tuple[asyncio.Future[str], str | PawlError]]) -> None:
    """Settle futures, all of one loop, from another thread."""

    def settle() -> None:
        for reply, result in answers:
            if reply.done():  # the caller gave up; what was stored stays stored
                continue
            if isinstance(result, str):
                reply.set_result(result)
            else:
                reply.set_exception(result)

    if answers:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            answers[0][0].get_loop().call_soon_threadsafe(settle)
