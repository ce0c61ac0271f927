"""`python -m bench.simulated_device FILE STEP_MS HOW ARGUMENTS...`: `python -m serve` on a device that is not there.

The device takes the same time for every run, computes nothing, and of each row finds the same tokens the likeliest, so
what is left is what the server itself does. HOW is `ahead`, or `waits`: for the host's choice, before every run.
FILE gets, when the server ends, for how many runs all slots decoded, and how much of that time the device was busy.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from proto.manifest import Manifest
from serve import loader
from serve.__main__ import main as serve
from serve.choices import Block, Choices
from serve.forms import make_scheduler
from serve.native_runner import NUM_CANDIDATES
from serve.plan import Output, Plan, Runner
from serve.scheduler import Scheduler
from serve.settings import Settings
from serve.slot_cache import SlotCache

CHUNK = 512


class SimulatedRunner(Runner):
    """Runs end one after the other, each `seconds` after it could begin."""

    kv_bytes = 0
    any_chunking = False

    def __init__(self, seconds: float, num_slots: int, vocab_size: int) -> None:
        rows = 2 * num_slots
        self._seconds = seconds
        self._num_slots = num_slots
        ordinary = np.arange(vocab_size // 4, vocab_size // 2, dtype=np.int32)  # specials lie at the ends
        first = np.random.default_rng(0).choice(ordinary, rows)
        best = np.arange(NUM_CANDIDATES, dtype=np.int32)
        weights = np.tile(-best.astype(np.float32), (rows, 1))
        total = np.full(rows, np.exp(weights[0]).sum(), np.float32)
        logits, hidden = np.zeros((rows, vocab_size), np.float32), np.zeros((0, 1), np.float32)
        self._found = Output(logits, hidden, range(rows), first[:, None] + best, total, weights, first)
        self._free_at = 0.0  # when the device has done what it was given
        self.full_runs = 0
        self.full_seconds = 0.0

    def run(self, plan: Plan) -> Output:
        return self.launch(plan)()

    def launch(self, plan: Plan) -> Callable[[], Output]:
        before, now = self._free_at, time.perf_counter()
        self._free_at = end = max(now, before) + self._seconds
        wanted = len(plan.wanted)
        if wanted == self._num_slots and before:
            self.full_runs += 1
            self.full_seconds += end - before

        def results() -> Output:
            time.sleep(max(end - time.perf_counter(), 0))
            return replace(self._found, rows=range(wanted))

        return results

    def document(self) -> dict[str, float]:
        return {"full_runs": self.full_runs, "busy": self.full_runs * self._seconds / (self.full_seconds or 1)}


class SimulatedForm:
    """In place of those in serve/forms.py."""

    shares = False
    max_slots = 256

    def __init__(self, seconds: float, *, ahead: bool) -> None:
        self.phrase = f"a device that takes {1e3 * seconds:g} ms"
        self._seconds = seconds
        self._ahead = ahead
        self.runner: SimulatedRunner | None = None

    def block(self, manifest: Manifest, max_context: int) -> Block:
        return Block(max_context, max_context, manifest.kv_cache)

    def open(self, directory: Path, threads: int) -> Any:
        return None

    def build(self, session: Any, manifest: Manifest, settings: Settings, choices: Choices) -> tuple[Runner, Scheduler]:
        slots = choices.num_slots
        self.runner = SimulatedRunner(self._seconds, slots, manifest.architecture.vocab_size)
        self.runner.guesses = self._ahead
        cache = SlotCache(slots, choices.max_context, CHUNK)
        return self.runner, make_scheduler(self.runner, cache, settings, choices, CHUNK)


def main() -> int:
    path, milliseconds, how, *arguments = sys.argv[1:]
    form = SimulatedForm(float(milliseconds) / 1e3, ahead=how == "ahead")
    vars(loader)["pick"] = lambda wanted, manifest, device: form
    sys.argv = ["serve", *arguments]
    status = serve()
    assert form.runner is not None
    Path(path).write_text(json.dumps(form.runner.document()))
    return status


if __name__ == "__main__":
    sys.exit(main())
