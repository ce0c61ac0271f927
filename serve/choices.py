"""What the server decides by itself, and why: threads, context, slots. Printed at start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from proto.manifest import Manifest
from serve.device_memory import free_bytes
from serve.device_session import CURE, devices_of
from serve.machine import available_bytes, cpu_quota
from serve.settings import Settings

if TYPE_CHECKING:
    from serve.forms import Form

MIB = 1 << 20
MAX_CONTEXT = 2048
MAX_KV_MIB = 1024
KV_SHARE_OF_FREE = 4  # take at most 1/4 of free memory
KV_SHARE_OF_GPU = 2  # whose memory is for the model alone


class SettingsError(Exception):
    """The settings cannot be met; the message names the value, the limit and the cure."""


@dataclass(frozen=True, slots=True)
class Block:
    """What the KV cache is made of: so many tokens in so many bytes, for all layers, as numbers of this type."""

    tokens: int
    bytes: int
    type: str


@dataclass(frozen=True, slots=True)
class Choices:
    threads: int
    threads_why: str
    max_context: int
    num_slots: int
    slots_why: str
    block: Block
    num_blocks: int

    @property
    def kv_bytes(self) -> int:
        """The KV cache's memory."""
        return self.num_blocks * self.block.bytes


def kv_budget(settings: Settings) -> int:
    """Bytes of one version's KV cache. With a registry two versions are served at once, each from half the budget.

    On CUDA, those of each GPU. Raises SettingsError if one does not answer.
    """
    versions = 1 if settings.registry is None else 2
    if settings.kv_budget_mib:
        whole = settings.kv_budget_mib * MIB
    elif settings.device == "cpu":
        whole = min(available_bytes() // KV_SHARE_OF_FREE, versions * MAX_KV_MIB * MIB)
    else:
        try:
            whole = min(free_bytes(device) for device in devices_of(settings.device)) // KV_SHARE_OF_GPU
        except OSError as error:
            raise SettingsError(f"--device {settings.device} cannot be met: {error}. {CURE}") from error
    return whole // versions


def choose(settings: Settings, manifest: Manifest, form: Form, budget: int) -> Choices:
    """Fill in what the settings leave open; `budget`: bytes of the KV cache. Raises SettingsError."""
    threads, threads_why = (settings.threads, "--threads") if settings.threads else cpu_quota()
    model_context = manifest.architecture.max_context
    if settings.max_context > model_context:
        raise SettingsError(
            f"--max-context {settings.max_context} is beyond the model's {model_context} tokens; ask for less"
        )
    max_context = settings.max_context or min(model_context, MAX_CONTEXT)
    block = form.block(manifest, max_context)
    per_request = -(-max_context // block.tokens)  # blocks
    fitting = budget // block.bytes
    num_slots = settings.slots or max(1, min(fitting, form.max_slots))
    needed = per_request * (1 if form.shares else num_slots)
    if needed > fitting:
        raise SettingsError(
            f"{needed // per_request} slots of {max_context} tokens need {needed * block.bytes // MIB} MiB of KV "
            f"cache and the budget is {budget // MIB} MiB; give a larger --kv-budget-mib, fewer --slots or a smaller "
            "--max-context"
        )
    why = "--slots" if settings.slots else "as many as the budget holds" if num_slots == fitting else "the most useful"
    return Choices(
        threads, threads_why, max_context, num_slots, why, block, num_blocks=fitting if form.shares else needed
    )
