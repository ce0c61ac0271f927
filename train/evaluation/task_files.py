"""The examples that a target is judged by: JSONL files, one example a line. A file's columns tell its task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import DataError
from train.evaluation.targets import Prompt

Example = dict[str, Any]

# In order: the first whose columns are all there. One of the columns in a group suffices.
COLUMNS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "functions": (("prompt",), ("entry_point",), ("check",)),
    "classification": (("prompt", "messages", "text"), ("label",)),
    "generation": (("prompt", "messages"), ("reference",)),
    "perplexity": (("text", "messages", "completion"),),
}


@dataclass(frozen=True, slots=True)
class TaskFile:
    path: Path
    sha256: str  # of the whole file
    task: str
    examples: list[Example]


def read(path: Path, task: str, limit: int) -> TaskFile:
    """`task`: one of COLUMNS, or "auto"; `limit`: how many examples, from the first, 0 for all.

    Raises DataError that names the line and what is wrong with it.
    """
    data = path.read_bytes()
    examples: list[Example] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if limit and len(examples) == limit:
            break
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is no JSON: {error}; one example a line is expected") from error
        if not isinstance(example, dict):
            raise DataError(f"{path}:{number} is a {type(example).__name__}, not an object; see the formats of eval")
        task = _find(example, f"{path}:{number}") if task == "auto" else task
        _check(example, task, f"{path}:{number}")
        examples.append(example)
    if not examples:
        raise DataError(f"{path} holds no example; give a JSONL file with one a line")
    return TaskFile(path, hashlib.sha256(data).hexdigest(), task, examples)


def prompt_of(example: Example, *, chat: bool) -> Prompt:
    """What is to be continued: the conversation, or the prompt as it stands or as a user's message."""
    if "messages" in example:
        messages: Prompt = example["messages"]
        return messages
    prompt = str(example["prompt"])
    return [{"role": "user", "content": prompt}] if chat else prompt


def _find(example: Example, where: str) -> str:
    for task, columns in COLUMNS.items():
        if all(any(name in example for name in group) for group in columns):
            return task
    raise DataError(f"{where} has the columns {', '.join(example)}, which are of no task; {_wanted(*COLUMNS)}")


def _check(example: Example, task: str, where: str) -> None:
    for group in COLUMNS[task]:
        if not any(name in example for name in group):
            raise DataError(f"{where} has the columns {', '.join(example)}; {_wanted(task)}")
    if "completion" in example and "prompt" not in example:
        raise DataError(f"{where} has a completion without a prompt; add it, or call it text")
    for name, (fits, wanted) in SHAPES.items():
        if name in example and not fits(example[name]):
            raise DataError(f"{where}: {name} is {str(example[name])[:60]!r}, not {wanted}")


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


SHAPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("text", "prompt", "completion", "entry_point", "check"), (_is_text, "a text")),
    "messages": (_is_conversation, "a list of messages with role and content"),
    "reference": (lambda value: _is_text(value) or _is_texts(value), "a text or a list of texts"),
    "choices": (_is_texts, "a list of texts"),
    "label": (lambda value: isinstance(value, str | int), "a text or a number"),
}


def _wanted(*tasks: str) -> str:
    columns = (f"{task} needs {' and '.join(' or '.join(group) for group in COLUMNS[task])}" for task in tasks)
    return "; ".join(columns)
