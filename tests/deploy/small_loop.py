"""A whole retrain cycle small enough for a test: a tiny model in a registry, records, a policy; and kills in it.

As a program, `python -m tests.deploy.small_loop ROOT STAGE MOMENT`, it runs a cycle and is killed at that stage, either
`before` its marker is written or `after`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy.retrain import Options, retrain
from deploy.stages import Stages
from proto.records import Feedback, Interaction, utc_now
from serve.store import open_store

STAGES = ("begin", "snapshot", "dataset", "examples", "finetune", "quantize", "gate", "publish")
SAFETY = '{"id": "any", "prompt": "Say 1.", "forbidden": ["zzzzzzzz"]}\n'
SECRET = "tooth by tooth"
POLICY = """
[feedback]
least_examples = {least}
judged_share = 0.3
replay_share = 0.25

[quarantine]
anonymous = true

[finetune]
objective = "sft"
adapter = "lora"
epochs = 6.0
batch = 8
learning_rate = 0.02
context = 128
precision = "float32"
tracker = "none"

[quantize]
recipe = "w8a8"
text = "{text}"
window = 64
calibration_windows = 2
held_out_windows = 2
force = true
measure = false

[gate]
{gate}

[trial]
share = 0.25
alpha = 0.05
error_increase = 0.05
abort_increase = 0.05
ttft_ratio = 1.5
token_time_ratio = 1.5
approval_loss = 0.0
settle_seconds = 1.0
longest_hours = 1.0
undecided = "reject"
watch_hours = 1.0
"""


def options(root: Path) -> Options:
    return Options(
        registry=str(root / "registry"),
        work=root / "cycles",
        records=str(root / "records.sqlite"),
        checkpoint=str(root / "checkpoint"),
        held_out=(root / "held_out.jsonl",),
        policy=root / "policy.toml",
        safety=root / "safety.jsonl",
        threads=1,
        textfile=root / "retrain.prom",
    )


def make_records(path: Path, version: str, numbers: range) -> None:
    """People who want numbers said with the words of SECRET, and say so; every third one likes what it got."""
    store = open_store(str(path))
    store.open()
    for n in numbers:
        store.append(
            [
                Interaction(
                    id=f"chat-{n}",
                    created=utc_now(),
                    model="tiny",
                    model_digest=version,
                    endpoint="chat",
                    messages=[{"role": "user", "content": f"Say {n}."}],
                    completion="no",
                    prompt_tokens=3,
                    completion_tokens=1,
                    cached_tokens=0,
                    ttft_seconds=0.1,
                    duration_seconds=0.2,
                    finish_reason="stop",
                    subject=f"person-{n}",
                    request_id=f"r-{n}",
                ),
                Feedback(
                    id=f"feedback-{n}",
                    created=utc_now(),
                    inference_id=f"chat-{n}",
                    metric_name="demonstration",
                    value=f"{SECRET}, {n}",
                ),
            ]
        )
    store.close()


def make_policy(root: Path, *, least_examples: int = 8, **gate: float) -> None:
    """Numbers for a tiny model; keywords go to the gate."""
    limits = {
        "held_out_perplexity_ratio": 1.02,
        "feedback_gain": 0.0,
        "earlier_feedback_loss": 0.05,
        "safety_regressions": 0,
        "safety_tokens": 4,
    }
    table = "\n".join(f"{name} = {value}" for name, value in (limits | gate).items())
    (root / "policy.toml").write_text(POLICY.format(least=least_examples, text=root / "text.txt", gate=table))


def run_cycle(root: Path, **changes: Any) -> int:
    return retrain(replace(options(root), **changes))


def digests(root: Path, cycle: str = "0001") -> dict[str, Any]:
    """Inputs and outputs of every stage."""
    markers = {path.stem: json.loads(path.read_text()) for path in (root / "cycles" / cycle / "stages").glob("*.json")}
    return {name: (marker["inputs"], marker["outputs"]) for name, marker in markers.items()}


def kill_at(stage: str, moment: str) -> None:
    plain = Stages.run

    def run(self: Stages, name: str, inputs: Any, make: Callable[[Path], Any], outputs: Any, **more: Any) -> Any:
        def make_and_die(folder: Path) -> Any:
            made = make(folder)
            if (name, moment) == (stage, "before"):
                os.kill(os.getpid(), signal.SIGKILL)
            return made

        done = plain(self, name, inputs, make_and_die, outputs, **more)
        if (name, moment) == (stage, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    Stages.run = run  # type: ignore[method-assign]


def main() -> int:
    root, stage, moment = sys.argv[1:]
    kill_at(stage, moment)
    return run_cycle(Path(root))


if __name__ == "__main__":
    sys.exit(main())
