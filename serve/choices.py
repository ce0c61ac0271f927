"""What the server decides by itself, and why: threads, context, slots. Printed at start."""

from __future__ import annotations

from dataclasses import dataclass

from proto.manifest import Manifest
from serve.machine import available_bytes, cpu_quota
from serve.settings import Settings

MIB = 1 << 20
MAX_SLOTS = 32  # more requests at once slow each one down without more tokens in total
MAX_CONTEXT = 2048
MAX_KV_MIB = 1024
KV_SHARE_OF_FREE = 4  # take at most 1/4 of free memory


class SettingsError(Exception):
    """The settings cannot be met; the message names the value, the limit and the cure."""


@dataclass(frozen=True, slots=True)
class Choices:
    threads: int
    threads_why: str
    max_context: int
    num_slots: int
    slots_why: str
    kv_bytes: int  # the cache's memory, all slots


def choose(settings: Settings, manifest: Manifest) -> Choices:
    """Fill in what the settings leave open. Raises SettingsError."""
    threads, threads_why = (settings.threads, "--threads") if settings.threads else cpu_quota()
    model_context = manifest.architecture.max_context
    if settings.max_context > model_context:
        raise SettingsError(
            f"--max-context {settings.max_context} is beyond the model's {model_context} tokens; ask for less"
        )
    max_context = settings.max_context or min(model_context, MAX_CONTEXT)
    slot_bytes = max_context * manifest.kv_bytes_per_token
    budget = settings.kv_budget_mib * MIB or min(available_bytes() // KV_SHARE_OF_FREE, MAX_KV_MIB * MIB)
    fitting = budget // slot_bytes
    num_slots = settings.slots or min(fitting, MAX_SLOTS)
    if num_slots < 1 or num_slots > fitting:
        raise SettingsError(
            f"{max(num_slots, 1)} slots of {max_context} tokens need {max(num_slots, 1) * slot_bytes // MIB} MiB of KV "
            f"cache and the budget is {budget // MIB} MiB; give a larger --kv-budget-mib, fewer --slots or a smaller "
            "--max-context"
        )
    why = "--slots" if settings.slots else "as many as the budget holds" if num_slots == fitting else "the most useful"
    return Choices(threads, threads_why, max_context, num_slots, why, num_slots * slot_bytes)
