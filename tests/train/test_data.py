"""Every kind of source gives the same records; what is broken is counted, or named in an error."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from train.data import SkipReport, find_sources, read
from train.errors import DataError

RECORDS = [{"text": f"täxt {number}", "label": number} for number in range(2500)]


def write_lines(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=700)
    return path


def write_saved(path: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(str(path), num_shards=2)
    return path


def write_split(path: Path) -> Path:
    import datasets

    other = datasets.Dataset.from_list([{"text": "held out"}])
    datasets.DatasetDict({"test": other, "train": datasets.Dataset.from_list(RECORDS)}).save_to_disk(str(path))
    return path


SOURCES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "lines": ("a.jsonl", write_lines),
    "upper case": ("A.JSONL", write_lines),
    "gzip": ("a.jsonl.gz", write_lines),
    "parquet": ("a.parquet", write_parquet),
    "saved": ("saved", write_saved),
    "dict": ("dict", write_split),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_gives_the_records_and_their_places(tmp_path: Path, source: str) -> None:
    name, write = SOURCES[source]
    path = write(tmp_path / name)
    seen: list[int] = []
    found = list(read([path], progress=seen.append))
    assert [record.columns for record in found] == RECORDS
    assert [record.row for record in found] == list(range(1, len(RECORDS) + 1))
    assert sum(seen) == sum(each.num_bytes for each in find_sources(path))
    assert len(seen) > 1
    if path.is_file():
        assert found[4].where == f"{path}:5"


def test_a_split_is_named_by_its_path(tmp_path: Path) -> None:
    (record,) = read([write_split(tmp_path / "dict") / "test"])
    assert record.columns == {"text": "held out"}


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("two", encoding="utf-8-sig")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "c.py").write_text("three")
    (tmp_path / "empty.py").touch()
    (tmp_path / "picture.png").write_bytes(b"not ours")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    report = SkipReport()
    assert [record.columns["text"] for record in read([tmp_path], report)] == ["one", "two", "three"]
    assert report.counts == {"empty file": 1}
    assert report.places == {"empty file": [f"{tmp_path / 'empty.py'}:1"]}
    assert report.num_records == 4


def test_blank_lines_and_a_byte_order_mark_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \r\n{"text": "b"}')
    report = SkipReport()
    assert [(record.row, record.columns["text"]) for record in read([path], report)] == [(1, "a"), (4, "b")]
    assert not report.counts


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "broken UTF-8"),
        (b'{"text": "a"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "not a JSON object"),
        (b'{"text": "\\uD83d"}', "broken Unicode"),
    ],
)
def test_a_broken_line_is_counted(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00"}\n' + line + b'\n{"text": "b"}\n')
    report = SkipReport()
    assert [record.columns["text"] for record in read([path], report)] == ["😀", "b"]
    assert report.places == {reason: [f"{path}:2"]}
    assert str(report) == f"1 of 3 records skipped\n  {reason}: 1 ({path}:2)"


def test_a_broken_row_of_a_table_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), path)
    report = SkipReport()
    assert [(record.row, record.columns["text"]) for record in read([path], report)] == [(1, "a"), (3, "c")]
    assert report.places == {"broken UTF-8": [f"{path}:2"]}


def test_too_many_broken_lines_are_an_error_that_names_the_first(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", RECORDS[:10])
    with path.open("a") as file:
        file.write("no\nnor this\n")
    with pytest.raises(DataError, match=r"2 of 12 records .* the first at .*a\.jsonl:11 \(not JSON\).*0\.100%"):
        list(read([path]))


def test_many_bad_records_stop_the_reading_early() -> None:
    report = SkipReport()
    for number in range(100):
        report.num_records += 1
        report.bad("not JSON", f"a:{number}")
    assert str(report).endswith("not JSON: 100 (a:0, a:1, a:2, ...)")
    with pytest.raises(DataError, match="101 of 100 records"):
        report.bad("not JSON", "a:100")
    report.num_bad, report.num_records = 1000, 1_000_000
    report.finish()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "there is no .*gone"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("a.csv", b"text\na", r"unknown extension; known are \.jsonl,"),
        ("a.jsonl", b"\n\n", "holds no records"),
        ("a.jsonl", b"not json\n", "holds no records: 1 of 1 records skipped\n  not JSON: 1"),
        ("a.txt", b"\xff", "holds no records: 1 of 1 records skipped\n  broken UTF-8"),
        ("a.parquet", b"not a table", "no sound Parquet"),
        ("a.jsonl.gz", gzip.compress(os.urandom(1000))[:-20], "no whole gzip"),
        ("b.jsonl.gz", b"not zipped", "no whole gzip"),
        ("folder/x.csv", b"text", "nothing to read"),
        ("folder/x.jsonl", b"", "holds no records: 1 of 1 records skipped\n  empty file"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read([tmp_path / "folder" if name.startswith("folder") else path]))


def test_empty_folders_and_tables_and_missing_splits_are_errors(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="nothing to read"):
        list(read([tmp_path / "none"]))
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(DataError, match="holds no records"):
        list(read([path]))
    (tmp_path / "none" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(DataError, match=r"no split train but test; give .*none/test"):
        list(read([tmp_path / "none"]))


def test_every_path_has_to_give_records(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"b\.jsonl holds no records"):
        list(read([write_lines(tmp_path / "a.jsonl"), tmp_path / "b.jsonl"]))
