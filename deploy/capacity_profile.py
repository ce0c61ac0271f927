"""What a replica of some size costs in time: the file that `python -m bench.step_cost` writes and `plan` reads.

It holds how the engine was set up, so that the same scheduler and cache can be made again without a model, and how long
its turns took.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from deploy.errors import DeployError
from deploy.step_model import Fit, StepModel
from serve.block_cache import BlockCache
from serve.cache import Cache
from serve.scheduler import Scheduler
from serve.slot_cache import SlotCache

FORMAT = 1


class EngineShape(msgspec.Struct, frozen=True, kw_only=True):
    """An engine as far as policy goes. `num_blocks`: of the cache, each of 64 tokens, or 0 if a slot is the block."""

    max_running: int
    max_queue: int
    prefill_chunk: int
    any_chunking: bool
    itl_limit: float
    capacity: int  # tokens of a request
    num_blocks: int

    def scheduler(self) -> Scheduler:
        """The server's own, empty. It drafts nothing: what drafts are worth depends on the text."""
        cache: Cache
        if self.num_blocks:
            cache = BlockCache(self.num_blocks, self.capacity)
        else:
            cache = SlotCache(self.max_running, self.capacity, self.prefill_chunk)
        return Scheduler(
            cache,
            max_running=self.max_running,
            max_queue=self.max_queue,
            prefill_chunk=self.prefill_chunk,
            any_chunking=self.any_chunking,
            itl_limit=self.itl_limit,
            speculate=False,
        )


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`front_seconds`: what a first token spends outside the engine, from the client's send to its first byte."""

    format: int
    name: str  # of the artifact
    digest: str
    about: str  # what the server says of itself at start
    processors: int
    engine: EngineShape
    front_seconds: float
    model: StepModel
    fit: Fit
    machine: dict[str, Any]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def load(path: Path) -> Profile:
    """Raises DeployError for a file that is none, or of another format."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Profile)
    except (msgspec.MsgspecError, OSError) as error:
        raise DeployError(
            f"{path} cannot be read as a profile: {error}; make one with python -m bench.step_cost"
        ) from error
    if found.format != FORMAT:
        raise DeployError(f"{path} has format {found.format} and {FORMAT} is read; measure again")
    return found
