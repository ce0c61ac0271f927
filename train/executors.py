"""The stages of a curation, run by one of datatrove's executors: on this machine, by Ray, or by Slurm."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from tqdm import tqdm

from train.errors import TrainError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Stage:
    """A pipeline, run `tasks` times with the ranks 0 to tasks - 1. A stage starts when the one before has ended."""

    name: str
    pipeline: Sequence[Callable[..., Any]]
    tasks: int


@dataclass(frozen=True, slots=True)
class Slurm:
    """What Slurm has to be told of a job."""

    partition: str
    time: str


def check_available(executor: str) -> None:
    """Raises TrainError that names what is missing."""
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        raise TrainError("--executor ray needs the package ray, which is not installed; pip install 'ray[default]'")
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise TrainError("--executor slurm needs the command sbatch, which is not on the PATH; run it on a login node")


def run_stages(executor: str, stages: Sequence[Stage], workers: int, logs: Path, slurm: Slurm) -> None:
    """Run all; with Slurm, only submit them. `workers` tasks run at once.

    Raises TrainError if a stage did not end well.
    """
    if executor == "slurm":
        _submit(stages, workers, logs, slurm)
        return
    for stage in tqdm(stages, desc="curate", unit="stage", disable=None):
        common = {"tasks": stage.tasks, "workers": min(workers, stage.tasks), "logging_dir": str(logs / stage.name)}
        kind = LocalPipelineExecutor if executor == "local" else RayPipelineExecutor
        made = kind(list(stage.pipeline), **common)
        made.run()
        if missing := made.get_incomplete_ranks():  # Ray's executor only logs a failed task
            raise TrainError(f"stage {stage.name} lost tasks {missing[:5]} of {stage.tasks}; see the logs of Ray")


def _submit(stages: Sequence[Stage], workers: int, logs: Path, slurm: Slurm) -> None:
    previous = None
    for stage in stages:
        previous = SlurmPipelineExecutor(
            list(stage.pipeline),
            tasks=stage.tasks,
            workers=workers,
            time=slurm.time,
            partition=slurm.partition,
            qos="",
            job_name=f"curate-{stage.name}",
            # the nodes need this interpreter's packages and our modules; both have to lie on a shared disk
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}",
            logging_dir=str(logs / stage.name),
            depends=previous,
        )
    if previous is not None:
        try:
            previous.run()
        except subprocess.CalledProcessError as error:
            raise TrainError(
                f"sbatch ended with {error.returncode}, see its message above; cancel the jobs named curate-* that it "
                "took before, and correct --slurm-partition or --slurm-time"
            ) from error
