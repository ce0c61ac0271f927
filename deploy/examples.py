"""Which of the feedback's examples are learnt from and which are judged by, and what earlier data is learnt again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.errors import DeployError

LEARN = "learn.jsonl"  # fresh examples and earlier ones
FRESH = "fresh.jsonl"  # of them, those of this cycle's feedback
JUDGE = "judge.jsonl"
TESTED = "tested.jsonl"  # what earlier cycles were judged by

Example = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Counts:
    fresh: int
    judged: int
    earlier: int


def read_lines(path: Path) -> list[str]:
    """The lines of a JSONL file, without blank ones. Raises DeployError for one that is no object."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            wrong = not isinstance(json.loads(line), dict)
        except ValueError:
            wrong = True
        if wrong:
            raise DeployError(f"{path}, example {number} is no JSON object; see docs/train.md for the shapes of data")
    return lines


def read_examples(path: Path) -> list[Example]:
    return [json.loads(line) for line in read_lines(path)]


def prompt_key(example: Example) -> str:
    """What was asked: examples with the same question must be on one side."""
    if "prompt" in example:
        asked = example["prompt"]
    elif "messages" in example:
        asked = example["messages"][:-1]
    else:  # pairs of messages that begin alike
        asked = example["chosen"][:-1] if isinstance(example["chosen"], list) else ""
    if isinstance(asked, list) and len(asked) == 1:
        asked = asked[0]["content"]  # a text and a user's message of it are one question
    return json.dumps(asked, sort_keys=True, ensure_ascii=False)


def split(lines: Iterable[str], share: float) -> tuple[list[str], list[str]]:
    """(learnt from, judged by). By a hash of the question alone, so that it is on the same side in every cycle."""
    sides: tuple[list[str], list[str]] = ([], [])
    for line in lines:
        number = int.from_bytes(hashlib.sha256(prompt_key(json.loads(line)).encode()).digest()[:8])
        sides[number < share * 2**64].append(line)
    return sides


def mix(
    examples: Path, earlier: Sequence[Path], folder: Path, *, judged_share: float, replay_share: float, salt: str
) -> Counts:
    """Write LEARN, FRESH and JUDGE into `folder`. Which of the earlier lines are taken depends on them and `salt`.

    Raises DeployError if nothing is left to learn from, or to judge by.
    """
    fresh, judged = split(read_lines(examples), judged_share)
    if not fresh or not judged:
        raise DeployError(
            f"of the feedback's examples, {len(fresh)} can be learnt from and {len(judged)} judged by; "
            "collect more, or change judged_share in the policy"
        )
    asked = {prompt_key(json.loads(line)) for line in judged}
    pool = {line for path in earlier for line in read_lines(path) if prompt_key(json.loads(line)) not in asked}
    wanted = round(len(fresh) * replay_share / (1 - replay_share))
    taken = sorted(pool, key=lambda line: hashlib.sha256(f"{salt}\0{line}".encode()).digest())[:wanted]
    for name, lines in ((LEARN, fresh + taken), (FRESH, fresh), (JUDGE, judged)):
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return Counts(len(fresh), len(judged), len(taken))
