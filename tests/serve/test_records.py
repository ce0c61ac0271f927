"""The records log against real files, real kills and disks that really refuse to write."""

from __future__ import annotations

import asyncio
import itertools
import random
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest

from proto.records import Feedback, Interaction, utc_now
from serve.errors import InvalidRequest, NotFound, Unavailable
from serve.records import GROUP_ROWS, Records
from serve.store import SCHEMA_VERSION, StoreError

ROOT = Path(__file__).parents[2]
numbers = itertools.count()


def interaction(id: str, *, content: bool = True) -> Interaction:
    return Interaction(
        id=id,
        created=utc_now(),
        model="tiny",
        model_digest="0" * 64,
        endpoint="chat",
        messages=[{"role": "user", "content": "hello"}] if content else None,
        completion="hi" if content else None,
        prompt_tokens=3,
        completion_tokens=1,
        cached_tokens=0,
        ttft_seconds=0.01,
        duration_seconds=0.02,
        finish_reason="stop",
        request_id="r",
    )


def feedback(inference_id: str, *, key: str | None = None, value: bool | float | str = True) -> Feedback:
    return Feedback(
        id=f"feedback-{next(numbers)}",
        created=utc_now(),
        inference_id=inference_id,
        metric_name="comment" if isinstance(value, str) else "thumbs",
        value=value,
        idempotency_key=key,
    )


def during(log: Records, body: Callable[[Records], Awaitable[None]]) -> None:
    """Run `body` on a started log and close it."""

    async def run() -> None:
        log.start()
        try:
            await body(log)
        finally:
            await log.close()

    asyncio.run(run())


def test_feedback_is_read_back_with_its_interaction(tmp_path: Path) -> None:
    log = Records(tmp_path / "new" / "records.sqlite")
    sent = [interaction("chat-1"), interaction("chat-2", content=False)]
    judged = [feedback("chat-2", value=0.25), feedback("chat-1", value="ünïcode 🙂")]

    async def body(log: Records) -> None:
        for record in sent:
            log.interaction(record)
        for record in judged:
            assert await log.feedback(record) == record.id

    during(log, body)
    found = list(log.scan())
    assert [(entry.feedback, entry.interaction) for entry in found] == [(judged[0], sent[1]), (judged[1], sent[0])]
    assert list(log.scan(since=found[0].sequence)) == found[1:]
    assert log.get("chat-1") == sent[0]
    with pytest.raises(NotFound):
        log.get("chat-3")
    assert log.path.stat().st_mode & 0o077 == 0, "others can read the prompts"


def test_feedback_finds_its_interaction_in_the_queue(tmp_path: Path) -> None:
    async def body(log: Records) -> None:
        # Put behind one another without a pause, across several commits.
        ids = [f"chat-{i}" for i in range(3 * GROUP_ROWS)]
        waiting = []
        for id in ids:
            log.interaction(interaction(id))
            waiting.append(asyncio.ensure_future(log.feedback(feedback(id))))
            await asyncio.sleep(0)  # lets the task put its feedback
        assert len(set(await asyncio.gather(*waiting))) == len(ids)

    log = Records(tmp_path / "r.sqlite")
    during(log, body)
    assert sum(1 for _ in log.scan()) == 3 * GROUP_ROWS


def test_unknown_inference_is_refused_and_harms_no_neighbour(tmp_path: Path) -> None:
    async def body(log: Records) -> None:
        log.interaction(interaction("chat-1"))
        good, bad = await asyncio.gather(
            log.feedback(feedback("chat-1")), log.feedback(feedback("chat-9")), return_exceptions=True
        )
        assert isinstance(good, str)
        assert isinstance(bad, NotFound)
        assert bad.param == "inference_id"

    during(Records(tmp_path / "r.sqlite"), body)


def test_idempotency_key_returns_the_first_id(tmp_path: Path) -> None:
    first = feedback("chat-1", key="k")

    async def body(log: Records) -> None:
        log.interaction(interaction("chat-1"))
        answers = await asyncio.gather(
            *(log.feedback(f) for f in [first, *(feedback("chat-1", key="k") for _ in "abc")])
        )
        assert answers == [first.id] * 4
        with pytest.raises(InvalidRequest) as caught:
            await log.feedback(feedback("chat-1", key="k", value=False))
        assert caught.value.param == "idempotency_key"

    log = Records(tmp_path / "r.sqlite")
    during(log, body)
    assert [entry.feedback for entry in log.scan()] == [first]


