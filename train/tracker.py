"""Where the figures of a run go: a progress bar, `metrics.jsonl` always, and a tracker by name."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from train.errors import TrainError
from train.flags import option

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "tracker.json"  # the run's name at the tracker, to go on with it
PROJECT = "pawl"


class Sink(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in `FOLDER/tensorboard`."""

    def __init__(self, folder: Path, start: int, settings: Mapping[str, Any]) -> None:
        module = _needed("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        if not start:
            rows = "\n".join(f"    {name}: {value}" for name, value in settings.items())
            self._writer.add_text("settings", rows)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class MLflow:
    """Experiment PROJECT, at the server or store that MLflow's own settings name."""

    def __init__(self, folder: Path, start: int, settings: Mapping[str, Any]) -> None:
        self._mlflow = _needed("mlflow", "mlflow")
        self._mlflow.set_experiment(PROJECT)
        known = _known_run(folder, "mlflow") if start else None
        run = self._mlflow.start_run(run_id=known, run_name=None if known else folder.name)
        if not known:
            self._mlflow.log_params(dict(settings))
            _remember_run(folder, "mlflow", run.info.run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class WeightsAndBiases:
    """Project PROJECT; without an account, set WANDB_MODE=offline.

    Steps only grow there: what a resumed run repeats keeps its first figures.
    """

    def __init__(self, folder: Path, start: int, settings: Mapping[str, Any]) -> None:
        wandb = _needed("wandb", "wandb")
        known = _known_run(folder, "wandb") if start else None
        self._run = wandb.init(
            project=PROJECT, name=folder.name, dir=str(folder), config=dict(settings), id=known, resume="allow"
        )
        _remember_run(folder, "wandb", self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


SINKS: dict[str, Callable[[Path, int, Mapping[str, Any]], Sink] | None] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
    "none": None,
}


@dataclass(frozen=True, slots=True)
class TrackerOptions:
    tracker: str = option("tensorboard", "where figures go beside metrics.jsonl", choices=tuple(SINKS))


class Tracker:
    """Of the run in `folder`, `steps` long, of which `start` are done; what was logged after those is dropped.

    Metrics have flat names (`loss`, `held_out_loss`, `learning_rate`, `tokens`, ...). A process that does not lead
    writes nothing. Raises TrainError for a tracker whose package is missing.
    """

    def __init__(
        self,
        folder: Path,
        options: TrackerOptions,
        *,
        steps: int,
        start: int = 0,
        settings: Mapping[str, Any] | None = None,
        leads: bool = True,
    ) -> None:
        self._file = None
        self._sink: Sink | None = None
        if leads:
            make = SINKS[options.tracker]
            folder.mkdir(parents=True, exist_ok=True)
            self._sink = make(folder, start, settings or {}) if make else None
            _drop_after(folder / METRICS_FILE, start)
            self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=None if leads else True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures of `step`. What is not finite is null in the file, and not sent to the tracker."""
        if self._file is None:
            return
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        row = {"step": step} | {name: finite.get(name) for name in metrics}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._sink:
            try:
                self._sink.log(step, finite)
            except Exception as error:  # a tracker's server may be gone; the run goes on without it
                self._sink = None
                tqdm.write(f"tracker: stopped at step {step}, {METRICS_FILE} goes on: {error}", file=sys.stderr)

    def show(self, step: int, *, loss: float, tokens_per_second: float, mfu: float) -> None:
        """Moves the bar to `step`; its time left is tqdm's."""
        self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, MFU {mfu:.0%}", refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self, *, failed: bool = False) -> None:
        self._bar.close()
        if self._file:
            self._file.close()
        if self._sink:
            self._sink.close(failed)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without a last one that a crash cut short."""
    rows = []
    for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path.parent) if row["step"] <= step]
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(new, path)


def _needed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrainError(f"--tracker {package} needs the package {package}; pip install {package}") from error


def _known_run(folder: Path, tracker: str) -> str | None:
    path = folder / RUN_FILE
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return known.get(tracker)


def _remember_run(folder: Path, tracker: str, name: str) -> None:
    (folder / RUN_FILE).write_text(json.dumps({tracker: name}))
