"""`python -m bench.compression ARTIFACT...`: our artifacts beside what others make of the same checkpoint.

All read the same held-out text, and the float32 checkpoint is the reference for all: size of the weights, perplexity,
KL divergence and agreement with it, tokens a second of 1 and 16 streams. Prints a table, then the whole as JSON.

models/base comes from a GGUF of 4-bit blocks of 32 (Q4_1), so its weights lie on such a grid already. That flatters
whoever rounds to 4 bits by blocks of 32, llama.cpp most of all: on another model they would lose more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.contestants import Artifact, BitsAndBytes, Contestant, Llama, OnnxQuantizer, OpenVino
from bench.machine import describe as describe_machine
from bench.machine import without_folders
from compress.checkpoint import Checkpoint, Floats
from compress.corpus import make_corpus, sides_of
from compress.families import describe
from compress.quantize import Options
from compress.reference import Reference
from compress.scores import FIGURES, Measured, Table, measure, score_rows
from serve.machine import cpu_quota
from serve.tokenizer import Tokenizer

OTHERS = {
    "llama_cpp": ("Q8_0", "Q4_K_M", "Q4_0"),
    "openvino": ("int8", "int4"),
    "onnxruntime": ("int8 dynamic", "int4 nearest", "int4 k-quant"),
    "bitsandbytes": ("int8", "nf4"),
}
# Each is made of the checkpoint, the form, a folder for what it needs, and the number of threads.
KINDS: dict[str, Callable[[Path, str, Path, int], Contestant]] = {
    "llama_cpp": Llama,
    "openvino": OpenVino,
    "onnxruntime": OnnxQuantizer,
    "bitsandbytes": BitsAndBytes,
}
HEAD = ("system", "MB", "perplexity", "change", "95 % interval", "KL", "agrees", "1 stream", "16 streams")
NOTE = (
    "models/base holds weights that were rounded to 4 bits by blocks of 32 (Q4_1) before: that flatters 4-bit blocks, "
    "llama.cpp's most. llama.cpp's figures are those of its weights alone, in float32; its kernels also round "
    "activations to 8 bits by blocks."
)


@dataclass(frozen=True, slots=True)
class Result:
    """`problem` says why there are no figures."""

    name: str
    size_bytes: int = 0
    figures: Measured | None = None
    speeds: tuple[float, float] | None = None
    problem: str = ""


def judge(
    contestant: Contestant,
    windows: Sequence[Sequence[int]],
    expected: Sequence[Floats],
    exact: list[Table],
    timed: bool,
) -> Result:
    """What is not there or cannot run here is told in the result."""
    try:
        contestant.prepare()
        tables = []
        rows = contestant.log_probabilities(windows)
        for window, right, found in zip(windows, expected, rows, strict=True):
            tables.append(score_rows(right, found, np.asarray(window[1:])))
        speeds = contestant.speeds() if timed else None
        return Result(contestant.name, contestant.size_bytes(), measure(exact, tables, FIGURES), speeds)
    except Exception as error:  # one that fails, whatever of, is a line of the table
        return Result(contestant.name, problem=without_folders(" ".join(str(error).split()))[-300:])


def table(results: Sequence[Result], perplexity: float) -> str:
    """By size; those without figures last, with the reason."""
    lines: list[tuple[str, ...]] = [HEAD, ("float32", "", f"{perplexity:.3f}", "", "", "", "", "", "")]
    for found in sorted((x for x in results if x.figures), key=lambda x: -x.size_bytes):
        assert found.figures is not None
        value, bounds = found.figures.metrics, found.figures.intervals["perplexity_ratio"]
        lines.append(
            (
                found.name,
                f"{found.size_bytes / 1e6:.1f}",
                f"{value['perplexity']:.3f}",
                f"{100 * (value['perplexity_ratio'] - 1):+.2f} %",
                f"{100 * (bounds.low - 1):+.2f} to {100 * (bounds.high - 1):+.2f}",
                f"{value['kl']:.5f}",
                f"{100 * value['greedy_agreement']:.1f} %",
                *(f"{speed:.0f}" for speed in found.speeds or ()),
                *([] if found.speeds else ["", ""]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(
        line.rstrip() for line in [*shown, *(f"{x.name}: {x.problem}" for x in results if x.problem), NOTE]
    )


def document(found: Result) -> dict[str, Any]:
    shown: dict[str, Any] = (
        {"system": found.name, "problem": found.problem} if found.problem else {"system": found.name}
    )
    if found.figures:
        shown |= {"size_bytes": found.size_bytes, **found.figures.metrics}
        shown |= {f"{name}_interval": [x.low, x.high] for name, x in found.figures.intervals.items()}
    if found.speeds:
        shown |= dict(zip(("tokens_per_second_1", "tokens_per_second_16"), found.speeds, strict=True))
    return shown


def main() -> int:
    shared = Options()
    parser = argparse.ArgumentParser(prog="python -m bench.compression", description="Ours beside the peers' formats.")
    parser.add_argument("artifacts", type=Path, nargs="*", help="ours, of the checkpoint")
    parser.add_argument("--checkpoint", type=Path, default=Path("models/base"), help="(default: %(default)s)")
    parser.add_argument("--others", nargs="*", choices=OTHERS, default=list(OTHERS), help="(default: all)")
    parser.add_argument("--text", type=Path, help="as for `compress quantize`")
    parser.add_argument("--window", type=int, default=shared.window, help="(default: %(default)s)")
    parser.add_argument("--held-out-windows", type=int, default=shared.held_out_windows, help="(default: %(default)s)")
    parser.add_argument("--no-speed", dest="timed", action="store_false", help="leave the timing out")
    args = parser.parse_args()
    threads = cpu_quota()[0]
    contestants: list[Contestant] = [Artifact(path, threads) for path in args.artifacts]

    checkpoint = Checkpoint(args.checkpoint)
    _, texts = sides_of(args.text)
    held_out = make_corpus(
        texts, Tokenizer(args.checkpoint), "held-out", num_windows=args.held_out_windows, window=args.window
    )
    windows = held_out.windows
    reference = Reference(checkpoint, describe(checkpoint), windows, threads=threads)
    # [tokens - 1, vocabulary] of each window, made again for each contestant: all together may be more than memory.
    expected = Rows(reference, windows)
    exact = [score_rows(rows, rows, np.asarray(window[1:])) for window, rows in zip(windows, expected, strict=True)]
    perplexity = measure(exact, exact, FIGURES).metrics["perplexity"]
    with tempfile.TemporaryDirectory() as scratch:
        made = [(kind, form) for kind in args.others for form in OTHERS[kind]]
        contestants += [KINDS[kind](args.checkpoint, form, Path(scratch), threads) for kind, form in made]
        results = [
            judge(contestant, windows, expected, exact, args.timed)
            for contestant in tqdm(contestants, desc="systems", disable=None)
        ]
    print(table(results, perplexity))
    whole = {
        "machine": describe_machine(),
        "tokens": sum(len(window) - 1 for window in windows),
        "held_out": held_out.digest,
        "perplexity": perplexity,
        "note": NOTE,
        "results": [document(found) for found in results],
    }
    print(json.dumps(whole))
    return 0


class Rows(Sequence[Floats]):
    """A reference's log-probabilities by window, made when they are asked for."""

    def __init__(self, reference: Reference, windows: Sequence[Sequence[int]]) -> None:
        self._reference = reference
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, number: Any) -> Any:
        if number >= len(self):
            raise IndexError(number)
        return self._reference.log_probabilities(number, 0, len(self._windows[number]) - 1)


if __name__ == "__main__":
    sys.exit(main())
