"""`python -m deploy lineage VERSION`: what a version was made from, and that, and that, down to what people said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deploy.commands import Place, version_argument
from deploy.registry import Registry
from proto.lineage import FolderLineage
from proto.manifest import Lineage
from proto.registry import Movement


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Place):
    version: str = version_argument("current", "beginning of a digest, or a role")


def lineage(options: Options) -> int:
    registry = Registry(options.registry)
    for line in describe(registry, registry.resolve(options.version)):
        print(line)
    return 0


def describe(registry: Registry, version: str) -> Iterator[str]:
    """Of the version, then of the one that it was finetuned from, and so on. A version is verified before it speaks."""
    history = registry.history()
    while version:
        manifest = registry.verify(version)
        yield f"version {version}  {manifest.name}, recipe {manifest.recipe.name}"
        yield from (f"  {told(m)}" for m in history if m.version == version)
        yield from made(manifest.lineage)
        ancestry = registry.ancestry(version)
        version = ""
        if ancestry is not None:
            yield from learnt(ancestry)
            version = ancestry.inputs["parent"]
            yield f"  finetuned from version {version}"


def told(movement: Movement) -> str:
    return f"{movement.time}  {movement.action:9} {movement.by}: {movement.why}"


def made(own: Lineage) -> Iterator[str]:
    yield f"  checkpoint {own.checkpoint}"
    yield from (f"  data {name:13} {digest}" for name, digest in own.datasets.items())
    yield f"  tools {', '.join(f'{name} {version}' for name, version in own.tools.items())}"
    yield f"  made {own.created} by: {own.command}"


def learnt(ancestry: FolderLineage) -> Iterator[str]:
    yield from (f"  input {name:12} {digest}" for name, digest in ancestry.inputs.items())
    yield f"  {len(ancestry.feedback)} judgements of {len(ancestry.interactions)} answers"
    yield from (f"    {id}" for id in ancestry.feedback)


COMMANDS = {"lineage": (Options, lineage)}
