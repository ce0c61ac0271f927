"""The training loop, one for all objectives.

A step: learning rate, batch, objective and backward by micro-batches, clip, guard, update, log, judge, save. The loss
is the sum over the batch of all processes divided by its count, so that neither accumulation nor the number of
processes changes it; and batch N is a function of N alone, so that a resumed run goes on with the same tokens.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.batch import Batch, Batches
from train.checkpoints import Checkpoints
from train.distributed import World
from train.errors import TrainError
from train.guard import Guard
from train.loss import Objective
from train.model import Model
from train.optimizers import Optimizers
from train.options import Options
from train.schedule import factor
from train.tracker import Tracker

END = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Training:
    """What a run is made of, and how far it is: `step` updates were made, `tokens` were seen."""

    options: Options
    world: World
    model: Model
    objective: Objective
    data: Batches
    held_out: Batches | None
    optimizers: Optimizers
    guard: Guard
    checkpoints: Checkpoints | None  # None: a run that is not to be resumed
    steps: int
    eval_every: int
    eval_steps: int
    dtype: torch.dtype
    flops_per_token: float
    peak_flops: float  # of one process's device
    step: int = 0
    tokens: int = 0

    def values(self) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors."""
        return {"tokens": self.tokens, "guard": self.guard.state_dict(), "data": self.data.digest}

    def resume(self) -> bool:
        """Go on from the last checkpoint; False if there is none. Raises TrainError if the data has changed."""
        path = self.checkpoints.latest() if self.checkpoints else None
        if self.checkpoints is None or path is None:
            return False
        self.step, values = self.checkpoints.load(path, self.model, self.optimizers)
        if values["data"] != self.data.digest:
            raise TrainError(f"{path} was made with other data; give the same data, or another --output")
        self.tokens = values["tokens"]
        self.guard.load_state_dict(values["guard"])
        return True


def train(run: Training, tracker: Tracker) -> bool:
    """From `run.step` to the end; False if a signal ended it early. Either way all is saved, where saving is wished."""
    options, world = run.options, run.world
    with signals() as asked_to_end:
        while run.step < run.steps:
            started = time.monotonic()
            rate = factor(options.schedule, run.step, run.steps, warmup=options.warmup, decay=options.decay)
            run.optimizers.set_lr(rate)
            batch = run.data.batch(run.step, world.rank, world.size).to(world.device)
            figures = learn(run, batch)
            figures["grad_norm"] = clip(run.model, options.clip)
            if run.guard.accepts(run.step, figures["loss"], figures["grad_norm"]):
                run.optimizers.step()
            run.optimizers.zero_grad()
            run.step += 1

            num_tokens, ending = world.sum(batch.num_tokens, bool(asked_to_end))
            run.tokens += int(num_tokens)
            figures |= {"learning_rate": rate * options.learning_rate, "rejected": run.guard.rejected}
            report(run, tracker, figures, num_tokens, time.monotonic() - started)
            last = run.step == run.steps
            if run.held_out and (last or run.step % run.eval_every == 0):
                found = {f"held_out_{name}": value for name, value in judge(run, run.held_out).items()}
                tracker.log(run.step, {"tokens": run.tokens, **found})
            if run.checkpoints and (last or ending or run.checkpoints.due(run.step, time.monotonic())):
                run.checkpoints.save(run.step, run.model, run.optimizers, run.values())
            if ending:
                break
    if run.checkpoints:
        run.checkpoints.finish()
    return run.step == run.steps


def report(run: Training, tracker: Tracker, figures: dict[str, float], num_tokens: float, seconds: float) -> None:
    speed = num_tokens / seconds
    mfu = speed * run.flops_per_token / (run.peak_flops * run.world.size)
    measured = {"tokens": run.tokens, "batch_tokens": num_tokens, "seconds": seconds, "tokens_per_second": speed}
    tracker.log(run.step, figures | measured | {"mfu": mfu})
    tracker.show(run.step, loss=figures["loss"], tokens_per_second=speed, mfu=mfu)


def learn(run: Training, batch: Batch) -> dict[str, float]:
    """Gradients of the mean loss over the batch of all processes; that loss, and the objective's other figures."""
    (count,) = run.world.sum(batch.count)
    sums: dict[str, Tensor] = {}
    for micro in batch.split(run.options.micro_batch or len(batch.tokens)):
        with run.world.autocast(run.dtype):
            loss = run.objective(run.model, micro)
        # FSDP2 takes the mean over the processes.
        (loss.total * (run.world.size / max(count, 1))).backward()  # type: ignore[no-untyped-call]
        add(sums, {"loss": loss.total.detach(), **loss.metrics})
    return mean(run.world, sums, count)


@torch.no_grad()
def judge(run: Training, batches: Batches) -> dict[str, float]:
    """The objective's figures over the held-out data, or its first `eval_steps` batches."""
    run.model.eval()
    sums: dict[str, Tensor] = {}
    count = 0
    for step in range(run.eval_steps):
        batch = batches.batch(step, run.world.rank, run.world.size).to(run.world.device)
        for micro in batch.split(run.options.micro_batch or len(batch.tokens)):
            with run.world.autocast(run.dtype):
                loss = run.objective(run.model, micro)
            add(sums, {"loss": loss.total, **loss.metrics})
        count += batch.count
    run.model.train()
    return mean(run.world, sums, *run.world.sum(count))


def add(sums: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, value in found.items():
        sums[name] = sums[name] + value if name in sums else value


def mean(world: World, sums: dict[str, Tensor], count: float) -> dict[str, float]:
    """Over all processes."""
    return {name: total / max(count, 1) for name, total in zip(sums, world.sum(*sums.values()), strict=True)}


def clip(model: nn.Module, limit: float) -> float:
    """Scale all gradients so that their norm is at most `limit`; the norm that they had."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that holds the signals to end that came in the meantime, which no longer end the process at once."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, note) for number in END}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
