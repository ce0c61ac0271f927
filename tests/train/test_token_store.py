"""A store gives back what was put in, is found again by what it was made of, and is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.tiny import make_tokenizer
from train.data import Record, SkipReport
from train.errors import DataError
from train.samples import SampleMaker, Shape
from train.token_store import TokenStore, prepare, sorted_labels

RECORDS: dict[Shape, list[dict[str, Any]]] = {
    Shape.TEXT: [{"text": f"text {'a' * number}"} for number in range(40)],
    Shape.CHAT: [{"prompt": f"ask {number}", "completion": "b" * (1 + number % 9)} for number in range(40)],
    Shape.PAIRS: [{"prompt": str(number), "chosen": "a", "rejected": "bb", "weight": number} for number in range(40)],
    Shape.THUMBS: [{"prompt": str(number), "completion": "a", "label": number % 3 == 0} for number in range(40)],
    Shape.CLASSES: [{"text": f"text {number}", "label": "zyx"[number % 3]} for number in range(40)],
}
CONTEXT = 32


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def open_store(directory: Path, shape: Shape, **options: Any) -> TokenStore:
    path = write(directory / f"{shape}.jsonl", RECORDS[shape])
    return prepare([path], shape, make_tokenizer(), CONTEXT, directory / "cache", **options)


@pytest.mark.parametrize("shape", Shape)
def test_a_store_gives_back_the_samples(tmp_path: Path, shape: Shape) -> None:
    records = [Record(columns, Path("a"), 1) for columns in RECORDS[shape]]
    samples = list(SampleMaker(make_tokenizer(), shape, CONTEXT, SkipReport()).make(records))
    sequences = [sequence for sample in samples for sequence in sample.sequences]
    store = open_store(tmp_path, shape)
    assert len(store) == len(sequences)
    for number, sequence in enumerate(sequences):
        assert store.tokens(number).tolist() == sequence.tokens.tolist()
        assert store.learnt(number).tolist() == sequence.learnt.tolist()
    assert store.lengths.tolist() == [len(sequence.tokens) for sequence in sequences]
    info = store.info
    assert info.num_tokens == store.lengths.sum()
    learnt = 0 if shape == Shape.CLASSES else sum(int(sequence.learnt[1:].sum()) for sequence in sequences)
    assert info.num_learnt == learnt
    assert info.num_records == len(RECORDS[shape])
    if shape in (Shape.TEXT, Shape.CHAT):
        assert info.num_examples == len(store.examples) == 0
    else:
        assert info.num_examples == len(samples)
        assert store.examples["weight"].tolist() == [sample.weight for sample in samples]
        targets = ["xyz".index(str(sample.target)) if shape == Shape.CLASSES else sample.target for sample in samples]
        assert store.examples["target"].tolist() == targets
    assert info.labels == (["x", "y", "z"] if shape == Shape.CLASSES else [])


def test_a_store_is_found_again_wherever_the_data_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [*RECORDS[Shape.TEXT], {"text": ""}]
    tokenizer = make_tokenizer()
    first = prepare([write(tmp_path / "a.jsonl", records)], Shape.TEXT, tokenizer, CONTEXT, tmp_path / "cache")
    assert f"data: 1 of 41 records skipped\n  empty text: 1 ({tmp_path / 'a.jsonl'}:41)" in capsys.readouterr().err
    (folder,) = (tmp_path / "cache").iterdir()
    written = (folder / "store.json").stat().st_mtime_ns
    tokenizer(["a", "bb"], truncation=True, max_length=1)  # leaves its settings in the tokenizer
    moved = write(tmp_path / "moved" / "b.jsonl", records)
    again = prepare([moved], Shape.TEXT, tokenizer, CONTEXT, tmp_path / "cache")
    assert again.info == first.info
    assert (folder / "store.json").stat().st_mtime_ns == written
    assert list((tmp_path / "cache").iterdir()) == [folder]  # nothing temporary is left


def test_all_that_decides_the_tokens_is_in_the_digest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS[Shape.CHAT])
    other = write(tmp_path / "b.jsonl", RECORDS[Shape.CHAT][1:])
    named = make_tokenizer()
    named.chat_template = "{# other #}" + str(named.chat_template)
    grown = make_tokenizer()
    grown.add_tokens(["new"])
    cases: list[tuple[list[Path], Shape, Any, int, Any]] = [
        ([path], Shape.CHAT, make_tokenizer(), CONTEXT, "skip"),
        ([path], Shape.TEXT, make_tokenizer(), CONTEXT, "skip"),
        ([other], Shape.CHAT, make_tokenizer(), CONTEXT, "skip"),
        ([path, other], Shape.CHAT, make_tokenizer(), CONTEXT, "skip"),
        ([other, path], Shape.CHAT, make_tokenizer(), CONTEXT, "skip"),
        ([path], Shape.CHAT, named, CONTEXT, "skip"),
        ([path], Shape.CHAT, grown, CONTEXT, "skip"),
        ([path], Shape.CHAT, make_tokenizer(), CONTEXT + 1, "skip"),
        ([path], Shape.CHAT, make_tokenizer(), CONTEXT, "cut"),
    ]
    digests = [
        prepare(paths, shape, tokenizer, context, tmp_path / "cache", too_long=too_long).info.digest
        for paths, shape, tokenizer, context, too_long in cases
    ]
    assert len(set(digests)) == len(cases)


def test_a_big_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    small = open_store(tmp_path / "small", Shape.TEXT)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(70_000)])
    path = write(tmp_path / "a.jsonl", [{"text": "a<69999>"}, {"text": "b"}])
    big = prepare([path], Shape.TEXT, tokenizer, CONTEXT, tmp_path / "cache")
    assert big.tokens(0)[1] == 260 + 69_999
    (bytes_small,) = (tmp_path / "small" / "cache").glob("*/tokens.bin")
    (bytes_big,) = (tmp_path / "cache").glob("*/tokens.bin")
    assert bytes_small.stat().st_size == 2 * small.info.num_tokens
    assert bytes_big.stat().st_size == 4 * big.info.num_tokens


def test_data_without_a_use_leave_nothing_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}])
    with pytest.raises(DataError, match=r"no record of .*a\.jsonl can be used for chat: .*\n  no answer: 1"):
        prepare([path], Shape.CHAT, make_tokenizer(), CONTEXT, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("name", ["store.json", "tokens.bin", "learnt.bin"])
def test_a_store_that_is_not_whole_is_refused(tmp_path: Path, name: str) -> None:
    open_store(tmp_path, Shape.CHAT)
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(DataError, match="it is made again"):
        TokenStore(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match="it is made again"):
        TokenStore(folder)


def test_known_labels_keep_their_numbers(tmp_path: Path) -> None:
    store = open_store(tmp_path, Shape.CLASSES, labels=["z", "y", "x", "w"])
    assert store.info.labels == ["z", "y", "x", "w"]
    assert store.examples["target"][:3].tolist() == [0, 1, 2]


def test_labels_are_sorted() -> None:
    assert sorted_labels([10, 9, -1]) == ["-1", "9", "10"]
    assert sorted_labels(["b", "B", "a"]) == ["B", "a", "b"]
    with pytest.raises(DataError, match="integers in some"):
        sorted_labels([1, "a"])
    with pytest.raises(DataError, match="all records have the label 'a'"):
        sorted_labels(["a"])


def test_the_sources_are_on_record(tmp_path: Path) -> None:
    (source,) = open_store(tmp_path, Shape.TEXT).info.sources
    assert (source.name, source.kind) == ("text.jsonl", "json lines")
    assert source.num_bytes == (tmp_path / "text.jsonl").stat().st_size


def test_two_at_once_make_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower process finds the store of the quicker when it comes to rename its own."""
    rename = Path.rename

    def rename_late(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        open_store(tmp_path, Shape.TEXT)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_late)
    store = open_store(tmp_path, Shape.TEXT)
    assert np.array_equal(store.tokens(0), open_store(tmp_path, Shape.TEXT).tokens(0))
    assert len(list((tmp_path / "cache").iterdir())) == 1
