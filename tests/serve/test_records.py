"""The records log, the same tests for SQLite and, in `make test-system`, for PostgreSQL."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from proto.records import Feedback, Interaction, to_created, utc_now
from serve.errors import InternalError, InvalidRequest, NotFound, Unavailable
from serve.records import GROUP_ROWS, Records
from serve.redactor import Redactor
from serve.retention import Retention
from serve.store import PAGE_ROWS, POSTGRES, SCHEMA_VERSION, StoreError, open_store
from tests.serve.stores import during, feedback, interaction


def ago(days: float) -> str:
    return to_created(datetime.now(UTC) - timedelta(days=days))


def test_feedback_is_read_back_with_its_interaction(url: str) -> None:
    log = Records(open_store(url))
    sent = [
        interaction("chat-1", params={"stop": ["END"], "seed": 3}, subject="alice"),
        interaction("chat-2", content=False),
    ]
    judged = [feedback("chat-2", value=0.25), feedback("chat-1", value="ünïcode 🙂 \0 and a NUL", tags={"a": "b"})]

    async def body(log: Records) -> None:
        for record in sent:
            log.interaction(record)
        for record in judged:
            assert await log.feedback(record) == record.id

    during(log, body)
    store = open_store(url)
    found = list(store.scan())
    assert [(entry.feedback, entry.interaction) for entry in found] == [(judged[0], sent[1]), (judged[1], sent[0])]
    assert list(store.scan(since=found[0].sequence)) == found[1:]
    logged = list(store.interactions())
    assert [(entry.interaction, entry.feedback) for entry in logged] == [
        (sent[0], (judged[1],)),
        (sent[1], (judged[0],)),
    ]
    assert list(store.interactions(since=logged[0].sequence)) == logged[1:]
    assert list(store.interactions(subject="alice")) == logged[:1]
    assert store.get("chat-1") == logged[0]
    with pytest.raises(NotFound):
        store.get("chat-3")
    assert store.size() > 1000
    assert (log.counts.interactions, log.counts.feedback, log.counts.lost) == (2, 2, 0)
    assert log.counts.last_write > 0


def test_others_cannot_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite"
    modes = []

    async def body(log: Records) -> None:
        log.interaction(interaction("chat-1"))
        await log.feedback(feedback("chat-1"))
        modes.extend(file.stat().st_mode & 0o077 for file in tmp_path.iterdir())

    during(Records(open_store(str(path))), body)
    assert modes == [0, 0, 0]  # the file, its log and the log's index


def test_pages_are_joined(url: str) -> None:
    store = open_store(url)
    count = 2 * PAGE_ROWS + 1
    store.append([interaction(f"chat-{i}") for i in range(count)])
    store.append([feedback(f"chat-{i}", value=float(i)) for i in range(count)])
    store.close()
    assert [entry.feedback.value for entry in store.scan()] == list(range(count))
    assert [entry.feedback[0].value for entry in store.interactions()] == list(range(count))


def test_feedback_finds_its_interaction_in_the_queue(url: str) -> None:
    async def body(log: Records) -> None:
        # Put behind one another without a pause, across several commits.
        ids = [f"chat-{i}" for i in range(3 * GROUP_ROWS)]
        waiting = []
        for id in ids:
            log.interaction(interaction(id))
            waiting.append(asyncio.ensure_future(log.feedback(feedback(id))))
            await asyncio.sleep(0)  # lets the task put its feedback
        assert len(set(await asyncio.gather(*waiting))) == len(ids)

    log = Records(open_store(url))
    during(log, body)
    assert sum(1 for _ in log.store.scan()) == 3 * GROUP_ROWS


def test_unknown_inference_is_refused_and_harms_no_neighbour(url: str) -> None:
    async def body(log: Records) -> None:
        log.interaction(interaction("chat-1"))
        good, bad = await asyncio.gather(
            log.feedback(feedback("chat-1")), log.feedback(feedback("chat-9")), return_exceptions=True
        )
        assert isinstance(good, str)
        assert isinstance(bad, NotFound)
        assert bad.param == "inference_id"

    during(Records(open_store(url)), body)


def test_idempotency_key_returns_the_first_id(url: str) -> None:
    first = feedback("chat-1", key="k")

    async def body(log: Records) -> None:
        log.interaction(interaction("chat-1"))
        again = [feedback("chat-1", key="k") for _ in "abc"]
        assert await asyncio.gather(*(log.feedback(f) for f in [first, *again])) == [first.id] * 4
        assert await log.feedback(feedback("chat-1", key="k")) == first.id  # in a later batch too
        with pytest.raises(InvalidRequest) as caught:
            await log.feedback(feedback("chat-1", key="k", value=False))
        assert caught.value.param == "idempotency_key"

    log = Records(open_store(url))
    during(log, body)
    assert [entry.feedback for entry in log.store.scan()] == [first]


def test_bad_records_are_refused_or_counted(url: str) -> None:
    log = Records(open_store(url))

    async def body(log: Records) -> None:
        log.interaction(interaction("chat-1"))
        log.interaction(interaction("chat-1"))  # the same id twice
        log.interaction(interaction("no blanks allowed"))
        bad = Feedback(id="f", created=utc_now(), inference_id="two words", metric_name="thumbs", value=True)
        with pytest.raises(InvalidRequest) as caught:
            await log.feedback(bad)
        assert caught.value.param == "inference_id"
        good = feedback("chat-1")
        assert await log.feedback(good) == good.id
        with pytest.raises(InternalError):
            await log.feedback(good)

    during(log, body)
    assert log.counts.lost == 2
    assert len(list(log.store.interactions())) == 1


def test_full_queue_and_closed_log_lose_by_count(url: str) -> None:
    log = Records(open_store(url), max_queue=2)

    async def body() -> None:
        for i in range(3):  # no writer yet
            log.interaction(interaction(f"chat-{i}"))
        assert (log.counts.lost, log.queued) == (1, 2)
        with pytest.raises(Unavailable):
            await log.feedback(feedback("chat-0"))
        log.start()
        await log.close()
        log.interaction(interaction("late"))
        assert (log.counts.lost, log.queued, log.queue_bytes) == (2, 0, 0)
        with pytest.raises(Unavailable):
            await log.feedback(feedback("chat-0"))

    asyncio.run(body())
    assert log.counts.refused == 2
    assert [entry.interaction.id for entry in log.store.interactions()] == ["chat-0", "chat-1"]  # written by close


def test_queue_is_bounded_in_bytes(tmp_path: Path) -> None:
    log = Records(open_store(str(tmp_path / "r.sqlite")), max_queue_bytes=1000)
    for i in range(10):
        log.interaction(interaction(f"chat-{i}"))
    assert 6 <= log.counts.lost < 10
    assert 0 < log.queue_bytes <= 1000


def test_a_cancelled_caller_disturbs_nobody(url: str) -> None:
    async def body(log: Records) -> None:
        log.interaction(interaction("chat-1"))
        gone = asyncio.ensure_future(log.feedback(feedback("chat-1")))
        await asyncio.sleep(0)
        gone.cancel()
        assert await log.feedback(feedback("chat-1"))

    log = Records(open_store(url))
    during(log, body)
    assert sum(1 for _ in log.store.scan()) == 2


# -- what is not ours -------------------------------------------------------------------------------------------


def execute(url: str, query: str) -> None:
    """Behind the store's back."""
    if url.startswith(POSTGRES):
        with psycopg.connect(url, autocommit=True) as postgres:
            postgres.execute(query.encode())
        return
    Path(url).parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(url)) as db:
        db.execute(query)


