"""Two processes with FSDP2 over gloo get the weights of one, and each can go on from the other's checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.train.small import make, optimize, take_step
from train.checkpoints import CheckpointOptions, Checkpoints
from train.errors import TrainError
from train.muon import Muon

PROCESSES = 2
OPTIONS = CheckpointOptions(save_every_steps=0, save_every_minutes=1)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.named_parameters()
    }


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))

    def sharded() -> nn.Module:
        model, _ = make()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model = sharded()
    optimizers = optimize(model)
    checkpoints = Checkpoints(folder / "two", OPTIONS)
    for step in range(4):
        take_step(model, optimizers, step, rank, PROCESSES)
        if checkpoints.due(step, 61.0 * step if rank == 0 else 0):  # process 0's clock counts
            checkpoints.save(step, model, optimizers, {"rank": rank})
            checkpoints._settle(wait=True)
    checkpoints.finish()
    weights = whole(model)

    model = sharded()
    optimizers = optimize(model)
    found = Checkpoints(folder / "one", OPTIONS).load(folder / "one" / "step-000001", model, optimizers)
    for step in (2, 3):
        take_step(model, optimizers, step, rank, PROCESSES)
    resumed = whole(model)
    if rank == 0:
        torch.save({"weights": weights, "resumed": resumed, "found": found}, folder / "result")

    # A full disk of one process is every process's failed save.
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    broken = Checkpoints(folder / "full", OPTIONS)
    if rank == 1:
        os.fsync = full
    broken.save(9, model, optimizers, {})
    broken._settle(wait=True)
    assert broken.failures == 1
    assert "No space left" in broken._problem
    dist.barrier()
    assert not list((folder / "full").iterdir())
    with pytest.raises(TrainError, match="No space left"):
        broken.finish()
    by_columns = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    by_columns.grad = torch.zeros_like(by_columns)
    optimizer = Muon([by_columns], lr=0.1, momentum=0.9, weight_decay=0.0)
    with pytest.raises(TrainError, match="divided by rows once"):
        optimizer.step()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    model, optimizers = make()
    alone = Checkpoints(tmp_path / "one", OPTIONS)
    for step in range(4):
        take_step(model, optimizers, step)
        if step == 1:
            alone.save(step, model, optimizers, {"alone": True})
            alone.finish()
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=PROCESSES)

    expected = whole(model)
    result = torch.load(tmp_path / "result")
    assert result["found"] == (1, {"alone": True})
    for name, value in expected.items():
        torch.testing.assert_close(result["weights"][name], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(result["resumed"][name], value, atol=1e-5, rtol=1e-4)

    # Two saved, one goes on. Without torchrun there is one process and no group.
    assert [path.name for path in sorted((tmp_path / "two").iterdir())] == ["step-000001", "step-000002", "step-000003"]
    model, optimizers = make(seed=1)
    checkpoints = Checkpoints(tmp_path / "two", OPTIONS)
    assert checkpoints.load(tmp_path / "two" / "step-000001", model, optimizers) == (1, {"rank": 0})
    for step in (2, 3):
        take_step(model, optimizers, step)
    for name, value in whole(model).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)
    latest = checkpoints.latest()
    assert latest is not None
    checkpoints.load(latest, model, optimizers)
    for name, value in whole(model).items():
        assert torch.equal(value, result["weights"][name])
