"""A data set of feedback: corrections, thumbs and scores as examples that `python -m train run` learns from.

| feedback | becomes |
|---|---|
| correction (`demonstration`) | a chat that ends in it (SFT), and a pair: it is better than the answer (DPO) |
| thumb, any other boolean | the answer with its label (KTO) |
| score, any number | the same: up in the upper half of its metric's scores, weighted by its distance from the middle |
| `comment` | tags of the examples from the same interaction; the words are not learnt |

What may not be learnt from stays out, with the reason, see `deploy.quarantine`. `lineage.json` names what stayed in.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.errors import DeployError
from deploy.quarantine import Limits, Sorted, correction, is_score, quarantine
from deploy.snapshot import judgements
from proto.lineage import FolderLineage, read, write
from proto.records import COMMENT, Interaction, utc_now
from serve.store import Judged
from train.decontamination import read_index
from train.flags import option
from train.folders import new_folder
from train.tables import aligned

CHAT, PAIRS, THUMBS = FILES = ("chat.jsonl", "pairs.jsonl", "thumbs.jsonl")
REPORT = "report.json"

Example = dict[str, Any]

# A tag, and the words of a comment that mean it.
TAGS = {
    "wrong": r"wrong|incorrect|false|error|mistake|not true|hallucinat\w*|invented|made up",
    "incomplete": r"incomplete|missing|forgot|left out|not enough|cut off|truncated",
    "long": r"too long|verbose|wordy|rambl\w*",
    "short": r"too short|brief|terse",
    "style": r"tone|style|format\w*|rude|polite|formal",
    "unsafe": r"unsafe|danger\w*|harm\w*|offensive|toxic|racist|sexist",
    "refused": r"refus\w*|won't answer|did not answer|didn't answer",
    "good": r"great|good|perfect|thanks?|thank you|excellent|helpful",
}
_TAGS = {tag: re.compile(rf"\b(?:{words})\b", re.IGNORECASE) for tag, words in TAGS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset(Limits):
    snapshot: Path = field(metadata={"help": "folder made by `deploy snapshot`", "parse": Path, "positional": True})
    output: Path = field(metadata={"help": "folder to make", "parse": Path, "positional": True})
    held_out: tuple[Path, ...] = option((), "evaluation files whose text must not be learnt")


def run(options: Dataset) -> int:
    with new_folder(options.output) as folder:
        print(as_text(make_dataset(options.snapshot, folder, options, options.held_out)))
    return 0


def make_dataset(snapshot: Path, folder: Path, limits: Limits, held_out: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Fill the empty `folder`; the same snapshot and limits give the same examples. Returns the report.

    Raises DeployError if the snapshot cannot be read.
    """
    try:
        origin = read(snapshot)
        entries = list(judgements(snapshot))
    except (OSError, ValueError) as error:
        raise DeployError(f"{snapshot} is no snapshot: {error}; make one with `python -m deploy snapshot`") from error
    found = quarantine(entries, limits, read_index(held_out, limits.ngram))
    examples = {CHAT: chats(found.kept), PAIRS: pairs(found.kept), THUMBS: [*thumbs(found.kept), *scores(found.kept)]}
    for name, lines in examples.items():
        texts = (json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / name).write_text("".join(texts), encoding="utf-8")
    report = make_report(entries, found, {name: len(lines) for name, lines in examples.items()})
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    lineage = FolderLineage(
        kind="dataset",
        created=utc_now(),
        command="python -m deploy dataset",
        inputs={"snapshot": origin.digest},
        interactions=sorted({entry.interaction.id for entry in found.kept}),
        feedback=[entry.feedback.id for entry in found.kept],
        oldest=min((entry.interaction.created for entry in found.kept), default=None),
    )
    write(folder, lineage)
    return report


def chats(kept: Iterable[Judged]) -> list[Example]:
    tags = tags_of(kept)
    return [
        as_conversation(entry.interaction, text) | labelled(entry, tags)
        for entry in kept
        if (text := correction(entry)) is not None
    ]


