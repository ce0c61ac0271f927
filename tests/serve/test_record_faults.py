"""The records where things go wrong: real kills, disks that really refuse to write, databases that go away."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import grpc
import pytest
from google.protobuf.struct_pb2 import Value

from bench.postgres import Postgres
from proto import inference_pb2 as pb
from serve.errors import InsufficientStorage, Unavailable
from serve.records import Records
from serve.store import open_store
from tests.serve.fakes import run
from tests.serve.stores import ROOT, during, feedback, interaction
from tests.serve.test_server import clients, own_server
from tests.serve.tiny import stop_server

WORKERS = 16

# -- kills ------------------------------------------------------------------------------------------------------


class LightServers:
    """One server after another, each in a process of its own."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "tests.serve.light_server", url]
        self._parent = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )

    def start(self) -> tuple[int, str]:
        """The next one's process id and address; the one before must have been killed."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write("next\n")
        pid, port = map(int, self._parent.stdout.readline().split())
        return pid, f"http://127.0.0.1:{port}"

    def __enter__(self) -> LightServers:
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self._parent.pid, signal.SIGKILL)  # and the last server
        self._parent.communicate()


async def judge_until_killed(
    pid: int, url: str, inference_id: str, pending: list[str], keys: Iterator[str], enough: int
) -> dict[str, str]:
    """Send feedback from many clients and kill the server after so many answers; returns the ids by key.

    First come the `pending` keys, whose fate is unknown; those that this kill leaves so are in it afterwards.
    """
    acked: dict[str, str] = {}
    waiting, todo = set(pending), itertools.chain(list(pending), keys)
    async with aiohttp.ClientSession(url) as http:

        async def work() -> None:
            for key in todo:
                waiting.add(key)
                body = {"inference_id": inference_id, "metric_name": "thumbs", "value": True}
                async with http.post("/v1/feedback", json=body, headers={"Idempotency-Key": key}) as reply:
                    assert reply.status == 200, await reply.text()
                    acked[key] = (await reply.json())["feedback_id"]
                waiting.discard(key)
                if len(acked) == enough:
                    os.kill(pid, signal.SIGKILL)  # amid the others' requests

        done = await asyncio.gather(*(work() for _ in range(WORKERS)), return_exceptions=True)
    assert all(isinstance(error, aiohttp.ClientError) for error in done), done
    pending[:] = sorted(waiting)
    return acked


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=[pytest.mark.system, pytest.mark.timeout(1200)])])
def test_kills_lose_nothing_acknowledged_and_repeat_nothing(url: str, kills: int) -> None:
    store = open_store(url)
    store.append([interaction("chat-1")])
    store.close()
    order, keys, pending = random.Random(7), (f"key-{n}" for n in itertools.count()), list[str]()
    acked: dict[str, str] = {}
    unknown = 0
    with LightServers(url) as servers:
        for _ in range(kills):
            pid, address = servers.start()
            enough = order.randint(1, 60)
            found = asyncio.run(judge_until_killed(pid, address, "chat-1", pending, keys, enough))
            for key, id in found.items():
                assert acked.setdefault(key, id) == id, "a repeated key got a second id"
            unknown += len(pending)
    stored = [entry.feedback for entry in store.scan()]
    by_key = {record.idempotency_key: record.id for record in stored}
    assert len(stored) == len(by_key), "stored twice"
    assert acked.items() <= by_key.items(), "acknowledged and lost"
    assert by_key.keys() - acked.keys() <= set(pending)
    assert unknown > kills, "kills that interrupt nothing prove nothing"
    assert len(acked) > 10 * kills


# -- disks ------------------------------------------------------------------------------------------------------


def test_full_disk_refuses_feedback_and_recovers(tmp_path: Path) -> None:
    """A file that may have so many pages: SQLite answers SQLITE_FULL, as for a full disk."""
    kept: list[str] = []
    log = Records(open_store(str(tmp_path / "r.sqlite")))

    async def body(log: Records) -> None:
        log.interaction(interaction("chat-1"))
        kept.append(await log.feedback(feedback("chat-1")))
        log.store._db.execute("PRAGMA max_page_count = 1")  # at least what it has
        with pytest.raises(InsufficientStorage, match="free some space"):
            await log.feedback(feedback("chat-1", value="x" * 100_000))
        assert log.counts.failing
        log.interaction(interaction("chat-2", content=False))
        log.store._db.execute(f"PRAGMA max_page_count = {1 << 30}")
        kept.append(await log.feedback(feedback("chat-1", value="y" * 100_000)))
        assert not log.counts.failing

    during(log, body)
    assert [entry.feedback.id for entry in log.store.scan()] == kept
    assert (log.counts.refused, log.counts.failures) == (1, 1)


FAILING_DISK = """
import asyncio, resource, sys
from serve.errors import Unavailable
from serve.records import Records
from serve.store import open_store
from tests.serve.stores import feedback, interaction

async def main():
    log = Records(open_store(sys.argv[1]))
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
    assert log.counts.lost == 1, log.counts
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.interaction(interaction("after"))
    kept.append(await log.feedback(feedback("after")))
    await log.close()
    assert [entry.feedback.id for entry in log.store.scan()] == kept
    print("ok")

