"""Checkpoints of a run: copied at once, written while training goes on, whole or not there.

Tensors are saved by torch.distributed.checkpoint, so a run may go on with another number of processes; plain values
are JSON beside them. A folder is named `step-000100.incomplete` until all processes have written their part.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from tqdm import tqdm

from train import random_state
from train.errors import TrainError
from train.flags import option
from train.optimizers import Optimizers

INCOMPLETE = ".incomplete"
STATE_FILE = "state.json"
MAX_FAILURES = 3  # in succession: then nobody looks, and the work since the last checkpoint is at stake
_NAME = re.compile(r"step-\d+")


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    save_every_steps: int = option(0, "steps between checkpoints; 0: only by time", least=0)
    save_every_minutes: float = option(10.0, "minutes between checkpoints; 0: only by steps", least=0)
    keep: int = option(3, "newest checkpoints to keep", least=1)
    keep_daily: bool = option(True, "keep the last checkpoint of each UTC day too")


class Checkpoints:
    """Of one run, in `directory`. With several processes, all of them make it and call each method at the same step.

    One save is under way at most. A failed one is reported, and training goes on, but not after MAX_FAILURES.
    """

    def __init__(self, directory: Path, options: CheckpointOptions) -> None:
        self.directory = directory
        self.options = options
        self.failures = 0  # in succession
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        if self._rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for abandoned in directory.glob("step-*" + INCOMPLETE):
                shutil.rmtree(abandoned)
        # Groups of their own: the writer's thread must not mix its messages with those of the loop.
        self._writers = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._deciders = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._stager = _new_stager()
        self._in_flight: tuple[int, Future[Any]] | None = None
        self._saved_step = -1
        self._last_due: tuple[int, float] | None = None
        self._problem = ""
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

    def due(self, step: int, now: float) -> bool:
        """Whether to save after `step`; `now` in seconds of any steady clock. Process 0 decides.

        Put off while a save is under way. Raises TrainError as `save` does.
        """
        self._settle(wait=False)
        last_step, last_time = self._last_due or (step - 1, now)
        every, seconds = self.options.save_every_steps, 60 * self.options.save_every_minutes
        by_steps = every > 0 and step // every > last_step // every
        by_time = seconds > 0 and now - last_time >= seconds
        due = self._in_flight is None and (by_steps or by_time)
        if self._deciders:
            decision = torch.tensor(due)
            dist.broadcast(decision, 0, group=self._deciders)
            due = bool(decision)
        if due or not self._last_due:
            self._last_due = (step if due else step - 1, now)
        return due

    def save(self, step: int, model: nn.Module, optimizers: Optimizers, values: Mapping[str, Any]) -> None:
        """Returns when the state is copied; it is written while training goes on.

        Saved are the trained parameters, the state of the optimizers, the random generators of each process, and
        `values` (JSON) of process 0. Waits for a save that is under way; a step that is saved is not saved again.
        Raises TrainError when MAX_FAILURES saves have failed in succession.
        """
        self._settle(wait=True)
        if step == self._saved_step:
            return
        state = {"model": trained_tensors(model), "optimizer": optimizers.state_dict()}
        texts = {f"random-{self._rank}.json": json.dumps(random_state.capture())}
        about = {"step": step, "saved_at": datetime.now(UTC).isoformat(), "values": dict(values)}
        writer = _Writer(self._path(step), texts, json.dumps(about), self._drop_expired)
        future = async_save(
            state,
            storage_writer=writer,
            process_group=self._writers,
            async_stager=self._stager,
            no_dist=self._writers is None,
        )
        self._in_flight = step, cast("Future[Any]", future)

    def finish(self) -> None:
        """Waits for the save under way. Raises TrainError if the last save failed."""
        self._settle(wait=True)
        self._stager.close()  # frees the memory of the copy
        self._stager = _new_stager()
        if self.failures:
            raise TrainError(f"the last checkpoint was not saved: {self._problem}")

    def latest(self) -> Path | None:
        """The last whole checkpoint; damaged ones are reported and passed over."""
        for path in reversed(_complete(self.directory)):
            problem = damage(path)
            if not problem:
                return path
            self._report(f"{path} is passed over: {problem}")
        return None

    def load(self, path: Path, model: nn.Module, optimizers: Optimizers) -> tuple[int, dict[str, Any]]:
        """Puts everything in place, exactly as saved; (step, values).

        With another number of processes, those that are new keep their random generators. Raises TrainError if other
        parameters were trained, or of other shapes.
        """
        reader = FileSystemReader(path)
        found = cast("dict[str, TensorStorageMetadata]", reader.read_metadata().state_dict_metadata)
        saved = {name.removeprefix("model."): kind.size for name, kind in found.items() if name.startswith("model.")}
        weights = trained_tensors(model)
        if unlike := {name for name, _ in saved.items() ^ {(name, value.shape) for name, value in weights.items()}}:
            raise TrainError(
                f"{path} and this run differ in {len(unlike)} trained parameters, such as {min(unlike)}; resume with "
                "the options with which it was made"
            )
        moments = {
            name.removeprefix("optimizer."): optimizers.empty(
                name.removeprefix("optimizer."), kind.size, kind.properties.dtype
            )
            for name, kind in found.items()
            if name.startswith("optimizer.")
        }
        state = {"model": weights, "optimizer": moments}
        load(state, storage_reader=reader, process_group=self._writers, no_dist=self._writers is None)
        optimizers.load_state_dict(state["optimizer"])
        own = path / f"random-{self._rank}.json"
        if own.exists():
            random_state.restore(json.loads(own.read_text()))
        about = json.loads((path / STATE_FILE).read_text())
        self._saved_step = about["step"]
        return about["step"], about["values"]

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def _settle(self, wait: bool) -> None:
        """Takes note of how the save under way ended, if it has or `wait` is true."""
        if self._in_flight is None or not (wait or self._in_flight[1].done()):
            return
        (step, future), self._in_flight = self._in_flight, None
        error = future.exception()
        if error is None:
            self.failures, self._saved_step = 0, step
            return
        if not isinstance(error, CheckpointException):
            raise error
        self.failures += 1
        path = self._path(step)
        cause = next(iter(error.failures.values()))[0]
        free = shutil.disk_usage(self.directory).free
        if self._rank == 0:
            shutil.rmtree(_incomplete(path), ignore_errors=True)
        self._problem = f"{path}: {type(cause).__name__}: {cause} ({free:,} bytes free there)"
        if self.failures >= MAX_FAILURES:
            raise TrainError(
                f"{self.failures} checkpoints in succession were not saved, the last at {self._problem}; make room or "
                "mend the disk, and resume"
            )
        self._report(f"not saved, training goes on: {self._problem}")

    def _drop_expired(self) -> None:
        try:
            saved_at = {path: _saved_at(path) for path in _complete(self.directory)}
            for path in expired(saved_at, self.options):
                shutil.rmtree(path)
        except (OSError, ValueError, KeyError) as error:  # the new checkpoint is whole all the same
            self._report(f"old checkpoints were not removed: {error}")

    def _report(self, text: str) -> None:
        if self._rank == 0:
            tqdm.write(f"checkpoints: {text}", file=sys.stderr)


class _Writer(FileSystemWriter):
    """Writes under another name, and renames when all processes have written."""

    def __init__(self, path: Path, texts: Mapping[str, str], about: str, published: Callable[[], None]) -> None:
        super().__init__(_incomplete(path))
        self._final_path, self._texts, self._about, self._published = path, texts, about, published

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        for name, text in self._texts.items():
            (_incomplete(self._final_path) / name).write_text(text)
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # "unexpected pos": torch's words for a write that failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called in process 0, when it has heard from all."""
        (_incomplete(self._final_path) / STATE_FILE).write_text(self._about)
        super().finish(metadata, results)
        if self._final_path.exists():  # damaged, or of a time line that was given up
            shutil.rmtree(self._final_path)
        _incomplete(self._final_path).rename(self._final_path)
        self._published()


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that need a gradient, by name, not copied."""
    state = model.state_dict()  # under FSDP2 this divides again what a forward pass has gathered
    return {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def expired(saved_at: Mapping[Path, datetime], options: CheckpointOptions) -> list[Path]:
    """Of checkpoints, oldest first, those that need not be kept: neither new nor the last of a UTC day."""
    order = list(saved_at)
    kept = set(order[-options.keep :])
    if options.keep_daily:
        kept |= set({time.astimezone(UTC).date(): path for path, time in saved_at.items()}.values())
    return [path for path in order if path not in kept]


def damage(path: Path) -> str:
    """What is wrong with a checkpoint, found without reading its tensors; empty if nothing is."""
    try:
        _saved_at(path)
        metadata = FileSystemReader(path).read_metadata()
        sizes: dict[str, int] = defaultdict(int)
        for part in metadata.storage_data.values():
            sizes[part.relative_path] = max(sizes[part.relative_path], part.offset + part.length)
        short = [name for name, size in sizes.items() if (path / name).stat().st_size < size]
    except Exception as error:  # a damaged pickle raises anything
        return f"{type(error).__name__}: {error}"
    return f"{short[0]} is cut short" if short else ""


def _incomplete(path: Path) -> Path:
    return path.with_name(path.name + INCOMPLETE)


def _complete(directory: Path) -> list[Path]:
    """By step."""
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _saved_at(path: Path) -> datetime:
    return datetime.fromisoformat(json.loads((path / STATE_FILE).read_text())["saved_at"])


def _new_stager() -> DefaultStager:
    cuda = torch.cuda.is_available()
    return DefaultStager(StagingOptions(cuda, False, False, cuda))  # pinned memory there; kept between saves
