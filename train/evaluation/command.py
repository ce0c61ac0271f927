"""`python -m train eval TARGET FILE...`: judge a checkpoint or a running server by the same files and the same code.

1. Open the target. 2. Read every file and find its task, before anything is computed. 3. Judge it by each.
4. A table for people, and one JSON document.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.errors import TrainError
from train.evaluation.judgement import Judgement
from train.evaluation.options import Options, add_flags
from train.evaluation.targets import Classifier, Target, Unable, open_target
from train.evaluation.task_files import TaskFile, read
from train.flags import from_flags

EXIT_INCOMPLETE = 1
JUDGES = {
    "perplexity": "train.evaluation.perplexity",
    "generation": "train.evaluation.overlap",
    "classification": "train.evaluation.classification",
    "functions": "train.evaluation.functions",
}
PACKAGES = ("torch", "transformers", "sacrebleu", "rouge-score", "lm-eval")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="a checkpoint's directory, or the URL of a running server")
    parser.add_argument("files", type=Path, nargs="*", help="JSONL files of examples")
    parser.add_argument("-o", "--output", type=Path, help="file for the JSON document, instead of the last line")
    parser.add_argument("--answers", type=Path, help="JSONL file for what was answered and how each was scored")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    options = from_flags(Options, args)
    if not args.files and not options.lm_eval:
        raise TrainError("nothing to judge by: give JSONL files, or task files with --lm-eval")
    report = evaluate(args.target, args.files, options, answers=args.answers)
    print(table(report))
    text = json.dumps(report)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return EXIT_INCOMPLETE if any("skipped" in result for result in report["results"]) else 0


def evaluate(
    target: str | Path | Target | Classifier,
    files: Sequence[Path],
    options: Options | None = None,
    *,
    answers: Path | None = None,
) -> dict[str, Any]:
    """Judge `target`, a directory, a URL or an object that generates, by each of `files`; returns plain JSON.

    `results` has an entry per file: path, sha256, task, examples, seconds, and either metrics, intervals (95 %, by
    bootstrap), counts and notes, or `skipped`, why this target cannot be judged so. `harness` has the metrics of each
    of the `lm_eval` tasks. `answers`: a JSONL file to write. Raises TrainError, before anything is judged where it can.
    """
    options = options or Options()
    started = time.perf_counter()
    tasks = [read(path, options.task, options.limit) for path in files]
    opened = open_target(target, options) if isinstance(target, str | Path) else target
    if answers:
        answers.write_text("", encoding="utf-8")
    results = []
    for task in tasks:
        begun = time.perf_counter()
        result: dict[str, Any] = {"file": str(task.path), "sha256": task.sha256, "task": task.task}
        result["examples"] = len(task.examples)
        try:
            judgement = judge(opened, task, options)
        except Unable as reason:
            result["skipped"] = str(reason)
        else:
            for name in ("metrics", "intervals", "counts", "notes"):
                result[name] = dict(getattr(judgement, name))
            if answers:
                _write(answers, task, judgement)
        results.append(result | {"seconds": round(time.perf_counter() - begun, 3)})
    report: dict[str, Any] = {"target": opened.describe(), "options": asdict(options), "results": results}
    if options.lm_eval:
        from train.evaluation.harness import run_harness  # takes seconds to import what it needs

        report["harness"] = run_harness(opened, options.lm_eval, options)
    return report | {
        "seconds": round(time.perf_counter() - started, 3),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def judge(target: Target | Classifier, task: TaskFile, options: Options) -> Judgement:
    """Raises Unable if the target cannot be judged by this task, DataError if the examples do not fit it."""
    if isinstance(target, Classifier):
        if task.task != "classification":
            raise Unable(f"a checkpoint with a classification head cannot be judged by {task.task}")
        from train.evaluation.classification import judge_classifier

        return judge_classifier(target, task.examples, options)
    # Each is imported when it is called: some need a second to load.
    judgement: Judgement = importlib.import_module(JUDGES[task.task]).judge(target, task.examples, options)
    return judgement


def table(report: dict[str, Any]) -> str:
    """The figures for people, in columns."""
    rows = [("file", "task", "examples", "figure", "value", "95 % interval")]
    for result in report["results"]:
        head = (Path(result["file"]).name, result["task"], str(result["examples"]))
        for name, value in result.get("metrics", {}).items():
            low, high = result["intervals"][name]
            rows.append((*head, name, f"{value:.4g}", f"{low:.4g} to {high:.4g}"))
            head = ("", "", "")
        if "skipped" in result:
            rows.append((*head, "skipped", "", result["skipped"]))
    for name, values in report.get("harness", {}).items():
        head = (name, "lm-eval", str(values["examples"]))
        for metric, value in values.items():
            if metric != "examples" and "_stderr" not in metric:
                error = values.get(metric.replace(",", "_stderr,"))
                rows.append((*head, metric, f"{value:.4g}", "" if error is None else f"standard error {error:.2g}"))
                head = ("", "", "")
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join([*map(str.ljust, row[:5], widths), row[5]]).rstrip() for row in rows)


def _write(path: Path, task: TaskFile, judgement: Judgement) -> None:
    with path.open("a", encoding="utf-8") as file:
        for answer in judgement.answers:
            file.write(json.dumps({"file": str(task.path), "task": task.task} | dict(answer)) + "\n")
