"""The registry: versions that never change, pointers to them, and the history, which is the truth.

A movement is made in three steps: the history gets its line, which is on the disk before anything else; the pointers,
which follow from the history, are replaced one by one; readers follow the pointers. A process that is killed in
between leaves pointers that lag, and whoever makes the next movement, or `settle`s, sets them right first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.places import open_place
from deploy.signatures import check, sign, signature_file
from deploy.state import State, add_up
from proto.lineage import LINEAGE, FolderLineage
from proto.lineage import decode as decode_lineage
from proto.lineage import encode as encode_lineage
from proto.manifest import MANIFEST, Manifest, ManifestError, load
from proto.records import utc_now
from proto.registry import (
    HISTORY,
    Action,
    Movement,
    RegistryError,
    decode_history,
    encode_movement,
    encode_pointer,
    version_folder,
)

Evidence = dict[str, Any] | str | None
LEAST_PREFIX = 4  # characters of a digest that may stand for all of it


def ancestry_file(version: str) -> str:
    """In a folder of its own, so that an erasure finds it (serve/derived.py)."""
    return f"lineage/{version}/{LINEAGE}"


class Registry:
    """At a folder or a URL. All may read; movements are made one at a time."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._place = open_place(url)

    def history(self) -> list[Movement]:
        return decode_history(self._place.read(HISTORY) or b"")

    def state(self) -> State:
        return add_up(self.history())

    def resolve(self, name: str) -> str:
        """The version that `name` means: a role, or the beginning of a digest. Raises RegistryError."""
        state = self.state()
        if (pointer := state.pointers().get(name)) is not None:  # type: ignore[call-overload]
            return str(pointer.version)
        if name in state.pointers():
            raise RegistryError(f"{self.url} has no {name} version")
        found = sorted(version for version in state.published if version.startswith(name))
        if len(found) == 1 and len(name) >= LEAST_PREFIX:
            return found[0]
        those = ", ".join(version[:12] for version in found or sorted(state.published)) or "none"
        raise RegistryError(
            f"{name} is not a version of {self.url}; give current, candidate or previous, or {LEAST_PREFIX} or more "
            f"characters that only one digest begins with: {those}"
        )

    @contextmanager
    def open(self, version: str) -> Iterator[Path]:
        """The version's folder on this machine, as it is."""
        with self._place.local(version_folder(version)) as folder:
            yield folder

    def verify(self, version: str, public_key: Path | None = None) -> Manifest:
        """Check every digest and, with a key, the signature. Raises RegistryError."""
        with self.open(version) as folder:
            try:
                manifest = load(folder)
            except ManifestError as error:
                raise RegistryError(f"version {version[:12]} is damaged: {error}. Publish it again.") from error
            if manifest.digest != version:
                raise RegistryError(
                    f"version {version[:12]} is damaged: its {MANIFEST} is that of {manifest.digest[:12]}. "
                    "Publish it again."
                )
            if public_key is not None:
                check(folder, self._place.read(signature_file(version)), public_key)
        return manifest

    def publish(
        self,
        artifact: Path,
        *,
        by: str,
        why: str,
        evidence: Evidence = None,
        key: Path | None = None,
        ancestry: FolderLineage | None = None,
    ) -> str:
        """Copy an artifact in, verified before and after; its version. One that is there and whole stays as it is.

        Raises ManifestError if the artifact is not whole, RegistryError if the copy is not.
        """
        version = load(artifact).digest
        with self._place.lock("publish"):
            self._store(artifact, version)
            if key is not None:
                with self.open(version) as folder:
                    self._place.replace(signature_file(version), sign(folder, key))
            if ancestry is not None and self.ancestry(version) is None:
                self._place.replace(ancestry_file(version), encode_lineage(ancestry))
            if version not in self.state().published:
                self.move("publish", version, by=by, why=why, evidence=evidence)
        return version

    def ancestry(self, version: str) -> FolderLineage | None:
        """What a version that was retrained was made from; None of one that was published by hand."""
        name = ancestry_file(version)
        data = self._place.read(name)
        return None if data is None else decode_lineage(data, Path(name))

    def move(
        self,
        action: Action,
        version: str,
        *,
        by: str,
        why: str,
        share: float = 0.0,
        evidence: Evidence = None,
        seen: State | None = None,
    ) -> State:
        """Make a movement; what the registry is afterwards. Raises RegistryError if it cannot be made.

        A decision about what was `seen` is refused if another version is served or on trial by now.
        """
        with self._place.lock("move"):
            before = self.state()
            self._point(before)
            if seen is not None and (before.line, before.trial) != (seen.line, seen.trial):
                raise RegistryError(f"the versions of {self.url} were moved meanwhile; look at them again")
            movement = Movement(
                time=utc_now(), action=action, version=version, by=by, why=why, share=share, evidence=evidence
            )
            state = before.after(movement)
            line = encode_movement(movement)
            decode_history(line)  # a struct made in code has unchecked types
            self._place.append(HISTORY, line)
            self._point(state)
        return state

    def settle(self) -> State:
        """Set pointers right that a killed process left behind."""
        with self._place.lock("move"):
            state = self.state()
            self._point(state)
        return state

    def _store(self, artifact: Path, version: str) -> None:
        folder = version_folder(version)
        if self._place.read(f"{folder}/{MANIFEST}") is not None:
            try:
                self.verify(version)
            except RegistryError:
                self._place.discard(folder)
            else:
                return
        self._place.put(artifact, folder)
        try:
            self.verify(version)
        except RegistryError:
            self._place.discard(folder)
            raise

    def _point(self, state: State) -> None:
        for role, pointer in state.pointers().items():
            wanted = encode_pointer(pointer) if pointer else None
            if self._place.read(role) == wanted:
                continue
            if wanted is None:
                self._place.remove(role)
            else:
                self._place.replace(role, wanted)