def test_a_store_of_another_pawl_is_refused(url: str) -> None:
    during(Records(open_store(url)), lambda log: asyncio.sleep(0))
    for version in (SCHEMA_VERSION - 1, SCHEMA_VERSION + 1):
        postgres = url.startswith(POSTGRES)
        execute(url, f"UPDATE pawl_schema SET version = {version}" if postgres else f"PRAGMA user_version = {version}")
        with pytest.raises(StoreError, match=f"another Pawl .schema {version}"):
            Records(open_store(url)).start()
        with pytest.raises(StoreError, match="another Pawl"):
            list(open_store(url).scan())


def test_a_database_of_something_else_is_refused(url: str) -> None:
    execute(url, "CREATE TABLE feedback (name TEXT)")
    with pytest.raises(StoreError, match="something else"):
        Records(open_store(url)).start()


def test_what_is_not_there_cannot_be_read(url: str) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        list(open_store(url).scan())
    with pytest.raises(StoreError, match="cannot be read"):
        list(open_store(url + "_not_there").interactions())
    with pytest.raises(StoreError, match="cannot be read"):
        open_store(url).owned("alice")


def test_a_file_that_is_no_database_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "text.sqlite"
    path.write_text("not a database, and long enough to be sure of it " * 20)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="cannot be opened"):
        Records(open_store(str(path))).start()
    assert path.read_bytes() == before


def test_a_database_that_is_away_stops_no_server(tmp_path: Path) -> None:
    log = Records(open_store(f"postgresql://somebody@/records?host={tmp_path}"))

    async def body(log: Records) -> None:
        log.interaction(interaction("chat-1"))
        with pytest.raises(Unavailable):
            await log.feedback(feedback("chat-1"))

    during(log, body)
    assert (log.counts.lost, log.counts.refused, log.counts.failing) == (1, 1, True)


def test_a_bad_url_is_refused_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no PostgreSQL URL"):
        open_store("postgresql://me:secret@host/db?nonsense=1")
    assert "secret" not in open_store("postgresql://me:secret@host/db").name


# -- redaction and retention ------------------------------------------------------------------------------------


