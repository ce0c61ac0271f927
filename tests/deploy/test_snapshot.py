"""Snapshots say what the records say, and an erasure finds them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest

from deploy.errors import DeployError
from deploy.snapshot import FEEDBACK, INTERACTIONS, PAGE_ROWS, Snapshot, judgements, run, snapshot
from proto.lineage import LINEAGE, read
from proto.records import Interaction
from serve import derived
from serve.store import Store, open_store
from tests.serve.stores import feedback, interaction
from train.errors import TrainError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path / "store" / "records.sqlite"))
    whole = interaction(
        "chat-2", subject="alice", params={"stop": ["END"], "seed": 1}, created="2026-01-02T03:04:05.678Z"
    )
    store.append([interaction("chat-1"), whole, interaction("chat-3", content=False), interaction("chat-4")])
    values: list[bool | float | str] = [True, False, 0.5, "zweifelhaft ✓"]
    said = [feedback(f"chat-{1 + i % 3}", value=v, tags={"n": str(i)}, key=f"k{i}") for i, v in enumerate(values)]
    store.append([msgspec.structs.replace(said[0], source="desk"), *said[1:]])
    return store


def options(store: Store, output: Path, since: int = 0, unjudged: bool = False) -> Snapshot:
    return Snapshot(output=output, records=store.name, since=since, unjudged=unjudged)


def test_a_snapshot_is_the_records(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "snapshots" / "1"
    assert run(options(store, out)) == 0
    assert "4 feedback and 3 interactions, since 0 until 4" in capsys.readouterr().out
    assert list(judgements(out)) == list(store.scan())
    lineage = read(out)
    assert set(lineage.interactions) == {"chat-1", "chat-2", "chat-3"}
    assert lineage.feedback == [entry.feedback.id for entry in store.scan()]
    assert lineage.oldest == "2026-01-02T03:04:05.678Z"
    assert {path.name for path in out.iterdir()} == {INTERACTIONS, FEEDBACK, LINEAGE}
    assert out.stat().st_mode & 0o077 == 0
    with pytest.raises(TrainError, match="exists"):
        snapshot(options(store, out))


def test_the_next_snapshot_begins_where_the_last_ended(store: Store, tmp_path: Path) -> None:
    first = snapshot(options(store, tmp_path / "1"))
    late = feedback("chat-4", value=1.5)
    store.append([late])
    second = snapshot(options(store, tmp_path / "2", since=first.until))
    assert [entry.feedback for entry in judgements(tmp_path / "2")] == [late]
    assert (second.since, second.interactions) == (first.until, ["chat-4"])
    empty = snapshot(options(store, tmp_path / "3", since=second.until))
    assert list(judgements(tmp_path / "3")) == []
    assert (empty.since, empty.until, empty.oldest) == (second.until, second.until, None)


def test_the_unjudged_come_too_if_asked_for(store: Store, tmp_path: Path) -> None:
    lineage = snapshot(options(store, tmp_path / "1", unjudged=True))
    assert set(lineage.interactions) == {f"chat-{n}" for n in (1, 2, 3, 4)}
    assert pq.read_table(tmp_path / "1" / INTERACTIONS).num_rows == 4


def test_pages_are_joined(store: Store, tmp_path: Path) -> None:
    count = PAGE_ROWS + 2
    store.append([feedback("chat-1", value=float(number)) for number in range(count)])
    snapshot(options(store, tmp_path / "1", since=4))
    assert [entry.feedback.value for entry in judgements(tmp_path / "1")] == list(range(count))


def test_the_same_records_give_the_same_bytes(store: Store, tmp_path: Path) -> None:
    for name in "12":
        snapshot(options(store, tmp_path / name))
    for file in (INTERACTIONS, FEEDBACK):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_every_field_of_a_record_has_a_column(store: Store, tmp_path: Path) -> None:
    snapshot(options(store, tmp_path / "1"))
    columns = pq.read_schema(tmp_path / "1" / INTERACTIONS).names
    assert {*columns, "version"} == set(Interaction.__struct_fields__)


def test_an_erasure_empties_it(store: Store, tmp_path: Path) -> None:
    snapshot(options(store, tmp_path / "snapshots" / "1"))
    done = derived.erase(store, "alice", tmp_path)
    assert done.emptied == [tmp_path / "snapshots" / "1"]
    assert not (tmp_path / "snapshots" / "1" / INTERACTIONS).exists()
    snapshot(options(store, tmp_path / "snapshots" / "2"))
    assert {entry.interaction.id for entry in judgements(tmp_path / "snapshots" / "2")} == {"chat-1", "chat-3"}


def test_a_store_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="cannot be read"):
        snapshot(Snapshot(output=tmp_path / "out", records=str(tmp_path / "none.sqlite"), since=0, unjudged=False))
    assert list(tmp_path.iterdir()) == []
