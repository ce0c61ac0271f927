"""What an image holds: its size and layers, its largest folders, its bill of materials, and what must not be in it."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import docker
from docker.errors import ImageNotFound

from deploy.errors import DeployError

SBOM = "app/sbom.cdx.json"
OURS = ("app", "opt")  # what the Dockerfile adds to its base
SECRETS = re.compile(r"(^|/)(\.env|\.netrc|\.pypirc|id_[a-z0-9]+|.*\.(key|p12|pfx))$")
WRITABLE_BY_ALL, SET_ID = 0o002, 0o6000
HEAVY = {"torch", "transformers"}
LARGEST = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`own_bytes` is what was added to the base; `folders` are the largest of those, in bytes."""

    tag: str
    total_bytes: int
    own_bytes: int
    user: str
    labels: dict[str, str]
    layers: list[tuple[int, str]]
    folders: dict[str, int]
    suspicious: list[str]
    sbom: bytes

    @property
    def serves(self) -> bool:
        return self.labels.get("org.opencontainers.image.title", "").startswith("pawl-serve")

    @property
    def components(self) -> set[str]:
        return {item["name"] for item in json.loads(self.sbom)["components"]} if self.sbom else set()

    def problems(self) -> list[str]:
        """What an image of ours must not be; one sentence each."""
        found = [f"{path} must not be in an image" for path in self.suspicious]
        if not re.fullmatch(r"[1-9]\d*(:\d+)?", self.user):
            found.append(f"it runs as {self.user or 'root'}; USER must be a number that is not 0")
        if not self.labels.get("org.opencontainers.image.revision"):
            found.append("it does not say which commit it was built from")
        if not self.sbom:
            found.append(f"it has no bill of materials, /{SBOM}")
        if self.serves and (heavy := HEAVY & self.components):
            found.append(f"the server needs no {' and no '.join(sorted(heavy))}")
        return found

    def text(self) -> str:
        total, own = self.total_bytes / 1e6, self.own_bytes / 1e6
        lines = [f"{self.tag}: {total:.1f} MB, of which {own:.1f} MB come on top of the base"]
        lines += [f"{size / 1e6:8.1f} MB  {made}" for size, made in self.layers if size]
        lines += ["the largest:"] if self.folders else []
        lines += [f"{size / 1e6:8.1f} MB  /{folder}" for folder, size in self.folders.items()]
        lines += [f"{len(self.components)} components in the bill of materials"] if self.sbom else []
        return "\n".join(lines)


def report(client: docker.DockerClient, tag: str, base: str) -> Report:
    """`base`: the image that it was built upon, "" if that is not known. Raises DeployError if it was not."""
    try:
        image = client.images.get(tag)
    except ImageNotFound as error:
        raise DeployError(f"there is no image {tag} here; build or pull it") from error
    under = 0
    if base:
        ground = client.images.get(base)
        layers = ground.attrs["RootFS"]["Layers"]
        if image.attrs["RootFS"]["Layers"][: len(layers)] != layers:
            raise DeployError(f"{tag} was not built upon {base}")
        under = ground.attrs["Size"]
    container = client.containers.create(tag, command=["none"])  # never started: to read its files
    try:
        with tarfile.open(fileobj=Chunks(container.export()), mode="r|") as archive:
            folders, suspicious, sbom = scan(archive)
    finally:
        container.remove()
    return Report(
        tag=tag,
        total_bytes=image.attrs["Size"],
        own_bytes=image.attrs["Size"] - under,
        user=image.attrs["Config"].get("User", ""),
        labels=image.labels,
        layers=[(step["Size"], shorten(step["CreatedBy"])) for step in reversed(image.history())],
        folders=dict(folders.most_common(LARGEST)),
        suspicious=suspicious,
        sbom=sbom,
    )


def scan(archive: tarfile.TarFile) -> tuple[Counter[str], list[str], bytes]:
    """Bytes by folder, paths that look like secrets or that anybody may write or that give rights, the SBOM."""
    folders: Counter[str] = Counter()
    suspicious, sbom = [], b""
    for entry in archive:
        path = PurePosixPath(entry.name)
        if path.parts[:1] and path.parts[0] in OURS and entry.isfile():
            folders["/".join(path.parts[:3])] += entry.size
            if SECRETS.search(entry.name) or entry.mode & (WRITABLE_BY_ALL | SET_ID):
                suspicious.append(f"/{entry.name}")
            if entry.name == SBOM and (file := archive.extractfile(entry)) is not None:
                sbom = file.read()
    return folders, suspicious, sbom


def shorten(step: str) -> str:
    step = re.sub(r"^/bin/sh -c (#\(nop\) +)?", "", " ".join(step.split()))
    return step if len(step) <= 100 else step[:97] + "..."


class Chunks(io.RawIOBase):
    """An iterator of bytes, to be read as a file."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._rest = chunk
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)