def test_personal_data_never_reaches_the_store(url: str) -> None:
    email, card = "alice@example.com", "4111 1111 1111 1111"
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"I am {email}", "name": email}],
        "completion": f"Your card is {card}",
        "params": {"stop": [email], "metadata": {"who": email, "long": "x" * 250 + " " + email}, "seed": 1},
        "subject": email,
    }
    said = feedback("chat-1", value=f"call {email}", tags={"by": email})

    async def body(log: Records) -> None:
        log.interaction(interaction("chat-1", **asked))
        await log.feedback(said)

    log = Records(open_store(url), Redactor("email,card"))
    during(log, body)
    (entry,) = log.store.interactions()
    kept = entry.interaction
    assert kept.messages == [{"role": "user", "content": "I am <EMAIL>", "name": "<EMAIL>"}]
    assert kept.completion == "Your card is <CARD>"
    assert kept.params["stop"] == ["<EMAIL>"]
    assert kept.params["metadata"]["who"] == "<EMAIL>"
    assert len(kept.params["metadata"]["long"]) <= 256
    assert kept.subject == email  # or it could not be erased
    assert (entry.feedback[0].value, entry.feedback[0].tags) == ("call <EMAIL>", {"by": "<EMAIL>"})


def test_only_the_chosen_kinds_are_redacted() -> None:
    text = "alice@example.com, +1 212 555 0123"
    prompt = interaction("c", content=False, endpoint="completion", prompt=text)
    for kinds, expected in {
        "none": text,
        "email": "<EMAIL>, +1 212 555 0123",
        "phone,email": "<EMAIL>, <PHONE>",
    }.items():
        changed = Redactor(kinds)(prompt)
        assert isinstance(changed, Interaction)
        assert changed.prompt == expected


def test_a_record_that_cannot_be_redacted_is_not_written(url: str) -> None:
    def redact(record: Any) -> Any:
        if record.id == "chat-2" or record.value == "bad":
            raise RecursionError("too deep")
        return record

    log = Records(open_store(url), redact)

    async def body(log: Records) -> None:
        log.store.append([interaction("chat-1")])
        log.interaction(interaction("chat-2"))
        bad, good = await asyncio.gather(
            log.feedback(feedback("chat-1", value="bad")),
            log.feedback(feedback("chat-1", value="good")),
            return_exceptions=True,
        )
        assert isinstance(bad, InternalError)
        assert isinstance(good, str)

    during(log, body)
    assert log.counts.lost == 1
    assert [entry.feedback.value for entry in log.store.scan()] == ["good"]


def test_text_expires_before_the_rest(url: str) -> None:
    store = open_store(url)
    ages = {"new": 1, "old": 10, "ancient": 100}
    store.append([interaction(id, created=ago(days), params={"stop": ["END"]}) for id, days in ages.items()])
    store.append([record for id in ages for record in (feedback(id), feedback(id, value="a comment"))])
    assert Retention(0, 0).apply(store) == 0
    assert Retention(content_days=5, metadata_days=50).apply(store) == 3  # ancient; old's text; what was said of that
    kept = {entry.interaction.id: entry for entry in store.interactions()}
    assert kept.keys() == {"new", "old"}
    assert kept["new"].interaction.completion == "hi"
    assert kept["new"].interaction.params == {"stop": ["END"]}
    assert [f.value for f in kept["new"].feedback] == [True, "a comment"]
    old = kept["old"].interaction
    assert (old.messages, old.completion, old.params, old.prompt_tokens) == (None, None, {}, 3)
    assert [f.value for f in kept["old"].feedback] == [True]
    assert Retention(content_days=5, metadata_days=50).apply(store) == 0
    store.close()


def test_the_log_expires_what_is_old_when_it_starts(url: str) -> None:
    store = open_store(url)
    store.append([interaction("old", created=ago(10)), interaction("new")])
    store.close()
    log = Records(open_store(url), retention=Retention(metadata_days=5))

    async def body(log: Records) -> None:
        log.interaction(interaction("newer"))
        await log.feedback(feedback("newer"))

    during(log, body)
    assert log.counts.expired == 1
    assert [entry.interaction.id for entry in log.store.interactions()] == ["new", "newer"]


def test_erasing_leaves_the_others(url: str) -> None:
    store = open_store(url)
    store.append(
        [interaction("a-1", subject="alice"), interaction("b-1", subject="bob"), interaction("a-2", subject="alice")]
    )
    said = [feedback("a-1"), feedback("b-1"), feedback("a-2", value="comment")]
    store.append(said)
    owned = store.owned("alice")
    assert (owned.interactions, owned.feedback) == (["a-1", "a-2"], [said[0].id, said[2].id])
    erased = store.erase("alice")
    assert (erased.interactions, erased.feedback) == (owned.interactions, owned.feedback)
    assert [(entry.interaction.id, entry.feedback) for entry in store.interactions()] == [("b-1", (said[1],))]
    last = list(store.scan())[-1].sequence
    store.append([feedback("b-1")])
    assert [entry.sequence > last for entry in store.scan(since=last)] == [True]  # no number is given twice
    assert store.erase("alice").interactions == []
    store.close()
