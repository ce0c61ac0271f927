"""`python -m deploy COMMAND`: each module has COMMANDS, a dataclass of options and a function of it for each name."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any

from deploy.errors import DeployError
from proto.manifest import ManifestError
from proto.registry import RegistryError
from train.errors import TrainError
from train.flags import add_flags, from_flags

COMMANDS = {
    "publish": ("deploy.commands", "copy an artifact into the registry, as a version that never changes"),
    "trial": ("deploy.commands", "give a version a share of the traffic, as the candidate"),
    "canary": ("deploy.canary", "judge the version on trial by its answers, and promote, reject or roll back"),
    "promote": ("deploy.commands", "make a version current"),
    "reject": ("deploy.commands", "end the candidate's trial"),
    "rollback": ("deploy.commands", "go back to the version before the current one"),
    "fetch": ("deploy.commands", "copy a version out of the registry, verified"),
    "history": ("deploy.commands", "who moved what, when and why"),
    "snapshot": ("deploy.snapshot", "take feedback and what it judges out of the records, into Parquet"),
    "dataset": ("deploy.dataset", "make examples of a snapshot's feedback"),
    "retrain": ("deploy.retrain", "from feedback to a candidate on trial: go on with the cycle, or begin one"),
    "lineage": ("deploy.ancestry", "what a version was made from, down to what people said"),
    "verify": ("deploy.commands", "check versions' digests and signatures, and the pointers"),
    "plan": ("deploy.capacity", "how many replicas a stream of requests needs, and what they cost"),
    "render": ("deploy.render", "print the Kubernetes manifests of an overlay, with components"),
    "check": ("deploy.check", "validate the manifests of all overlays with all combinations of components"),
    "image build": ("deploy.image", "build an image, and say what is in it"),
    "image push": ("deploy.image", "push an image, and print its digest"),
    "image run": ("deploy.image", "run the server's image, hardened"),
    "image verify": ("deploy.image", "run it, ask it by HTTP and gRPC, and stop it with requests in flight"),
}
EXIT_USAGE = 2


def parser(*names: str) -> argparse.ArgumentParser:
    """With the flags of the commands `names`; the modules of the others are not imported."""
    top = argparse.ArgumentParser(prog="python -m deploy", description="Versions: kept, tried, served, improved.")
    commands = top.add_subparsers(required=True)
    groups: dict[str, Any] = {"": commands}
    for name, (_, text) in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in groups:
            groups[group] = commands.add_parser(group, help=f"{group}s").add_subparsers(required=True)
        command = groups[group].add_parser(word, help=text, description=text)
        command.set_defaults(command=name)
        if name in names:
            add_flags(command, find(name)[0])
    return top


def find(name: str) -> tuple[type, Callable[[Any], int]]:
    """A command's options, and the function that takes them and returns the exit status."""
    found: tuple[type, Callable[[Any], int]] = importlib.import_module(COMMANDS[name][0]).COMMANDS[name]
    return found


def main() -> int:
    arguments = sys.argv[1:]
    args = parser(*arguments[:1], " ".join(arguments[:2])).parse_args()
    options, run = find(args.command)
    try:
        return run(from_flags(options, args))
    except (DeployError, RegistryError, ManifestError, TrainError, OSError) as error:
        print(f"deploy: {error}", file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
