"""Builds a target of the Dockerfile by the engine's classic builder, and an image that is an artifact alone."""

from __future__ import annotations

import io
import re
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import docker

from deploy.errors import DeployError
from proto.manifest import load

ROOT = Path(__file__).resolve().parent.parent
MODEL_IMAGE = """FROM scratch
COPY model /
LABEL org.opencontainers.image.title="pawl-model" \\
      org.opencontainers.image.revision="{revision}" \\
      pawl.model.digest="sha256:{digest}"
"""


def stages_for(text: str, target: str) -> str:
    """The Dockerfile `text` with only the stages that `target` needs; the classic builder would build them all.

    Raises DeployError if there is no such stage.
    """
    head, *stages = re.split(r"(?m)^(?=FROM )", text)
    named = {re.findall(r"^FROM \S+ AS (\S+)", stage)[0]: stage for stage in stages}
    if target not in named:
        raise DeployError(f"the Dockerfile has no target {target}; give one of {', '.join(named)}")
    needed, waiting = set(), [target]
    while waiting:
        if (name := waiting.pop()) in named and name not in needed:
            needed.add(name)
            waiting += re.findall(r"^FROM (\S+)", named[name]) + re.findall(r"--from=(\S+)", named[name])
    return head + "".join(stage for name, stage in named.items() if name in needed)


def build_image(client: docker.DockerClient, target: str, tag: str, arguments: dict[str, str], network: str) -> None:
    """Raises DeployError with what the failed step said last."""
    with tempfile.NamedTemporaryFile("w", suffix=".Dockerfile") as dockerfile:
        dockerfile.write(stages_for((ROOT / "Dockerfile").read_text(), target))
        dockerfile.flush()
        events = client.api.build(
            path=str(ROOT),
            dockerfile=dockerfile.name,
            target=target,
            tag=tag,
            buildargs=arguments,
            network_mode=network,
            rm=True,
            forcerm=True,
            decode=True,
        )
        follow(events, tag)


def build_model_image(client: docker.DockerClient, model: Path, tag: str, revision: str) -> None:
    """The artifact's files at its root, for a Kubernetes image volume. Raises ManifestError, DeployError."""
    manifest = load(model)
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        text = MODEL_IMAGE.format(revision=revision, digest=manifest.digest).encode()
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))
        archive.add(model, "model", filter=plain)
    context.seek(0)
    follow(client.api.build(fileobj=context, custom_context=True, tag=tag, rm=True, forcerm=True, decode=True), tag)


def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same artifact gives the same layer: no owner, no time, readable by all."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() else 0o444
    return entry


def follow(events: Any, tag: str) -> None:
    """Show the builder's steps. Raises DeployError if one fails."""
    for event in events:
        if "error" in event:
            raise DeployError(f"{tag} cannot be built: {event['error'].strip()}")
        print(event.get("stream", ""), end="", file=sys.stderr, flush=True)
