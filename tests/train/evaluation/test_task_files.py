"""Files of examples: the task by the columns, and what is wrong by its line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from train.errors import DataError
from train.evaluation.task_files import prompt_of, read

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def write(path: Path, *examples: Any) -> Path:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


@pytest.mark.parametrize(
    ("example", "task"),
    [
        ({"text": "a"}, "perplexity"),
        ({"messages": CHAT}, "perplexity"),
        ({"prompt": "a", "completion": "b"}, "perplexity"),
        ({"prompt": "a", "reference": "b"}, "generation"),
        ({"messages": CHAT[:1], "reference": ["b", "c"]}, "generation"),
        ({"prompt": "a", "label": "b", "choices": ["b", "c"]}, "classification"),
        ({"text": "a", "label": 1}, "classification"),
        ({"prompt": "a", "entry_point": "f", "check": "assert f()", "label": "x"}, "functions"),
    ],
)
def test_the_columns_tell_the_task(tmp_path: Path, example: dict[str, Any], task: str) -> None:
    assert read(write(tmp_path / "a.jsonl", example), "auto", 0).task == task


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"a\.jsonl:2 is no JSON"),
        ('["text"]', r"a\.jsonl:2 is a list, not an object"),
        ('{"txt": "a"}', r"a\.jsonl:2 has the columns txt; perplexity needs text or messages or completion"),
        ('{"text": 5}', r"a\.jsonl:2: text is '5', not a text"),
        ('{"messages": [{"role": "user"}]}', r"messages is .*not a list of messages with role and content"),
        ('{"completion": "b"}', r"a\.jsonl:2 has a completion without a prompt"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "fine"})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        read(path, "auto", 0)
    assert read(path, "auto", 1).examples == [{"text": "fine"}]


def test_columns_of_no_task_name_what_each_needs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has the columns q, a, which are of no task; functions needs prompt and entry"):
        read(write(tmp_path / "a.jsonl", {"q": 1, "a": 2}), "auto", 0)
    with pytest.raises(DataError, match="holds no example"):
        read(write(tmp_path / "b.jsonl"), "auto", 0)


def test_the_task_can_be_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a", "label": "b"})
    assert read(path, "perplexity", 0).task == "perplexity"
    with pytest.raises(DataError, match="generation needs prompt or messages and reference"):
        read(path, "generation", 0)


def test_the_digest_is_of_the_whole_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    found = read(path, "auto", 1)
    assert (len(found.examples), found.sha256) == (1, hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_prompt_can_be_put_as_a_message() -> None:
    assert prompt_of({"prompt": "a"}, chat=False) == "a"
    assert prompt_of({"prompt": "a"}, chat=True) == [{"role": "user", "content": "a"}]
    assert prompt_of({"messages": CHAT}, chat=False) == CHAT
