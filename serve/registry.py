"""The registry as the server reads it: its pointers, and the movements that its history gains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from proto.manifest import Manifest, ManifestError, load
from proto.registry import (
    HISTORY,
    Movement,
    Pointer,
    RegistryError,
    Role,
    decode_history,
    decode_pointer,
    version_folder,
)
from serve.settings import Settings


@dataclass(frozen=True, slots=True)
class Pointers:
    """All of them at one time."""

    current: Pointer
    candidate: Pointer | None
    previous: Pointer | None


def read_pointers(root: Path) -> Pointers:
    """Raises RegistryError, also if no version is current, or OSError."""
    current = _read(root, "current")
    if current is None:
        raise RegistryError(
            f"{root} has no current version; publish an artifact and promote it with `python -m deploy`"
        )
    return Pointers(current, _read(root, "candidate"), _read(root, "previous"))


def load_first(settings: Settings) -> tuple[Path, Manifest]:
    """The artifact to begin with, every digest checked. Raises ManifestError, RegistryError or OSError."""
    if settings.model is not None:
        return settings.model, load(settings.model)
    assert settings.registry is not None
    return load_version(settings.registry, read_pointers(settings.registry).current.version)


def load_version(root: Path, digest: str) -> tuple[Path, Manifest]:
    """A version's folder and its manifest, every digest checked. Raises ManifestError."""
    directory = root / version_folder(digest)
    manifest = load(directory)
    if manifest.digest != digest:
        raise ManifestError(f"{directory} holds version {manifest.digest}, not the one that it is named after")
    return directory, manifest


def _read(root: Path, role: Role) -> Pointer | None:
    try:
        data = (root / role).read_bytes()
    except FileNotFoundError:
        return None
    return decode_pointer(data, role)


class History:
    """Reads each movement once."""

    def __init__(self, root: Path) -> None:
        self._path = root / HISTORY
        self._read = 0  # bytes

    def news(self) -> list[Movement]:
        """What was written since the last call; all of it at the first. Raises RegistryError, once for a bad line."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return []
        self._read += data.rfind(b"\n") + 1
        return decode_history(data)
