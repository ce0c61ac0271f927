"""The registry's commands: publish, trial, promote, reject, rollback, fetch, history, verify."""

from __future__ import annotations

import getpass
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.registry import Registry
from proto.manifest import load
from proto.registry import ROLES, Movement, RegistryError
from train.flags import option

Options = Any  # one of the dataclasses below


def version_argument(default: str, text: str) -> Any:
    return field(default=default, metadata={"help": text, "parse": str, "positional": True})


def key_option() -> Any:
    return option("", "PEM file; the version must have been signed with its private key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    registry: str = option("data/registry", "folder, or URL that fsspec has a driver for")


@dataclass(frozen=True, slots=True, kw_only=True)
class Move(Place):
    by: str = option("", "who makes the movement (default: the user's name)")
    why: str = option("by hand", "the reason, for the history")

    @property
    def who(self) -> str:
        return self.by or getpass.getuser()


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish(Move):
    artifact: Path = field(metadata={"help": "artifact directory", "parse": Path, "positional": True})
    key: str = option("", "PEM file of an elliptic-curve private key to sign with; needs model-signing")
    share: float = option(0.0, "put it on trial with this share of the traffic; 0: publish only", least=0, most=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial(Move):
    version: str = version_argument("candidate", "beginning of a digest, or a role")
    share: float = option(0.1, "of the traffic that it gets", least=0, most=1)
    public_key: str = key_option()


@dataclass(frozen=True, slots=True, kw_only=True)
class Promote(Move):
    version: str = version_argument("candidate", "beginning of a digest, or a role")
    public_key: str = key_option()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject(Move):
    version: str = version_argument("candidate", "beginning of a digest, or a role")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback(Move):
    version: str = version_argument("current", "the version to leave; refused if another one is current by now")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify(Place):
    version: str = version_argument("all", "beginning of a digest, a role, or all that are published")
    public_key: str = key_option()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch(Place):
    version: str = version_argument("current", "beginning of a digest, or a role")
    output: Path = field(
        default=Path("model"), metadata={"help": "folder to make of it", "parse": Path, "positional": True}
    )
    public_key: str = key_option()


def publish(options: Publish) -> int:
    registry = Registry(options.registry)
    key = Path(options.key) if options.key else None
    version = registry.publish(options.artifact, by=options.who, why=options.why, key=key)
    print(f"{options.artifact} is version {version} of {options.registry}" + (", signed" if key else ""))
    if options.share:
        registry.move("canary", version, by=options.who, why=options.why, share=options.share)
        say(registry)
    return 0


def trial(options: Trial) -> int:
    registry, version = verified(options)
    registry.move("canary", version, by=options.who, why=options.why, share=options.share)
    return say(registry)


def promote(options: Promote) -> int:
    registry, version = verified(options)
    registry.move("promote", version, by=options.who, why=options.why)
    return say(registry)


def reject(options: Reject) -> int:
    registry = Registry(options.registry)
    registry.move("reject", registry.resolve(options.version), by=options.who, why=options.why)
    return say(registry)


def rollback(options: Rollback) -> int:
    registry = Registry(options.registry)
    version = registry.resolve(options.version)
    if (before := registry.state().line[-2:-1]) and version == registry.state().current:
        registry.verify(before[0])  # to leave for a damaged version would be worse
    registry.move("rollback", version, by=options.who, why=options.why)
    return say(registry)


def history(options: Place) -> int:
    registry = Registry(options.registry)
    movements = registry.history()
    if not movements:
        raise RegistryError(f"nothing was ever published to {options.registry}; give another --registry, or publish")
    for movement in movements:
        print(line(movement))
    return say(registry)


def verify(options: Verify) -> int:
    registry = Registry(options.registry)
    key = Path(options.public_key) if options.public_key else None
    everything = sorted(registry.settle().published)
    if not everything:
        raise RegistryError(f"nothing was ever published to {options.registry}; give another --registry, or publish")
    versions = everything if options.version == "all" else [registry.resolve(options.version)]
    problems = []
    for version in versions:
        try:
            registry.verify(version, key)
            print(f"{version[:12]} is whole" + (f" and signed with {key}" if key else ""))
        except RegistryError as error:
            problems.append(str(error))
    if problems:
        raise RegistryError("\n".join(problems))
    return 0


def fetch(options: Fetch) -> int:
    if options.output.exists():
        raise RegistryError(f"{options.output} is there already; give another folder, or remove it")
    registry, version = verified(options)
    temporary = options.output.with_name(f".{options.output.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process left it
    with registry.open(version) as folder:
        shutil.copytree(folder, temporary)
    load(temporary)
    temporary.rename(options.output)
    print(f"{options.output} is version {version}")
    return 0


def verified(options: Trial | Promote | Fetch) -> tuple[Registry, str]:
    """The registry and the version, which is whole and, if asked for, signed."""
    registry = Registry(options.registry)
    version = registry.resolve(options.version)
    registry.verify(version, Path(options.public_key) if options.public_key else None)
    return registry, version


def say(registry: Registry) -> int:
    pointers = registry.state().pointers()
    for role in ROLES:
        if pointer := pointers[role]:
            share = f" with {pointer.share:.0%} of the traffic" if role == "candidate" else ""
            print(f"{role:10}{pointer.version[:12]}{share}, since {pointer.since} by {pointer.by}: {pointer.why}")
    return 0


def line(movement: Movement) -> str:
    share = f" {movement.share:.0%}" if movement.action == "canary" else ""
    return f"{movement.time}  {movement.action + share:12}  {movement.version[:12]}  {movement.by}: {movement.why}"


COMMANDS = {
    "publish": (Publish, publish),
    "trial": (Trial, trial),
    "promote": (Promote, promote),
    "reject": (Reject, reject),
    "rollback": (Rollback, rollback),
    "fetch": (Fetch, fetch),
    "history": (Place, history),
    "verify": (Verify, verify),
}
