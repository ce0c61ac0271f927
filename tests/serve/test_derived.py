"""Erasure, looked for byte by byte in every file of the store, its log, the snapshots and the datasets."""

from __future__ import annotations

import random
import shutil
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

import pytest

from bench.postgres import Postgres
from proto.lineage import LINEAGE, FolderLineage, LineageError, read, write
from proto.records import utc_now
from serve import derived
from serve.retention import Retention
from serve.store import POSTGRES, Store, StoreError, open_store
from tests.serve.stores import feedback, interaction
from tests.serve.test_records import ago

OTHERS = f"ordinary-{uuid.uuid4().hex}"  # in what the others said


@pytest.fixture
def subject() -> str:
    """One's id and, here, one's favourite word. One PostgreSQL server holds the databases of several tests."""
    return f"subject-{uuid.uuid4().hex}"


def fill(store: Store, subject: str, count: int = 400) -> None:
    """Many people's records, in an order and of sizes that make the tree of pages be balanced again and again."""
    order = random.Random(3)
    for start in range(0, count, 50):
        batch = []
        for number in range(start, start + 50):
            mine = number % 7 == 0
            text = " ".join([subject if mine else OTHERS] * order.choice([1, 40, 700]))
            batch.append(
                interaction(
                    f"chat-{number}",
                    subject=subject if mine else f"other-{number % 5}",
                    created=ago(order.choice([1, 20])),
                    messages=[{"role": "user", "content": text}],
                    params={"stop": [text[:60]], "metadata": {"who": text[:60]}},
                )
            )
        store.append(batch)
        store.append(
            [
                feedback(record.id, value=f"I said {record.completion} {str(record.messages)[40:400]}")
                for record in batch
                if order.random() < 0.6
            ]
        )


def traces(root: Path, *words: str) -> list[str]:
    """The files under `root` whose bytes hold one of the words."""
    return sorted(
        f"{path.relative_to(root)}: {word}"
        for path in root.rglob("*")
        if path.is_file()
        for word in words
        if word.encode() in path.read_bytes()
    )


@pytest.fixture
def files(url: str, request: pytest.FixtureRequest) -> Path:
    """The folder with all of the store's files."""
    if url.startswith(POSTGRES):
        server: Postgres = request.getfixturevalue("postgres")
        return server.folder
    return Path(url).parent


def make_folders(root: Path, store: Store, subject: str) -> None:
    """A snapshot of all, datasets of the subject's and of others' records, and versions trained on each."""
    entries = list(store.interactions())
    for name, whose in {"mine": subject, "theirs": "other-1"}.items():
        some = [entry for entry in entries if entry.interaction.subject == whose]
        dataset = root / "datasets" / name
        (dataset / "deep").mkdir(parents=True)
        (dataset / "deep" / "sft.jsonl").write_text("\n".join(str(entry.interaction) for entry in some))
        lineage = FolderLineage(
            kind="dataset",
            created=utc_now(),
            command=name,
            interactions=[entry.interaction.id for entry in some],
            feedback=[said.id for entry in some for said in entry.feedback],
            oldest=min(entry.interaction.created for entry in some),
        )
        write(dataset, lineage)
        version = root / "versions" / name
        version.mkdir(parents=True)
        (version / "model.onnx").write_bytes(b"weights")
        write(version, FolderLineage(kind="version", created=utc_now(), command="", inputs={"data": lineage.digest}))


def test_an_erasure_leaves_no_trace(url: str, files: Path, tmp_path: Path, subject: str) -> None:
    store, root = open_store(url), tmp_path / "derived"
    fill(store, subject)
    make_folders(root, store, subject)
    others = sum(entry.interaction.subject != subject for entry in store.interactions())
    assert traces(files, subject), "the search finds what is there"
    assert {line.split(":")[0] for line in traces(root, subject)} == {"datasets/mine/deep/sft.jsonl"}

    done = derived.erase(store, subject, root)
    assert len(done.rows.interactions) == 58
    assert done.emptied == [root / "datasets/mine"]
    assert done.versions == [root / "versions/mine"]
    assert traces(files, subject) == []  # while the store is open, and its log lies beside it
    assert traces(root, subject) == []
    store.close()
    assert traces(files, subject) == []
    assert sum(1 for _ in store.interactions()) == others
    assert (root / "datasets/theirs/deep/sft.jsonl").exists()

    again = derived.erase(store, subject, root)
    assert (again.rows.interactions, again.emptied) == ([], [])
    store.close()


def test_erasing_one_after_another_leaves_no_trace_of_any(tmp_path: Path) -> None:
    """Pages that are balanced keep stale copies in their gaps, which overwriting deleted rows does not reach."""
    store, order = open_store(str(tmp_path / "records.sqlite")), random.Random(3)
    people = [f"subject-{number:04d}-secret" for number in range(40)]
    for _ in range(12):
        batch = []
        for _ in range(60):
            whose = order.choice(people)
            text = f"{whose} " * order.choice([1, 3, 20, 200])
            batch.append(interaction(f"chat-{order.random()}", subject=whose, completion=text))
        store.append(batch)
        said = [
            (f"{record.subject} {'z' * order.choice([1, 500])}", f"{record.subject}-{record.id}") for record in batch
        ]
        store.append([feedback(record.id, value=v, key=key) for record, (v, key) in zip(batch, said, strict=True)])
    for whose in people:
        assert traces(tmp_path, whose)
        store.erase(whose)
        assert traces(tmp_path, whose) == []
    store.close()


