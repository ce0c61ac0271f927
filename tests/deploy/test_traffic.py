"""What is read from the records: who counts, when, and as what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from bench.postgres import Postgres, running
from deploy.traffic import NAMES, Streams, approval, read_traffic, seek
from proto.records import Feedback, Interaction
from serve.store import Store, open_store
from tests.deploy.talk import Clock, answer, said

OLD, NEW, OTHER = "0" * 64, "1" * 64, "2" * 64
SETTLE = 60.0
_NUMBERS = count(1)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.system)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite":
        url = str(tmp_path / "records.sqlite")
    else:
        url = request.getfixturevalue("postgres").create(f"traffic_{next(_NUMBERS)}")
    store = open_store(url)
    store.open()
    yield store
    store.close()


def read(store: Store, began: str, now: str, **changes: Any) -> Streams:
    given: dict[str, Any] = {"settle_seconds": SETTLE, "anonymous": False}
    return read_traffic(store, (OLD, NEW), began, now, **(given | changes)).streams


def test_the_figures_of_an_answer(store: Store) -> None:
    clock = Clock()
    began = clock()
    one = answer(NEW, clock.later(1), ttft_seconds=0.2, duration_seconds=1.2, completion_tokens=11)
    other = answer(OTHER, clock.later(1))
    store.append([one, other, said(one, clock.later(1), True)])
    streams = read(store, began, clock.later(SETTLE))
    assert {name: [tuple(v) for v in values] for name, values in streams.items()} == {
        "errors": [(NEW, 0)],
        "aborts": [(NEW, 0)],
        "ttft": [(NEW, pytest.approx(math.log(0.2)))],
        "token_time": [(NEW, pytest.approx(math.log(0.1)))],
        "approval": [(NEW, 1)],
    }


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"finish_reason": "error"}, {"errors", "aborts"}),
        ({"finish_reason": "abort"}, {"errors", "aborts"}),
        ({"endpoint": "embedding"}, {"errors", "aborts"}),
        ({"completion_tokens": 1}, set(NAMES) - {"token_time"}),
        ({"ttft_seconds": None}, set(NAMES) - {"token_time", "ttft"}),
    ],
)
def test_only_whole_answers_have_times_and_approval(fields: dict[str, Any], names: set[str], store: Store) -> None:
    clock = Clock()
    store.append([answer(OLD, clock.later(1), **fields)])
    streams = read(store, Clock()(), clock.later(SETTLE))
    assert {name for name, values in streams.items() if values} == names
    assert streams["errors"][0].value == (fields.get("finish_reason") == "error")
    assert streams["aborts"][0].value == (fields.get("finish_reason") == "abort")


def test_a_person_counts_once_and_an_error_each_time(store: Store) -> None:
    clock = Clock()
    chats = [
        answer(NEW, clock.later(1), subject="ann", finish_reason=why) for why in ("stop", "abort", "error", "stop")
    ]
    moved = answer(OLD, clock.later(1), subject="ann", finish_reason="abort")  # by the other version: not hers
    late = answer(NEW, clock.later(SETTLE), subject="ann", finish_reason="abort")
    store.append([*chats, moved, late, said(chats[0], clock(), True), said(chats[3], chats[3].created, False)])
    streams = read(store, Clock()(), clock.later(SETTLE))
    assert len(streams["errors"]) == 6
    assert [tuple(v) for v in streams["aborts"]] == [(NEW, 0.25)]
    assert [tuple(v) for v in streams["approval"]] == [(NEW, -0.5)]  # what she said of the first one came too late


def test_without_a_subject_a_request_counts_once(store: Store) -> None:
    clock = Clock()
    asked = [("a", "stop"), ("a", "abort"), ("b", "stop")]
    store.append([answer(OLD, clock.later(1), subject=None, request_id=id, finish_reason=why) for id, why in asked])
    assert [v.value for v in read(store, Clock()(), clock.later(SETTLE))["aborts"]] == [0.5, 0]


def test_an_error_counts_at_once_and_the_rest_when_it_is_settled(store: Store) -> None:
    clock = Clock()
    began = clock()
    store.append([answer(OLD, clock.later(1))])
    seen = read(store, began, clock.later(SETTLE - 0.001))
    assert {name: len(values) for name, values in seen.items()} == {**dict.fromkeys(NAMES, 0), "errors": 1}
    assert {len(values) for values in read(store, began, clock.later(0.001)).values()} == {1}


def test_no_look_changes_what_an_earlier_one_has_seen(store: Store) -> None:
    clock = Clock()
    began = clock()
    chats = []
    earlier: Streams = {name: [] for name in NAMES}
    for turn in range(60):
        chat = answer((OLD, NEW)[turn % 3 == 0], clock.later(7), subject=f"person-{turn * 7 % 20}")
        chats.append(chat)
        judged = chats[turn // 2]
        store.append([chat, said(judged, clock(), turn % 2 == 0)])
        seen = read(store, began, clock())
        assert all(seen[name][: len(earlier[name])] == earlier[name] for name in NAMES)
        earlier = seen
    assert len(earlier["aborts"]) > 10


def test_feedback_that_nobody_vouches_for_does_not_count(store: Store) -> None:
    clock = Clock()
    one = answer(NEW, clock.later(1))
    store.append([one, said(one, clock(), False, source=None)])
    now = clock.later(SETTLE)
    assert read(store, Clock()(), now)["approval"][0].value == 0
    assert read(store, Clock()(), now, anonymous=True)["approval"][0].value == -1


@pytest.mark.parametrize(
    ("judgements", "wanted"),
    [
        ([], 0),
        ([(True, "thumbs")], 1),
        ([(True, "thumbs"), (False, "thumbs")], -1),
        ([(False, "solved"), (True, "solved")], 1),
        ([("Better so.", "demonstration"), (True, "thumbs")], -1),
        ([(0.3, "score"), ("Hm.", "comment")], 0),
    ],
)
def test_approval(judgements: list[tuple[bool | float | str, str]], wanted: int) -> None:
    one = answer(NEW, Clock()())
    assert approval([said(one, one.created, value, metric) for value, metric in judgements]) == wanted


def test_the_beginning_is_found_among_many(store: Store) -> None:
    clock = Clock()
    rows: list[Interaction | Feedback] = [answer(OLD, clock.later(60)) for _ in range(1000)]
    store.append(rows)
    for number in (0, 1, 2, 500, 777, 999):
        cursor = seek(store, rows[number].created)
        assert cursor in (number - 1, number) or number == 0 == cursor
        traffic = read_traffic(store, (OLD, NEW), rows[number].created, clock(), settle_seconds=0.0, anonymous=False)
        assert len(traffic.streams["errors"]) == 1000 - number
        assert traffic.until == 1000
    assert seek(store, clock.later(1)) in (999, 1000)


def test_nothing_is_found_in_no_records(store: Store) -> None:
    assert seek(store, Clock()()) == 0
    assert not any(read(store, Clock()(), Clock()()).values())
