"""A window: what was asked and answered in some time, read from a snapshot of the records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import py3langid
import pyarrow.parquet as pq

INTERACTIONS, FEEDBACK = "interactions.parquet", "feedback.parquet"  # as `python -m deploy snapshot` names them
COLUMNS = ["id", "created", "messages", "prompt", "completion", "prompt_tokens", "completion_tokens", "mean_logprob"]
COLUMNS += ["finish_reason"]
LEAST_LETTERS = 40  # of a text, for its language to be told

# How answers begin that do not answer; English alone.
REFUSAL = re.compile(
    r"\W*(?:(?:i['’]?m|i am) (?:sorry|afraid|unable|not able)|sorry,|i (?:can['’]?t|cannot|won['’]?t|am unable)"
    r"|as an (?:ai|language model)|unfortunately, i)",
    re.IGNORECASE,
)


class WindowError(Exception):
    """What cannot be read, and the cure."""


@dataclass(frozen=True, slots=True)
class Window:
    """One value for each interaction, whose text may be gone: None."""

    prompt_tokens: list[int]
    completion_tokens: list[int]
    mean_logprobs: list[float]  # of the answers that were watched
    languages: list[str] = field(repr=False)  # of the prompts that have one
    refusals: list[bool]  # of the answers whose text is kept
    empty: list[bool]  # of the same
    truncated: list[bool]
    broken_off: list[bool]
    judged: list[bool]
    thumbs: list[bool]  # each one given

    def __len__(self) -> int:
        return len(self.prompt_tokens)


def read_window(folder: Path, since: str = "", until: str = "") -> Window:
    """Interactions of a snapshot, created from `since` to before `until` (ISO 8601; "": without bound).

    Raises WindowError.
    """
    first, last = _moment(since, ""), _moment(until, "~")
    try:
        rows = pq.read_table(folder / INTERACTIONS, columns=COLUMNS).to_pylist()
        said = pq.read_table(folder / FEEDBACK, columns=["inference_id", "value_boolean"]).to_pylist()
    except (OSError, ValueError) as error:
        raise WindowError(
            f"{folder} is no snapshot: {error}; make one with `python -m deploy snapshot --unjudged`"
        ) from error
    rows = [row for row in rows if first <= row["created"] < last]
    ids = {row["id"] for row in rows}
    said = [row for row in said if row["inference_id"] in ids]
    judged = {row["inference_id"] for row in said}
    answers = [row["completion"] for row in rows if row["completion"] is not None]
    return Window(
        prompt_tokens=[row["prompt_tokens"] for row in rows],
        completion_tokens=[row["completion_tokens"] for row in rows],
        mean_logprobs=[row["mean_logprob"] for row in rows if row["mean_logprob"] is not None],
        languages=languages([text for row in rows if (text := last_question(row))]),
        refusals=[REFUSAL.match(answer) is not None for answer in answers],
        empty=[not answer.strip() for answer in answers],
        truncated=[row["finish_reason"] == "length" for row in rows],
        broken_off=[row["finish_reason"] in ("abort", "error") for row in rows],
        judged=[row["id"] in judged for row in rows],
        thumbs=[
            row["value_boolean"] for row in said if row["inference_id"] in ids and row["value_boolean"] is not None
        ],
    )


def last_question(row: dict[str, Any]) -> str:
    """The prompt, or the chat's last message of the user; "" if it is not kept."""
    if row["prompt"] is not None:
        return str(row["prompt"])
    for message in reversed(msgspec.json.decode(row["messages"] or "[]")):
        if message["role"] == "user":
            content = message["content"]
            return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
    return ""


def languages(texts: Sequence[str]) -> list[str]:
    """ISO 639-1 codes (langid: Lui and Baldwin 2012) of the texts that are long enough to tell."""
    return [py3langid.classify(text)[0] for text in texts if sum(map(str.isalpha, text)) >= LEAST_LETTERS]


def _moment(given: str, default: str) -> str:
    """As the records spell it, so that text order is time order."""
    if not given:
        return default
    try:
        moment = datetime.fromisoformat(given)
    except ValueError as error:
        raise WindowError(f"{given!r} is not a date: {error}; give it as 2026-11-21 or 2026-11-21T12:00") from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
