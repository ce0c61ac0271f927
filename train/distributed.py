"""One process or many: `torchrun` sets the environment, FSDP2 divides the model, and the loop does not notice."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from train.model import Model


@dataclass(frozen=True, slots=True)
class World:
    """This process among all: `rank` of `size`, and where it computes."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """On standard error, once."""
        if self.leads:
            print(f"train: {text}", file=sys.stderr)

    def wait(self) -> None:
        """For all processes."""
        if self.size > 1:
            dist.barrier()

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value summed over all processes, in one exchange."""
        given = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])
        if self.size > 1:
            dist.all_reduce(given)
        found: list[float] = given.tolist()
        return found

    def autocast(self, dtype: torch.dtype) -> torch.autocast:
        """Products in `dtype` and parameters in float32; nothing for float32."""
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def shard(self, model: Model) -> None:
        """Divide parameters, gradients and optimizer state over all processes (FSDP2), layer by layer."""
        model.to(self.device)
        if self.mesh is not None:
            for layer in model.layers:
                fully_shard(layer, mesh=self.mesh)
            fully_shard(model, mesh=self.mesh)


@contextmanager
def joined() -> Iterator[World]:
    """The processes that `torchrun` started, NCCL on GPUs and gloo on CPUs; alone without `torchrun`."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World(0, 1, device, None)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        yield World(dist.get_rank(), dist.get_world_size(), device, mesh)
    finally:
        dist.destroy_process_group()