def test_bad_records_are_refused_or_counted(tmp_path: Path) -> None:
    lost: list[int] = []

    async def body(log: Records) -> None:
        log.interaction(interaction("chat-1"))
        log.interaction(interaction("chat-1"))  # the same id twice
        log.interaction(interaction("no blanks allowed"))
        bad = Feedback(id="f", created=utc_now(), inference_id="two words", metric_name="thumbs", value=True)
        with pytest.raises(InvalidRequest) as caught:
            await log.feedback(bad)
        assert caught.value.param == "inference_id"
        assert await log.feedback(feedback("chat-1"))

    during(Records(tmp_path / "r.sqlite", lost.append), body)
    assert sum(lost) == 2


def test_full_queue_and_closed_log_lose_by_count(tmp_path: Path) -> None:
    lost: list[int] = []
    log = Records(tmp_path / "r.sqlite", lost.append, max_queue=2)

    async def body() -> None:
        for i in range(3):  # no writer yet
            log.interaction(interaction(f"chat-{i}"))
        assert sum(lost) == 1
        with pytest.raises(Unavailable):
            await log.feedback(feedback("chat-0"))
        log.start()
        await log.close()
        log.interaction(interaction("late"))
        assert sum(lost) == 2
        with pytest.raises(Unavailable):
            await log.feedback(feedback("chat-0"))

    asyncio.run(body())
    assert log.get("chat-0").id == "chat-0"  # close wrote what was queued
    assert log.get("chat-1").id == "chat-1"


def test_queue_is_bounded_in_bytes(tmp_path: Path) -> None:
    lost: list[int] = []
    log = Records(tmp_path / "r.sqlite", lost.append, max_queue_bytes=1000)
    for i in range(10):
        log.interaction(interaction(f"chat-{i}"))
    assert 6 <= sum(lost) < 10


class SmallDisk(Records):
    """A log whose file may have so many pages: SQLite answers SQLITE_FULL, as for a full disk."""

    def limit(self, pages: int) -> None:
        assert self._db is not None
        self._db.execute(f"PRAGMA max_page_count = {pages}")


def test_full_disk_refuses_feedback_and_recovers(tmp_path: Path) -> None:
    lost: list[int] = []

    async def body(log: Records) -> None:
        assert isinstance(log, SmallDisk)
        log.interaction(interaction("chat-1"))
        kept.append(await log.feedback(feedback("chat-1")))
        log.limit(1)  # at least what it has
        with pytest.raises(Unavailable):
            await log.feedback(feedback("chat-1", value="x" * 100_000))
        assert log.failing
        log.interaction(interaction("chat-2", content=False))
        log.limit(1 << 30)
        kept.append(await log.feedback(feedback("chat-1", value="y" * 100_000)))
        assert not log.failing

    kept: list[str] = []
    log = SmallDisk(tmp_path / "r.sqlite", lost.append)
    during(log, body)
    assert [entry.feedback.id for entry in log.scan()] == kept


FAILING_DISK = """
import asyncio, resource, sys
from pathlib import Path
from serve.errors import Unavailable
from serve.records import Records
from tests.serve.test_records import feedback, interaction

async def main():
    lost = []
    log = Records(Path(sys.argv[1]), lost.append)
    log.start()
    log.interaction(interaction("before"))
    kept = [await log.feedback(feedback("before"))]
    # The kernel now refuses every write beyond the first byte of a file, with EFBIG, which SQLite calls IOERR.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    log.interaction(interaction("during"))
    for _ in range(3):
        try:
            await log.feedback(feedback("before"))
        except Unavailable as error:
            assert error.retry_after_seconds > 0
        else:
            raise AssertionError("acknowledged without a disk")
    assert sum(lost) == 1, lost
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.interaction(interaction("after"))
    kept.append(await log.feedback(feedback("after")))
    await log.close()
    assert [entry.feedback.id for entry in log.scan()] == kept
    print("ok")

asyncio.run(main())
"""


