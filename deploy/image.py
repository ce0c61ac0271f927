"""`python -m deploy image build | push | run | verify`: the images of the Dockerfile, through the Docker engine.

The engine is found as the `docker` command finds it: $DOCKER_HOST, or the local socket.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException

from deploy.container import Ports, check_confinement, hardened, wait_until_ready
from deploy.errors import DeployError
from deploy.image_build import ROOT, build_image, build_model_image
from deploy.image_report import Report, report
from deploy.rehearsal import rehearse
from proto.manifest import load
from train.flags import option

TARGETS = ("serve", "serve-gpu", "train")
MODEL = "model"
MIB = 1 << 20


@contextlib.contextmanager
def engine() -> Iterator[docker.DockerClient]:
    """The Docker engine; its refusals become DeployError."""
    try:
        client = docker.from_env(timeout=600)
    except DockerException as error:
        raise DeployError(f"no Docker engine answers: {error}. Start one, or point DOCKER_HOST at it.") from error
    try:
        yield client
    except DockerException as error:
        raise DeployError(f"the Docker engine refuses: {error}") from error
    finally:
        client.close()


def tag_argument() -> Any:
    return field(metadata={"help": "name and tag of the image", "parse": str, "positional": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    tag: str = tag_argument()
    target: str = option(
        "serve", "what to build; model: the artifact alone, for an image volume", choices=(*TARGETS, MODEL)
    )
    base: str = option("", "image with Python 3.11 to build upon (default: the Dockerfile's)")
    tools: str = option("", "image with the same Python, pip and g++ to build in (default: the Dockerfile's)")
    gpu_base: str = option("", "image with Python 3.11, for serve-gpu (default: the Dockerfile's)")
    model: str = option("", "artifact; its digest becomes a label, or with --target model its files the image")
    network: str = option("default", "network of the build's steps: default, host or none")
    most_mb: int = option(300, "limit on what serve adds to its base, in MB", least=1)
    sbom: str = option("", "file to copy the bill of materials to")


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    tag: str = tag_argument()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    tag: str = tag_argument()
    model: Path = field(metadata={"help": "artifact to serve, mounted read-only", "parse": Path})
    network: str = option("bridge", "bridge, with both ports published on 127.0.0.1, or host")
    http_port: int = option(8000, "HTTP port on this machine; 0 picks a free one", least=0, most=65535)
    grpc_port: int = option(50051, "gRPC port on this machine; 0 picks a free one", least=0, most=65535)
    memory_mb: int = option(4096, "memory limit in MB", least=64)
    ready_seconds: float = option(120.0, "how long the server may take to be ready", least=1)
    data: str = option("pawl-data", "volume of the records")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    tag: str = tag_argument()
    model: Path = field(metadata={"help": "artifact to serve, mounted read-only", "parse": Path})
    network: str = option("bridge", "bridge, with both ports published on 127.0.0.1, or host")
    memory_mb: int = option(4096, "memory limit in MB", least=64)
    ready_seconds: float = option(120.0, "how long the server may take to be ready", least=1)
    streams: int = option(16, "requests in flight when it is told to stop, half of each protocol", least=2)
    tokens: int = option(96, "tokens of each", least=2)
    base: str = option("", "image that it was built upon, to tell its size from (default: not told apart)")


def build(options: Build) -> int:
    with engine() as client:
        if options.target == MODEL:
            if not options.model:
                raise DeployError("--target model needs --model ARTIFACT")
            build_model_image(client, Path(options.model), options.tag, revision())
            return say(report(client, options.tag, ""))
        arguments = {"REVISION": revision()}
        given = {"BASE_IMAGE": options.base, "BUILD_IMAGE": options.tools, "GPU_BASE_IMAGE": options.gpu_base}
        arguments |= {name: value for name, value in given.items() if value}
        if options.model:
            arguments["MODEL_DIGEST"] = f"sha256:{load(Path(options.model)).digest}"
        build_image(client, options.target, options.tag, arguments, options.network)
        found = report(client, options.tag, options.base)
        if options.sbom:
            Path(options.sbom).write_bytes(found.sbom)
        say(found)
        problems = found.problems()
        if options.target == "serve" and (megabytes := found.own_bytes / 1e6) > options.most_mb:
            problems.append(f"it adds {megabytes:.0f} MB to its base; --most-mb allows {options.most_mb}")
        if problems:
            raise DeployError("\n".join(f"{options.tag}: {problem}" for problem in problems))
    return 0


def push(options: Push) -> int:
    with engine() as client:
        digest = ""
        for event in client.api.push(options.tag, stream=True, decode=True):
            if "error" in event:
                raise DeployError(f"{options.tag} cannot be pushed: {event['error']}")
            digest = event.get("aux", {}).get("Digest", digest)
    name, _, last = options.tag.rpartition("/")
    print(f"{name}{'/' if name else ''}{last.split(':')[0]}@{digest}")
    return 0


def run(options: Run) -> int:
    with engine() as client:
        ports = Ports(options.network, options.http_port, options.grpc_port)
        settings = hardened(options.model, ports, options.memory_mb)
        settings["volumes"][options.data] = {"bind": "/data", "mode": "rw"}
        container = client.containers.run(options.tag, detach=True, **settings)
        seconds = wait_until_ready(container, ports.http_url, options.ready_seconds)
        print(f"{container.short_id} is ready after {seconds:.1f} s: {ports.http_url} and grpc://{ports.grpc_address}")
    return 0


def verify(options: Verify) -> int:
    with engine() as client:
        found = report(client, options.tag, options.base)
        if problems := found.problems():
            raise DeployError("\n".join(f"{options.tag}: {problem}" for problem in problems))
        say(found)
        ports = Ports(options.network, 0, 0)
        settings = hardened(options.model, ports, options.memory_mb)
        settings["tmpfs"]["/data"] = "size=64m,mode=0700,uid=65532,gid=65532"
        container = client.containers.run(options.tag, detach=True, **settings)
        try:
            seconds = wait_until_ready(container, ports.http_url, options.ready_seconds)
            check_confinement(container)
            print(f"ready after {seconds:.1f} s; not root, no capabilities, nothing writable but /tmp and /data")
            print(rehearse(container, ports, options.streams, options.tokens).text())
        finally:
            container.remove(force=True)
    return 0


def revision() -> str:
    """The commit that is built, with a plus sign if the tree differs from it; "unknown" outside a repository."""
    try:
        commit, status = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if status else "")


def say(found: Report) -> int:
    print(found.text())
    return 0


COMMANDS = {
    "image build": (Build, build),
    "image push": (Push, push),
    "image run": (Run, run),
    "image verify": (Verify, verify),
}