asyncio.run(main())
"""


def test_write_errors_refuse_feedback_and_recover(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FAILING_DISK, str(tmp_path / "r.sqlite")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "ok\n", done.stderr


FAILING_SYNC = """
import asyncio, sys
from serve.errors import Unavailable
from serve.records import Records
from serve.store import open_store
from tests.serve.stores import feedback, interaction

async def main():
    log, kept, refused = Records(open_store(sys.argv[1])), [], 0
    log.start()
    log.interaction(interaction("chat-1"))
    while refused < 3 or len(kept) < 6:
        try:
            kept.append(await log.feedback(feedback("chat-1")))
        except Unavailable:
            refused += 1
    await log.close()
    assert [entry.feedback.id for entry in log.store.scan()] == kept, "what was refused came back"
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


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of so many KiB. It takes root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "pawl-test", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up(folder: Path) -> Path:
    """Leave no space at all; returns the file that takes it."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as stream:
        while True:
            try:
                stream.write(bytes(4096))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return filler


@pytest.mark.system
def test_a_server_with_a_full_disk_answers_refuses_feedback_and_recovers(artifact: Path, tmp_path: Path) -> None:
    question = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    kept = []

    with small_disk(tmp_path / "disk", 1024) as disk, own_server(artifact, disk) as server:

        async def main() -> None:
            async with clients(server) as api:

                async def judge(id: str, value: str = "fine") -> tuple[int, dict[str, str]]:
                    body = {"inference_id": id, "metric_name": "comment", "value": value}
                    async with api.http.post("/v1/feedback", json=body) as reply:
                        answer = await reply.json()
                        assert reply.status == 200 or "Retry-After" in reply.headers
                        return reply.status, answer.get("error") or answer

                async with api.http.post("/v1/chat/completions", json=question) as reply:
                    id = (await reply.json())["id"]
                status, answer = await judge(id)
                assert status == 200
                kept.append(answer["feedback_id"])

                filler = fill_up(disk)
                for number in range(200):  # SQLite's log may have some room left
                    status, answer = await judge(id, str(number) + "x" * 30_000)
                    if status != 200:
                        break
                    kept.append(answer["feedback_id"])
                assert (status, answer["code"]) == (507, "insufficient_storage")
                message = pb.FeedbackRequest(
                    inference_id=id, metric_name="comment", value=Value(string_value="x" * 30_000)
                )
                with pytest.raises(grpc.aio.AioRpcError) as refusal:
                    await api.grpc.SendFeedback(message)
                assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "retry-after" in dict(refusal.value.trailing_metadata())
                for _ in range(5):
                    assert await api.whole(question) is not None
                metrics = await api.metrics()
                assert metrics["pawl_records_failing"] == 1
                assert metrics["pawl_feedback_refused_total"] >= 2

                filler.unlink()
                status, answer = await judge(id)
                assert status == 200
                kept.append(answer["feedback_id"])
                assert (await api.metrics())["pawl_records_failing"] == 0

        run(main, 60)
        assert stop_server(server) == 0
        stored = [entry.feedback.id for entry in open_store(str(disk / "records.sqlite")).scan()]
    assert stored == kept


# -- PostgreSQL -------------------------------------------------------------------------------------------------


@pytest.mark.system
def test_a_database_that_goes_away_refuses_feedback_and_comes_back(postgres: Postgres) -> None:
    log = Records(open_store(postgres.create("away")))
    kept: list[str] = []

    async def body(log: Records) -> None:
        log.interaction(interaction("chat-1"))
        kept.append(await log.feedback(feedback("chat-1")))
        postgres.stop("immediate")
        try:
            for _ in range(2):
                with pytest.raises(Unavailable) as refusal:
                    await log.feedback(feedback("chat-1"))
                assert refusal.value.status == 503
        finally:
            postgres.start()
        kept.append(await log.feedback(feedback("chat-1")))

    during(log, body)
    assert [entry.feedback.id for entry in log.store.scan()] == kept


@pytest.mark.system
def test_a_database_with_a_full_disk_refuses_feedback_and_recovers(postgres: Postgres, tmp_path: Path) -> None:
    with small_disk(postgres.folder / "small", 16 << 10) as disk:
        place = disk / "tables"
        place.mkdir()
        os.chown(place, (owner := postgres.folder.stat()).st_uid, owner.st_gid)
        log = Records(open_store(postgres.create("small", tablespace=place)))
        kept: list[str] = []

        async def body(log: Records) -> None:
            log.interaction(interaction("chat-1"))
            kept.append(await log.feedback(feedback("chat-1")))
            filler = fill_up(disk)
            noise = random.Random(3).randbytes(500_000).hex()  # PostgreSQL would compress a pattern
            with pytest.raises(InsufficientStorage):
                await log.feedback(feedback("chat-1", value=noise))
            filler.unlink()
            kept.append(await log.feedback(feedback("chat-1")))

        during(log, body)
        assert [entry.feedback.id for entry in log.store.scan()] == kept
        postgres.drop("small", tablespace=True)