def test_write_errors_refuse_feedback_and_recover(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FAILING_DISK, str(tmp_path / "r.sqlite")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "ok\n", done.stderr


WRITE_UNTIL_KILLED = """
import asyncio, sys
from pathlib import Path
from serve.records import Records
from tests.serve.test_records import feedback, interaction
from proto.records import new_id, utc_now
import msgspec

async def main():
    log = Records(Path(sys.argv[1]))
    first = int(sys.argv[2])
    log.start()
    log.interaction(interaction(f"chat-{first}"))

    async def send(key):
        record = msgspec.structs.replace(feedback("chat-0"), id=new_id("feedback"), idempotency_key=f"key-{key}")
        print(f"key-{key}", await log.feedback(record), flush=True)

    for start in range(first, 1 << 30, 16):
        await asyncio.gather(*(send(key) for key in range(start, start + 16)))

asyncio.run(main())
"""


def test_kill_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path, random_acks = tmp_path / "r.sqlite", random.Random(7)
    acked: dict[str, str] = {}
    for _ in range(10):
        # Each round first repeats the last keys of the round before, whose fate its client does not know.
        first = max(0, len(acked) - 40)
        command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(path), str(first)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(random_acks.randint(40, 200))]
            child.kill()
            lines += child.stdout.readlines()
        for line in lines:
            if line.endswith("\n"):  # the last may be cut
                key, id = line.split()
                assert acked.setdefault(key, id) == id, "a repeated key got a second id"
    stored = [entry.feedback for entry in Records(path).scan()]
    assert acked.items() <= {record.idempotency_key: record.id for record in stored}.items()
    assert len(stored) == len({record.idempotency_key for record in stored})
    assert len(acked) > 400


def test_newer_and_foreign_files_are_refused_untouched(tmp_path: Path) -> None:
    newer, foreign, text = tmp_path / "newer.sqlite", tmp_path / "foreign.sqlite", tmp_path / "text.sqlite"
    during(Records(newer), lambda log: asyncio.sleep(0))
    with closing(sqlite3.connect(newer)) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with closing(sqlite3.connect(foreign)) as db:
        db.execute("CREATE TABLE cats (name TEXT)")
    text.write_text("not a database, and long enough to be sure of it " * 20)
    for path, reason in [(newer, "newer Pawl"), (foreign, "something else"), (text, "cannot be opened")]:
        before = path.read_bytes()
        with pytest.raises(StoreError, match=reason):
            Records(path).start()
        assert path.read_bytes() == before
    with pytest.raises(StoreError, match="newer Pawl"):
        list(Records(newer).scan())
    with pytest.raises(StoreError, match="cannot be read"):
        list(Records(tmp_path / "missing.sqlite").scan())


def test_a_cancelled_caller_disturbs_nobody(tmp_path: Path) -> None:
    async def body(log: Records) -> None:
        log.interaction(interaction("chat-1"))
        gone = asyncio.ensure_future(log.feedback(feedback("chat-1")))
        await asyncio.sleep(0)
        gone.cancel()
        assert await log.feedback(feedback("chat-1"))

    log = Records(tmp_path / "r.sqlite")
    during(log, body)
    assert sum(1 for _ in log.scan()) == 2


FAILING_SYNC = """
import asyncio, sys
from pathlib import Path
from serve.errors import Unavailable
from serve.records import Records
from tests.serve.test_records import feedback, interaction

async def main():
    log, kept, refused = Records(Path(sys.argv[1])), [], 0
    log.start()
    log.interaction(interaction("chat-1"))
    while refused < 3 or len(kept) < 6:
        try:
            kept.append(await log.feedback(feedback("chat-1")))
        except Unavailable:
            refused += 1
    await log.close()
    assert [entry.feedback.id for entry in log.scan()] == kept, "what was refused came back"
    print("ok", refused)

asyncio.run(main())
"""


@pytest.mark.system
def test_sync_errors_refuse_feedback_and_recover(tmp_path: Path) -> None:
    # The 8th to 10th sync fail, a few commits after the start.
    fault = ["strace", "-f", "-o", str(tmp_path / "trace"), "-e", "trace=fsync,fdatasync"]
    fault += ["-e", "inject=fsync,fdatasync:error=EIO:when=8..10"]
    command = [*fault, sys.executable, "-c", FAILING_SYNC, str(tmp_path / "r.sqlite")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "ok 3\n", done.stderr
