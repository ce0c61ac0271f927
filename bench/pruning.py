"""`python -m bench.pruning`: what pruning costs, what distilling brings back, and what the smaller model is good for.

A share of the parameters goes (`compress prune`), and the rest learns from the whole model (`train run`, objective
distill) for so many steps, on the calibration side of the text that `compress quantize` uses. Held-out windows of the
other side judge the whole model, the pruned and the distilled one. Whole and distilled are then quantized and timed.
Each part is the command that a user would give, printed before it runs; what is there already is not made again.
The curve goes to OUTPUT/curve.svg, all figures to OUTPUT/pruning.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib.figure import Figure

from bench.machine import describe as describe_machine
from bench.plot import GREY, OURS, STYLE
from bench.pretrain_demo import call
from compress import speed
from compress.checkpoint import Checkpoint
from compress.corpus import make_corpus, sides_of
from compress.families import describe
from compress.prune import means
from compress.quantize import Options
from compress.reading import read
from compress.reference import Reference
from compress.runners import forms_here
from proto.manifest import WEIGHTS, load
from serve.machine import cpu_quota
from serve.tokenizer import Tokenizer
from train.export import TRAINING

CONTEXT = 512
ROUNDS = 7  # of timing: neighbours take a third of the machine's speed, for minutes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.pruning", description="Prune, distil, quantize, time.")
    parser.add_argument("--checkpoint", type=Path, default=Path("models/base"), help="(default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/pruning"), help="(default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the parameters (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="of distilling (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="rows of 512 tokens (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=6e-4, help="(default: %(default)s)")
    parser.add_argument("--no-speed", dest="timed", action="store_false", help="do not quantize and time")
    return parser.parse_args()


def write_texts(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def perplexities(checkpoint: Path, others: Sequence[Path]) -> tuple[float, list[dict[str, float]]]:
    """Of the checkpoint, and of the others with their KL from it, on the held-out windows of the gate."""
    options, (_, texts) = Options(), sides_of(None)
    windows = make_corpus(
        texts, Tokenizer(checkpoint), "held-out", num_windows=options.held_out_windows, window=options.window
    ).windows
    threads = cpu_quota()[0]

    def reading(path: Path) -> Reference:
        source = Checkpoint(path)
        return Reference(source, describe(source), windows, threads=threads)

    exact, scores = read(reading(checkpoint), {path.name: reading(path) for path in others}, windows)
    found = [means(tables) for tables in scores.values()]
    return means(exact)[0], [{"perplexity": p, "kl": kl} for p, kl in found]


def learning_curve(run: Path) -> list[dict[str, float]]:
    """By judgement during the run: steps, seconds of training so far, held-out perplexity and KL."""
    seconds, curve = 0.0, []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seconds += row.get("seconds", 0.0)
        if "held_out_kl" in row:
            perplexity = math.exp(row["held_out_cross_entropy"])
            curve.append({"step": row["step"], "seconds": seconds, "perplexity": perplexity, "kl": row["held_out_kl"]})
    return curve


def draw(curve: Sequence[dict[str, float]], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([row["seconds"] / 60 for row in curve], [row["perplexity"] for row in curve], "o-", color=OURS)
        axes.set_xlabel("minutes of distilling")
        axes.set_ylabel("perplexity of held-out text")
        axes.set_yscale("log")
        axes.grid(axis="y", color=GREY, alpha=0.2)
        figure.savefig(path, transparent=True, metadata={"Date": None})


def served(artifacts: dict[Path, Path], threads: int) -> list[dict[str, Any]]:
    """Of each checkpoint's w8a8 artifact its bytes, and what serving it takes: medians of rounds in turns."""
    for checkpoint, artifact in artifacts.items():
        if not artifact.exists():
            call("compress", "quantize", checkpoint, "-o", artifact, "--recipe", "w8a8", "--no-measure", "--force")
    manifests = [load(artifact) for artifact in artifacts.values()]
    rounds = [
        [
            speed.measure(artifact, manifest.architecture, forms_here(artifact)[0], threads)
            for artifact, manifest in zip(artifacts.values(), manifests, strict=True)
        ]
        for _ in range(ROUNDS)
    ]
    return [
        {
            "weights_bytes": manifest.files[WEIGHTS].size_bytes,
            "decode_milliseconds": median(cost.decode_milliseconds for cost in costs),
            "tokens_per_second_16": median(cost.tokens_per_second for cost in costs),
            "resident_bytes": median(cost.resident_bytes for cost in costs),
        }
        for manifest, costs in zip(manifests, zip(*rounds, strict=True), strict=True)
    ]


def main() -> int:
    args = parse()
    output: Path = args.output
    pruned, run = output / "pruned", output / "run"
    output.mkdir(parents=True, exist_ok=True)
    for name, texts in zip(("learn.jsonl", "held-out.jsonl"), sides_of(None), strict=True):
        write_texts(output / name, texts)
    if not pruned.exists():
        call("compress", "prune", args.checkpoint, "-o", pruned, "--ratio", str(args.ratio))
    call(
        *("train", "run", pruned, "-o", run, "--objective", "distill", "--teacher", args.checkpoint),
        *("--teacher-precision", "float32", "--data", output / "learn.jsonl"),
        *("--held-out", output / "held-out.jsonl", "--context", str(CONTEXT), "--batch", str(args.batch)),
        *("--steps", str(args.steps), "--learning-rate", str(args.learning_rate), "--eval-rows", "8"),
    )
    before, (cut, healed) = perplexities(args.checkpoint, [pruned, run / "model"])
    curve = learning_curve(run)
    draw(curve, output / "curve.svg")
    found: dict[str, Any] = {
        "machine": describe_machine(),
        "pruning": json.loads((pruned / TRAINING).read_text(encoding="utf-8"))["metrics"],
        "whole": {"perplexity": before},
        "pruned": cut,
        "distilled": healed,
        "recovered": (cut["perplexity"] - healed["perplexity"]) / (cut["perplexity"] - before),
        "distilling_seconds": curve[-1]["seconds"],
        "curve": curve,
    }
    if args.timed:
        threads = cpu_quota()[0]
        artifacts = {args.checkpoint: output / "whole-w8a8", run / "model": output / "distilled-w8a8"}
        for name, cost in zip(("whole", "distilled"), served(artifacts, threads), strict=True):
            found[name] |= cost
    (output / "pruning.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in found.items() if name not in ("curve", "machine")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
