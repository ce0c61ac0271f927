"""`python -m train COMMAND`: each command is a module with `configure(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import importlib
import sys

from train.errors import TrainError

COMMANDS = {
    "dataset": ("train.dataset", "make a data set that needs no network"),
    "curate": ("train.curate", "filter, de-duplicate, redact and decontaminate text"),
    "tokenizer": ("train.bpe", "train a byte-level BPE tokenizer"),
    "init": ("train.fresh", "make a checkpoint with random weights"),
    "run": ("train.run", "train or finetune a checkpoint"),
    "eval": ("train.evaluation.command", "judge a checkpoint or a running server"),
    "plan": ("train.plan", "what a run will need: parameters, FLOPs, memory, hours, cost"),
}
EXIT_USAGE = 2


def parser(*names: str) -> argparse.ArgumentParser:
    """With the flags of the commands `names`; the modules of the others are not imported."""
    top = argparse.ArgumentParser(prog="python -m train", description="From data to a checkpoint.")
    commands = top.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in names:
            importlib.import_module(module).configure(command)
    return top


def main() -> int:
    arguments = sys.argv[1:]
    args = parser(*arguments[:1]).parse_args()
    try:
        code: int = importlib.import_module(COMMANDS[args.command][0]).run(args)
    except (TrainError, OSError) as error:
        print(f"train: {error}", file=sys.stderr)
        return EXIT_USAGE
    return code


if __name__ == "__main__":
    sys.exit(main())
