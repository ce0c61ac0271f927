"""Artifacts that are whole, though no models."""

from __future__ import annotations

from pathlib import Path

import msgspec

from proto.manifest import MANIFEST, WEIGHTS, Manifest, encode, list_files
from tests.proto.test_manifest import write_artifact


def make_artifact(directory: Path, name: str) -> str:
    """An artifact whose weights are its name; its version."""
    plain: Manifest = write_artifact(directory)
    (directory / WEIGHTS).write_text(name * 100)
    manifest = msgspec.structs.replace(plain, name=name, files={})
    (directory / MANIFEST).unlink()
    manifest = msgspec.structs.replace(manifest, files=list_files(directory))
    (directory / MANIFEST).write_bytes(encode(manifest))
    return manifest.digest
