"""Registries made by hand: versions of files that hold nothing, and pointers moved as `deploy` moves them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from proto import manifest as artifacts
from proto.manifest import GRAPH, MANIFEST, TOKENIZER, WEIGHTS, Lineage, list_files
from proto.records import utc_now
from proto.registry import HISTORY, Action, Movement, Pointer, Role, encode_movement, encode_pointer, version_folder
from tests.serve import fakes


@dataclass
class Registry:
    root: Path

    def publish(self, number: int, size: int = 1000) -> str:
        """A version that passes every check and that no runtime could run; returns its digest."""
        folder = self.root / "unnamed"
        folder.mkdir(parents=True)
        for name in (GRAPH, WEIGHTS, TOKENIZER):
            (folder / name).write_bytes(bytes(size))
        lineage = Lineage(checkpoint=f"{number:064x}")
        manifest = msgspec.structs.replace(fakes.manifest(), files=list_files(folder), lineage=lineage)
        (folder / MANIFEST).write_bytes(artifacts.encode(manifest))
        return self.take(folder)

    def take(self, folder: Path) -> str:
        """Move an artifact in; returns its digest."""
        digest = artifacts.decode((folder / MANIFEST).read_bytes()).digest
        target = self.root / version_folder(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return digest

    def weights(self, version: str) -> Path:
        return self.root / version_folder(version) / WEIGHTS

    def point(self, role: Role, version: str | None, share: float = 0.0) -> None:
        """Set a pointer, or take it away."""
        if version is None:
            (self.root / role).unlink(missing_ok=True)
            return
        pointer = Pointer(version=version, since=utc_now(), by="test", why="test", share=share)
        written = self.root / f".{role}"
        written.write_bytes(encode_pointer(pointer))
        os.replace(written, self.root / role)

    def tell(self, action: Action, version: str) -> None:
        """A line of the history."""
        movement = Movement(time=utc_now(), action=action, version=version, by="test", why="test")
        with (self.root / HISTORY).open("ab") as file:
            file.write(encode_movement(movement))
