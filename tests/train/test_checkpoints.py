from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tests.train.small import make, optimize, take_step
from train.checkpoints import CheckpointOptions, Checkpoints, damage, expired
from train.errors import TrainError
from train.optimizers import Optimizers

BY_STEPS = CheckpointOptions(save_every_steps=1, save_every_minutes=0)
VALUES: dict[str, Any] = {"tokens": 7, "guard": {"norms": [1.5]}, "digest": "ab"}


def opened(directory: Path, options: CheckpointOptions = BY_STEPS) -> Checkpoints:
    return Checkpoints(directory, options)


def trained(steps: int, seed: int = 0) -> tuple[nn.Module, Optimizers]:
    model, optimizers = make(seed)
    for step in range(steps):
        take_step(model, optimizers, step)
    return model, optimizers


def save_now(checkpoints: Checkpoints, step: int, model: nn.Module, optimizers: Optimizers) -> Path:
    checkpoints.save(step, model, optimizers, VALUES)
    checkpoints.finish()
    return checkpoints.directory / f"step-{step:06d}"


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that is done when the event is set."""
    event, sync = threading.Event(), os.fsync

    def wait(descriptor: int) -> None:
        assert event.wait(60)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", wait)
    yield event
    event.set()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Every file that grows over `size` bytes is an error, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    model, optimizers = trained(3)
    for part in (torch, np.random, random):
        part.seed(5) if part is not torch else torch.manual_seed(5)
    path = save_now(opened(tmp_path), 3, model, optimizers)
    expected = (random.random(), np.random.rand(), torch.rand(1))

    other, others = make(seed=1)
    checkpoints = opened(tmp_path)
    assert checkpoints.latest() == path
    assert checkpoints.load(path, other, others) == (3, VALUES)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert equal(model, other)
    state, loaded = optimizers.state_dict(), others.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state)
    for step in range(3, 5):
        take_step(model, optimizers, step)
        take_step(other, others, step)
    assert equal(model, other)


def test_saved_is_the_moment_of_the_call(tmp_path: Path, gate: threading.Event) -> None:
    model, optimizers = trained(2)
    then, _ = trained(2)
    checkpoints = opened(tmp_path)
    values = {"tokens": [1]}
    for step in (2, 4):  # the second time into the same memory
        gate.clear()
        checkpoints.save(step, model, optimizers, values)
        values["tokens"].append(step)
        for number in range(step, step + 2):
            take_step(model, optimizers, number)
        assert not equal(model, then)
        assert not (tmp_path / f"step-{step:06d}").exists()
        gate.set()
        checkpoints._settle(wait=True)
        found, others = make(seed=1)
        assert opened(tmp_path).load(tmp_path / f"step-{step:06d}", found, others)[1] == {
            "tokens": [1] if step == 2 else [1, 2]
        }
        assert equal(found, then)
        then.load_state_dict(model.state_dict())
    checkpoints.finish()


def test_due_by_steps_and_put_off_while_one_is_written(tmp_path: Path, gate: threading.Event) -> None:
    model, optimizers = trained(1)
    checkpoints = opened(tmp_path, CheckpointOptions(save_every_steps=4, save_every_minutes=0))
    assert [step for step in range(1, 10) if checkpoints.due(step, step)] == [4, 8]
    checkpoints.save(9, model, optimizers, VALUES)
    assert not checkpoints.due(12, 0)
    gate.set()
    checkpoints._settle(wait=True)
    assert checkpoints.due(13, 0)
    assert not checkpoints.due(14, 0)
    checkpoints.finish()


def test_due_by_time(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, CheckpointOptions(save_every_steps=0, save_every_minutes=2))
    assert [now for now in range(1000, 1500, 50) if checkpoints.due(1, now)] == [1150, 1300, 1450]
    never = opened(tmp_path, CheckpointOptions(save_every_steps=0, save_every_minutes=0))
    assert not any(never.due(step, 1e6 * step) for step in range(5))


def test_the_same_step_is_saved_once(tmp_path: Path) -> None:
    model, optimizers = trained(1)
    checkpoints = opened(tmp_path)
    path = save_now(checkpoints, 1, model, optimizers)
    inode = path.stat().st_ino
    save_now(checkpoints, 1, model, optimizers)
    assert path.stat().st_ino == inode


def test_the_newest_are_kept(tmp_path: Path) -> None:
    model, optimizers = trained(1)
    checkpoints = opened(tmp_path, CheckpointOptions(keep=2))
    for step in (8, 9, 10, 1_000_000):
        checkpoints.save(step, model, optimizers, VALUES)
    checkpoints.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"step-000010", "step-1000000"}
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.name == "step-1000000"


@given(st.lists(st.integers(0, 30), max_size=30).map(sorted), st.integers(1, 4), st.booleans())
def test_what_expires(hours: list[int], keep: int, keep_daily: bool) -> None:
    start = datetime(2026, 1, 1, 12, tzinfo=UTC)
    saved_at = {Path(f"{step}"): start + timedelta(hours=5 * hour) for step, hour in enumerate(hours)}
    gone = expired(saved_at, CheckpointOptions(keep=keep, keep_daily=keep_daily))
    order = list(saved_at)
    for number, path in enumerate(order):
        of_its_day = [other for other in order if saved_at[other].date() == saved_at[path].date()]
        last = keep_daily and path == of_its_day[-1]
        assert (path in gone) == (number < len(order) - keep and not last)


def cut_short(path: Path) -> None:
    data = path / "__0_0.distcp"
    os.truncate(data, data.stat().st_size // 2)


@pytest.mark.parametrize(
    "harm",
    [
        cut_short,
        lambda path: (path / ".metadata").unlink(),
        lambda path: (path / ".metadata").write_bytes(b"\x80\x04."),
        lambda path: (path / "state.json").write_text("{"),
        lambda path: (path / "__0_0.distcp").unlink(),
    ],
)
def test_a_damaged_one_is_passed_over(
    harm: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizers = trained(1)
    checkpoints = opened(tmp_path)
    good = save_now(checkpoints, 1, model, optimizers)
    bad = save_now(checkpoints, 2, model, optimizers)
    assert not damage(bad)
    harm(bad)
    assert checkpoints.latest() == good
    assert f"{bad} is passed over" in capsys.readouterr().err
    shutil.rmtree(good)
    assert checkpoints.latest() is None


def test_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    model, optimizers = trained(1)
    path = save_now(opened(tmp_path), 1, model, optimizers)
    cut_short(path)
    assert save_now(opened(tmp_path), 1, model, optimizers) == path
    assert not damage(path)


def test_only_what_is_trained_is_saved(tmp_path: Path) -> None:
    model, _ = make()
    model.requires_grad_(False)
    model.layers[0].key.requires_grad_(True)
    optimizers = optimize(model)
    take_step(model, optimizers, 0)
    path = save_now(opened(tmp_path), 1, model, optimizers)
    assert set(FileSystemReader(path).read_metadata().state_dict_metadata) == {
        "model.layers.0.key.weight",
        "optimizer.layers.0.key.weight.momentum_buffer",
    }
    other, _ = make(seed=1)
    with pytest.raises(TrainError, match=r"differ in \d+ trained parameters, such as embedding\.weight"):
        opened(tmp_path).load(path, other, optimize(other))


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    model, optimizers = trained(1)
    path = save_now(opened(tmp_path), 1, model, optimizers)
    model.head = nn.Linear(6, 4, bias=False)
    with pytest.raises(TrainError, match=r"differ in 1 trained parameters, such as head\.weight"):
        opened(tmp_path).load(path, model, optimize(model))


def test_what_was_abandoned_is_removed(tmp_path: Path) -> None:
    (tmp_path / "step-000005.incomplete").mkdir()
    (tmp_path / "step-000005.incomplete" / "__0_0.distcp").write_bytes(b"half")
    assert opened(tmp_path).latest() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [8, 512])  # the write fails at the end of the file, or amid a tensor
def test_a_full_disk_does_not_stop_a_run(width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = make()
    model.extra = nn.Parameter(torch.ones(width, width))
    optimizers = optimize(model)
    checkpoints = opened(tmp_path)
    checkpoints.save(1, model, optimizers, VALUES)
    checkpoints._settle(wait=True)
    for step in (2, 3):
        with files_of_at_most(4096):
            checkpoints.save(step, model, optimizers, VALUES)
            checkpoints._settle(wait=True)
        assert checkpoints.failures == step - 1
        error = capsys.readouterr().err
        assert f"not saved, training goes on: {tmp_path}/step-00000{step}: OSError: [Errno 27] File too large" in error
        assert "bytes free there" in error
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoints.latest() == tmp_path / "step-000001"
    checkpoints.save(4, model, optimizers, VALUES)
    checkpoints.finish()
    assert checkpoints.failures == 0
    assert checkpoints.latest() == tmp_path / "step-000004"


def test_a_disk_that_stays_full_stops_a_run(tmp_path: Path) -> None:
    model, optimizers = trained(1)
    checkpoints = opened(tmp_path)
    with files_of_at_most(4096):
        for step in (1, 2, 3):
            checkpoints.save(step, model, optimizers, VALUES)
        with pytest.raises(TrainError, match=r"3 checkpoints in succession .*step-000003.*File too large.*make room"):
            checkpoints.save(4, model, optimizers, VALUES)
    assert checkpoints.failures == 3


def test_a_failure_of_the_last_save_is_an_error(tmp_path: Path) -> None:
    model, optimizers = trained(1)
    checkpoints = opened(tmp_path)
    with files_of_at_most(4096), pytest.raises(TrainError, match=r"last checkpoint was not saved.*File too large"):
        save_now(checkpoints, 1, model, optimizers)


def test_values_must_be_plain(tmp_path: Path) -> None:
    model, optimizers = trained(1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        opened(tmp_path).save(1, model, optimizers, {"tokens": torch.ones(1)})


KILLED = """
import os, sys
from pathlib import Path
from tests.train.test_checkpoints import VALUES, opened, trained

checkpoints = opened(Path(sys.argv[1]))
checkpoints.save(1, *trained(1), VALUES)
checkpoints._settle(wait=True)

def hang(descriptor):
    print("writing", flush=True)
    sys.stdin.read()

os.fsync = hang
checkpoints.save(2, *trained(2), VALUES)
checkpoints.finish()
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # their number decides the last bits
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002.incomplete"]
    checkpoints = opened(tmp_path)
    latest = checkpoints.latest()
    assert latest == tmp_path / "step-000001"
    found, others = make(seed=1)
    checkpoints.load(latest, found, others)
    assert equal(found, trained(1)[0])
    assert json.loads((latest / "state.json").read_text())["step"] == 1