def test_what_expired_leaves_no_trace(url: str, files: Path, tmp_path: Path, subject: str) -> None:
    store, root = open_store(url), tmp_path / "derived"
    fill(store, subject)
    old = [entry for entry in store.interactions() if entry.interaction.created < ago(10)]
    ids = [entry.interaction.id.encode() for entry in old]
    make_folders(root, store, subject)
    Retention(content_days=10, derived=root).apply(store)
    assert traces(root, subject, OTHERS) == []  # each dataset held something old
    kept = list(store.interactions())
    assert len(kept) == 400
    assert all((entry.interaction.completion is None) == (entry.interaction.id.encode() in ids) for entry in kept)

    Retention(content_days=10, metadata_days=10).apply(store)
    assert {entry.interaction.created > ago(10) for entry in store.interactions()} == {True}
    mine = {entry.interaction.id for entry in store.interactions() if entry.interaction.subject == subject}
    assert mine
    Retention(content_days=1, metadata_days=0).apply(store)  # all of it is a day old
    store.close()
    # Labels are metadata, and stay; what was said and judged is gone.
    assert all(subject in str(entry.interaction.params) for entry in store.interactions(subject=subject))
    assert traces(files, f"{subject} {subject} {subject}") == []


def test_a_reader_that_keeps_the_log_is_named(tmp_path: Path, subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.sqlite_store.BUSY_SECONDS", 0)
    path = tmp_path / "records.sqlite"
    store = open_store(str(path))
    fill(store, subject, 50)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM interactions").fetchone()
        with pytest.raises(StoreError, match="a reader has kept it"):
            store.erase(subject)
    assert store.erase(subject).interactions == []  # rows went the first time, the rest goes now
    assert traces(tmp_path, subject) == []
    store.close()


# -- lineage ----------------------------------------------------------------------------------------------------


def folder(root: Path, name: str, *, kind: str = "dataset", ids: tuple[str, ...] = (), **inputs: str) -> str:
    """Make a folder; returns its digest."""
    (root / name).mkdir(parents=True)
    lineage = FolderLineage(kind=kind, created=utc_now(), command=name, interactions=list(ids), inputs=inputs)  # type: ignore[arg-type]
    write(root / name, lineage)
    assert read(root / name) == lineage
    return lineage.digest


def test_the_ancestry_is_followed_to_the_end(tmp_path: Path) -> None:
    snapshot = folder(tmp_path, "a", kind="snapshot", ids=("chat-1",))
    curated = folder(tmp_path, "b", snapshot=snapshot)
    version = folder(tmp_path, "c", kind="version", data=curated)
    folder(tmp_path, "d", kind="version", parent=version)  # finetuned from it
    folder(tmp_path, "e", kind="version", data="0" * 64)
    folder(tmp_path, "f", ids=("chat-2",))
    found = derived.made_from(derived.find(tmp_path), {"chat-1"})
    assert [item.path.name for item in found] == ["a", "b", "c", "d"]
    assert derived.made_from(derived.find(tmp_path), set()) == []


def test_an_emptied_folder_still_leads_to_its_versions(tmp_path: Path) -> None:
    snapshot = folder(tmp_path, "a", kind="snapshot", ids=("chat-1", "chat-2"))
    folder(tmp_path, "b", kind="version", data=snapshot)
    store = open_store(str(tmp_path / "records.sqlite"))
    store.append([interaction("chat-1", subject="alice"), interaction("chat-2", subject="bob")])
    assert derived.erase(store, "alice", tmp_path).emptied == [tmp_path / "a"]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {LINEAGE, derived.EMPTIED}
    done = derived.erase(store, "bob", tmp_path)
    assert (done.emptied, done.versions) == ([], [tmp_path / "b"])
    store.close()


def test_an_erasure_that_was_cut_off_is_finished_by_the_next(
    tmp_path: Path, subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, store = tmp_path / "derived", open_store(str(tmp_path / "store" / "records.sqlite"))
    fill(store, subject, 50)
    make_folders(root, store, subject)

    def fail(path: Path) -> None:
        raise OSError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(OSError, match="cut off"):
            derived.erase(store, subject, root)
    assert traces(root, subject)
    done = derived.erase(store, subject, root)
    assert done.emptied == [root / "datasets/mine"]
    assert done.versions == [root / "versions/mine"]
    assert traces(tmp_path, subject) == []
    store.close()


@pytest.mark.parametrize(
    ("text", "problem"),
    [("[1]", "lineage.json"), ('{"version": 2}', "version 2"), ('{"version": 1, "kind": "picture"}', "kind")],
)
def test_a_lineage_that_is_not_understood_stops_the_erasure(tmp_path: Path, text: str, problem: str) -> None:
    store = open_store(str(tmp_path / "records.sqlite"))
    store.append([interaction("chat-1", subject="alice")])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / LINEAGE).write_text(text)
    with pytest.raises(LineageError, match=problem):
        derived.erase(store, "alice", tmp_path)
    assert store.owned("alice").interactions == ["chat-1"]
    store.close()
