"""Training: ours against transformers.Trainer, on the same model, data and processors, in one run.

Both learn from the same documents with AdamW in the same precision, each in a process of its own, one after the other,
several rounds. Two cases: `pretrain`, long documents that Trainer gets in ready rows of the context's length (the
usual `group_texts`), and `finetune`, chat pairs of uneven length that Trainer pads to the longest of the batch. What
counts is tokens of the data per second (padding is not data) over the steps after the first two, and peak memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import describe

WARM_UP = 2
CASES = {"pretrain": "next-token", "finetune": "sft"}


def ours(args: argparse.Namespace, case: str, folder: Path) -> dict[str, float]:
    output = folder / "run"
    command = [sys.executable, "-m", "train", "run", str(args.checkpoint), "--data", str(data_of(args, case))]
    command += ["--output", str(output), "--objective", CASES[case], "--context", str(args.context)]
    command += ["--batch", str(args.batch), "--steps", str(args.steps), "--optimizer", "adamw", "--tracker", "none"]
    command += ["--precision", "float32", "--learning-rate", "1e-5", "--cache", str(args.cache / case)]
    peak = peak_of(command)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line and line["step"] > WARM_UP]
    return {"tokens_per_second": rate([(line["batch_tokens"], line["seconds"]) for line in steps]), "peak_bytes": peak}


def theirs(args: argparse.Namespace, case: str, folder: Path) -> dict[str, float]:
    output = folder / "steps.json"
    command = [sys.executable, "-m", "bench.transformers_trainer", str(args.checkpoint), str(data_of(args, case))]
    command += ["--case", case, "--context", str(args.context), "--batch", str(args.batch)]
    command += ["--steps", str(args.steps), "--out", str(output)]
    peak = peak_of(command)
    steps = json.loads(output.read_text())[WARM_UP:]
    return {"tokens_per_second": rate(steps), "peak_bytes": peak}


SYSTEMS = {"transformers.Trainer": theirs, "pawl": ours}


def data_of(args: argparse.Namespace, case: str) -> Path:
    found: Path = getattr(args, case)
    return found


def rate(steps: list[tuple[float, float]]) -> float:
    return sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)


def peak_of(command: list[str]) -> int:
    """Run it to its end; the largest resident memory it had, in bytes."""
    program = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *command], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    top.add_argument("--checkpoint", type=Path, default=Path("models/base"), help="(default: %(default)s)")
    top.add_argument("--pretrain", type=Path, required=True, help="JSONL of text")
    top.add_argument("--finetune", type=Path, required=True, help="JSONL of messages")
    top.add_argument("--context", type=int, default=512, help="(default: %(default)s)")
    top.add_argument("--batch", type=int, default=8, help="rows or conversations in a step (default: %(default)s)")
    top.add_argument("--steps", type=int, default=6, help=f"the first {WARM_UP} do not count (default: %(default)s)")
    top.add_argument("--rounds", type=int, default=3, help="the median counts (default: %(default)s)")
    top.add_argument("--out", type=Path, required=True)
    return top


def main() -> int:
    args = parser().parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="pawl-bench-") as temporary:
        args.cache = Path(temporary) / "cache"
        for case in CASES:
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
            for number in range(args.rounds):
                for name, measure in SYSTEMS.items():
                    folder = Path(temporary) / f"{case}-{number}-{name}"
                    folder.mkdir()
                    rounds[name].append(measure(args, case, folder))
                    print(case, name, rounds[name][-1], file=sys.stderr)
            for name, found in rounds.items():
                row = {key: statistics.median(line[key] for line in found) for key in found[0]}
                results.append({"case": case, "system": name, **row, "rounds": found})
            first, second = results[-2:]
            print(
                f"{case}: {second['tokens_per_second'] / first['tokens_per_second']:.2f} times {first['system']}, "
                f"{second['peak_bytes'] / first['peak_bytes']:.2f} of its memory"
            )
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("cache", "out")}
    report = {"machine": describe(), "settings": settings, "results": results}
    args.out.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
