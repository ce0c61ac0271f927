"""From feedback in a store, through a snapshot, to examples that train reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from deploy.dataset import CHAT, FILES, PAIRS, THUMBS, make_dataset, tags_of
from deploy.errors import DeployError
from deploy.quarantine import Limits
from deploy.snapshot import Snapshot, snapshot
from proto.lineage import read
from serve.store import Judged, open_store
from tests.deploy.judged import interaction, judge
from tests.train.tiny import make_tokenizer
from train.data import SkipReport
from train.data import read as read_records
from train.samples import SampleMaker, Shape


def keep(path: Path, entries: list[Judged]) -> Path:
    """A snapshot of a store that holds them."""
    store = open_store(str(path / "records.sqlite"))
    store.open()
    chats = {entry.interaction.id: entry.interaction for entry in entries}
    store.append(list(chats.values()))
    store.append([entry.feedback for entry in entries])
    store.close()
    snapshot(Snapshot(output=path / "snapshot", records=str(path / "records.sqlite")))
    return path / "snapshot"


def make(
    path: Path, entries: list[Judged], limits: Limits | None = None
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    folder = path / "dataset"
    folder.mkdir()
    report = make_dataset(keep(path, entries), folder, Limits())
    lines = {name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in FILES}
    return lines, report


def test_corrections_become_chats_and_pairs(tmp_path: Path) -> None:
    chat, text = interaction(), interaction(endpoint="completion", messages=None, prompt="One and one is")
    examples, _ = make(tmp_path, [first := judge("Two.", of=chat), second := judge(" two.", of=text)])
    assert examples[CHAT] == [
        {
            "messages": [*(chat.messages or []), {"role": "assistant", "content": "Two."}],
            "feedback": first.feedback.id,
        },
        {"prompt": "One and one is", "completion": " two.", "feedback": second.feedback.id},
    ]
    assert examples[PAIRS][0] == {
        "prompt": chat.messages,
        "chosen": "Two.",
        "rejected": chat.completion,
        "feedback": first.feedback.id,
    }
    assert examples[THUMBS] == []


def test_thumbs_and_scores_become_labelled_answers(tmp_path: Path) -> None:
    values: list[bool | float] = [True, False, 1.0, 2.0, 2.0, 9.0, 3.0]
    entries = [judge(value) for value in values]
    remark = judge("Too long, and WRONG.", "comment", entries[1].interaction)
    examples, report = make(tmp_path, [*entries, remark])
    found = {line["feedback"]: (line["label"], line["weight"]) for line in examples[THUMBS]}
    expected = [(True, 1.0), (False, 1.0), (False, 0.8), (False, 0.2), (False, 0.2), (True, 0.8), (True, 0.4)]
    assert [found[entry.feedback.id] for entry in entries] == expected
    assert [line.get("tags") for line in examples[THUMBS]][:2] == [None, ["long", "wrong"]]
    assert report["tags"] == {"long": 1, "wrong": 1}
    assert "comment" not in json.dumps(examples)  # its words are nowhere
    assert "Too long" not in json.dumps(examples)


def test_the_report_and_the_lineage_account_for_all(tmp_path: Path) -> None:
    entries = [judge("Two."), judge("", source="b"), judge(True, source=None)]
    _, report = make(tmp_path, entries)
    assert (report["judgements"], report["kept"]) == (3, 1)
    assert {reason: tally["count"] for reason, tally in report["dropped"].items()} == {
        "no API key vouches for it": 1,
        "the correction is empty": 1,
    }
    assert report["sources"] == {"a": {"kept": 1}, "anonymous": {"dropped": 1}, "b": {"dropped": 1}}
    lineage = read(tmp_path / "dataset")
    assert lineage.interactions == [entries[0].interaction.id]
    assert lineage.feedback == [entries[0].feedback.id]
    assert lineage.inputs == {"snapshot": read(tmp_path / "snapshot").digest}
    assert lineage.oldest == entries[0].interaction.created


def test_train_reads_what_is_made(tmp_path: Path) -> None:
    make(tmp_path, [judge("Two."), judge(True), judge(1.0), judge(2.0)])
    tokenizer: PreTrainedTokenizerFast = make_tokenizer()
    for name, shape, count in ((CHAT, Shape.CHAT, 1), (PAIRS, Shape.PAIRS, 1), (THUMBS, Shape.THUMBS, 3)):
        skipped = SkipReport()
        maker = SampleMaker(tokenizer, shape, 256, skipped)
        assert len(list(maker.make(read_records((tmp_path / "dataset" / name,), skipped)))) == count


def test_what_comments_say() -> None:
    chat = interaction()
    entries = [judge(text, "comment", chat) for text in ("This is goodness", "Thanks, perfect", "he REFUSED to say")]
    assert tags_of(entries) == {chat.id: ["good", "refused"]}


def test_a_folder_that_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"is no snapshot: .*make one with"):
        make_dataset(tmp_path, tmp_path, Limits())
