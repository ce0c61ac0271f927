"""The report of a curation, and the last act: what was made gets its name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from proto.manifest import digest_file
from train.errors import TrainError
from train.folders import refuse_existing
from train.ledger import Ledger

REPORT_JSON, REPORT_TEXT = "report.json", "report.md"
TOOLS = ("datatrove",)


@dataclass(frozen=True, slots=True)
class Job:
    """One curation: its folders, the ledgers of the steps that drop documents, and where everything came from."""

    target: Path
    made: Path  # becomes `target`
    read: Ledger
    unreadable: Ledger
    steps: tuple[Ledger, ...]
    redacted: Ledger
    kept: Ledger
    lineage: dict[str, Any]


def describe_file(path: Path) -> dict[str, Any]:
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": digest_file(path)}


def publish(job: Job) -> dict[str, Any]:
    """Write the reports beside the data and rename the folder to the target; the report.

    Raises TrainError if no document is left, or if there is a target by now.
    """
    report = make_report(job)
    if not report["documents"]["kept"]:
        reasons = [(reason, tally["count"]) for step in report["steps"] for reason, tally in step["reasons"].items()]
        most = max(reasons, key=lambda item: item[1], default=("unreadable", report["documents"]["unreadable"]))
        raise TrainError(
            f"none of {report['documents']['read']:,} documents is left, {most[1]:,} of them for {most[0]}; "
            "choose other --filters, or none"
        )
    (job.made / REPORT_JSON).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (job.made / REPORT_TEXT).write_text(as_text(report), encoding="utf-8")
    refuse_existing(job.target)
    job.made.rename(job.target)
    return report


def make_report(job: Job) -> dict[str, Any]:
    read, kept = (_total(ledger) for ledger in (job.read, job.kept))
    steps = [{"step": ledger.step, **_totals(ledger)} for ledger in job.steps]
    dropped = sum(step["characters"] for step in steps)
    return {
        "documents": {
            "read": read[0],
            "dropped": sum(step["count"] for step in steps),
            "kept": kept[0],
            "unreadable": _total(job.unreadable)[0],
        },
        # of kept documents, lines that C4's filter took and what redaction put for what it took
        "characters": {
            "read": read[1],
            "dropped": dropped,
            "edited": read[1] - dropped - kept[1],
            "kept": kept[1],
        },
        "steps": steps,
        "unreadable": _totals(job.unreadable)["reasons"],
        "redacted": {kind: tally.count for kind, tally in job.redacted.load().items()},
        **job.lineage,
        "tools": {tool: version(tool) for tool in TOOLS},
        "outputs": [{**describe_file(path), "path": path.name} for path in sorted(job.made.glob("*.jsonl"))],
    }


def step_rows(report: dict[str, Any]) -> list[list[str]]:
    """Step, documents, characters: what came in, what each step took, what is left."""
    documents, characters = report["documents"], report["characters"]
    rows = [["read", documents["read"], characters["read"]]]
    rows += [[step["step"], -step["count"], -step["characters"]] for step in report["steps"]]
    rows += [["edited", 0, -characters["edited"]], ["kept", documents["kept"], characters["kept"]]]
    return [[name, f"{count:,}", f"{size:,}"] for name, count, size in rows]


def as_text(report: dict[str, Any]) -> str:
    lines = ["# Curation", "", "| step | documents | characters |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in step_rows(report)]
    for step in [*report["steps"], {"step": "unreadable", "reasons": report["unreadable"]}]:
        if step["reasons"]:
            lines += ["", f"## {step['step']}"]
        for reason, tally in step["reasons"].items():
            lines += ["", f"{reason}: {tally['count']:,}", ""]
            lines += [_example(example) for example in tally["examples"]]
    if report["redacted"]:
        lines += ["", "## redacted", ""]
        lines += [f"- {kind}: {count:,}" for kind, count in report["redacted"].items()]
    for title in ("inputs", "against", "outputs"):
        if report[title]:
            lines += ["", f"## {title}", "", "| file | bytes | SHA-256 |", "|---|---|---|"]
            lines += [f"| {item['path']} | {item['bytes']:,} | `{item['sha256']}` |" for item in report[title]]
    if short := report["texts_too_short_to_look_for"]:
        lines += ["", f"Texts of the evaluation files that are too short to be looked for: {short:,}."]
    lines += ["", "## options", ""]
    lines += [f"- {name}: {json.dumps(value)}" for name, value in report["options"].items()]
    return "\n".join(lines) + "\n"


def _example(example: dict[str, str]) -> str:
    """On one line, in code type: a document may hold any Markdown."""
    parts = [f"- {example['where']}"]
    if "match" in example:
        parts.append(f"has in common: `{_plain(example['match'])}`")
    if "text" in example:
        parts.append(f"`{_plain(example['text'])}`")
    return ", ".join(parts)


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _total(ledger: Ledger) -> tuple[int, int]:
    totals = _totals(ledger)
    return totals["count"], totals["characters"]


def _totals(ledger: Ledger) -> dict[str, Any]:
    tallies = ledger.load()
    return {
        "count": sum(tally.count for tally in tallies.values()),
        "characters": sum(tally.characters for tally in tallies.values()),
        "reasons": {reason: asdict(tally) for reason, tally in tallies.items()},
    }
