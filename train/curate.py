"""`python -m train curate`: filter, decontaminate, de-duplicate and redact records, on datatrove."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from proto.redaction import KINDS
from train.data import find_sources
from train.errors import TrainError
from train.flags import add_flags, from_flags, option
from train.folders import refuse_existing
from train.tables import aligned

NONE = "none"
FILTERS = ("gopher-quality", "gopher-repetition", "c4", "fineweb", "code")
DEDUP = ("exact", "minhash")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    filters: tuple[str, ...] = option(
        ("gopher-quality", "gopher-repetition", "fineweb"), "rules of quality, in this order", choices=(*FILTERS, NONE)
    )
    dedup: tuple[str, ...] = option(DEDUP, "kinds of duplicates to drop", choices=(*DEDUP, NONE))
    redact: tuple[str, ...] = option(KINDS, "what to replace by a mark", choices=(*KINDS, NONE))
    against: tuple[Path, ...] = option((), "evaluation files whose text must not be learnt")
    ngram: int = option(13, "words in common that make a document contaminated", least=2)
    examples: int = option(3, "documents to show for each reason in the report", least=0)
    example_characters: int = option(200, "characters of each to show", least=0)
    executor: str = option("local", "who runs the tasks", choices=("local", "ray", "slurm"))
    workers: int = option(1, "tasks at once", least=1)
    shards: int = option(0, "parts to work on and files to write; 0: as many as workers", least=0)
    slurm_partition: str = option("", "where Slurm is to run the tasks")
    slurm_time: str = option("24:00:00", "the longest that Slurm lets a task run")

    def __post_init__(self) -> None:
        """Raises TrainError for flags that contradict each other."""
        for name in ("filters", "dedup", "redact"):
            values = getattr(self, name)
            if NONE in values and len(values) > 1:
                raise TrainError(f"--{name} {' '.join(values)} is a contradiction; give none alone, or leave it out")
            if len(set(values)) < len(values):
                raise TrainError(f"--{name} {' '.join(values)} repeats itself; give each once")
        if self.executor == "slurm" and not self.slurm_partition:
            raise TrainError("--executor slurm needs --slurm-partition; sinfo lists them")

    def chosen(self, name: str) -> tuple[str, ...]:
        """The values of a flag, () for none."""
        return tuple(value for value in getattr(self, name) if value != NONE)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", type=Path, nargs="+", help="files and folders of records")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to make")
    add_flags(parser, Options)


def run(args: argparse.Namespace) -> int:
    report = curate(args.inputs, args.output, from_flags(Options, args))
    if report is None:
        print(f"submitted; {args.output} will be there when the last job has ended, or its log says why not")
        return 0
    from train.curation_report import REPORT_TEXT, step_rows

    print(aligned(("step", "documents", "characters"), step_rows(report)))
    for title in ("unreadable", "redacted"):
        counts = {key: item["count"] if isinstance(item, dict) else item for key, item in report[title].items()}
        if counts:
            print(f"{title}: " + ", ".join(f"{key} {count:,}" for key, count in counts.items()))
    print(f"examples of what was dropped: {args.output / REPORT_TEXT}")
    return 0


def curate(inputs: list[Path], target: Path, options: Options) -> dict[str, Any] | None:
    """Make the folder `target` with the records of `inputs` that are left, and a report; the report.

    With Slurm only submits the jobs, and gives None. Raises TrainError for what the user can cure.
    """
    refuse_existing(target)
    if options.executor != "local":  # tasks elsewhere may start in another folder
        inputs = [path.absolute() for path in inputs]
        options = replace(options, against=tuple(path.absolute() for path in options.against))
    sources = [source for path in inputs for source in find_sources(path)]
    from train.curation_report import publish
    from train.curation_stages import Publish, make_stages
    from train.executors import Slurm, Stage, check_available, run_stages

    check_available(options.executor)
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    submitted = False
    try:
        job, stages = make_stages(sources, target, work, options)
        if options.executor == "slurm":
            stages.append(Stage("publish", [Publish(job, work)], 1))
        slurm = Slurm(options.slurm_partition, options.slurm_time)
        run_stages(options.executor, stages, options.workers, work / "logs", slurm)
        submitted = options.executor == "slurm"
        return None if submitted else publish(job)
    finally:
        if not submitted:
            shutil.rmtree(work)