def pairs(kept: Iterable[Judged]) -> list[Example]:
    tags = tags_of(kept)
    return [
        {"prompt": prompt_of(entry.interaction), "chosen": text, "rejected": entry.interaction.completion}
        | labelled(entry, tags)
        for entry in kept
        if (text := correction(entry)) is not None
    ]


def thumbs(kept: Iterable[Judged]) -> list[Example]:
    tags = tags_of(kept)
    return [
        judged_answer(entry, label=entry.feedback.value, weight=1.0) | labelled(entry, tags)
        for entry in kept
        if isinstance(entry.feedback.value, bool)
    ]


def scores(kept: Iterable[Judged]) -> list[Example]:
    """By rank among the metric's own scores, as nobody says what their scale is. The very middle says nothing."""
    tags = tags_of(kept)
    by_metric: dict[str, list[Judged]] = defaultdict(list)
    for entry in kept:
        if is_score(entry.feedback):
            by_metric[entry.feedback.metric_name].append(entry)
    examples = []
    for entries in by_metric.values():
        values = np.array([float(entry.feedback.value) for entry in entries])
        below = (values[None] < values[:, None]).mean(axis=1) + (values[None] == values[:, None]).mean(axis=1) / 2
        for entry, rank in zip(entries, below.tolist(), strict=True):
            if rank != 0.5:
                weight = round(2 * abs(rank - 0.5), 4)
                examples.append(judged_answer(entry, label=rank > 0.5, weight=weight) | labelled(entry, tags))
    return examples


def judged_answer(entry: Judged, *, label: object, weight: float) -> Example:
    answer = {"prompt": prompt_of(entry.interaction), "completion": entry.interaction.completion}
    return answer | {"label": label, "weight": weight}


def as_conversation(interaction: Interaction, answer: str) -> Example:
    if interaction.messages is None:
        return {"prompt": interaction.prompt, "completion": answer}
    return {"messages": [*interaction.messages, {"role": "assistant", "content": answer}]}


def prompt_of(interaction: Interaction) -> Any:
    return interaction.prompt if interaction.messages is None else interaction.messages


def labelled(entry: Judged, tags: dict[str, list[str]]) -> Example:
    """Columns that training carries along: where the example came from, and what was remarked."""
    found: Example = {"feedback": entry.feedback.id}
    return found | ({"tags": tags[entry.interaction.id]} if entry.interaction.id in tags else {})


def tags_of(kept: Iterable[Judged]) -> dict[str, list[str]]:
    """Tags by interaction, of what comments say."""
    found: dict[str, set[str]] = defaultdict(set)
    for entry in kept:
        if entry.feedback.metric_name == COMMENT:
            found[entry.interaction.id] |= {
                tag for tag, words in _TAGS.items() if words.search(str(entry.feedback.value))
            }
    return {interaction: sorted(tags) for interaction, tags in found.items() if tags}


def make_report(entries: list[Judged], found: Sorted, written: dict[str, int]) -> dict[str, Any]:
    """Counts and ids, no words: an erasure need not reach it."""
    kept = {entry.feedback.id for entry in found.kept}
    sources: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        sources[entry.feedback.source or "anonymous"]["kept" if entry.feedback.id in kept else "dropped"] += 1
    tags = Counter(tag for interaction in tags_of(found.kept).values() for tag in interaction)
    return {
        "judgements": len(entries),
        "kept": len(found.kept),
        "dropped": {reason: {"count": len(ids), "feedback": ids[:10]} for reason, ids in found.dropped.items()},
        "sources": {name: dict(counts) for name, counts in sorted(sources.items())},
        "tags": dict(tags.most_common()),
        "examples": written,
    }


def as_text(report: dict[str, Any]) -> str:
    dropped = sorted(report["dropped"].items(), key=lambda item: -item[1]["count"])
    rows = [[reason, str(tally["count"])] for reason, tally in dropped]
    rows = [["judgements", str(report["judgements"])], *rows, ["kept", str(report["kept"])]]
    return aligned(["", "count"], rows + [[f"{name}: examples", str(n)] for name, n in report["examples"].items()])


COMMANDS = {"dataset": (Dataset, run)}
