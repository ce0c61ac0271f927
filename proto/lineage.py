"""What a folder made from the records says of itself: `lineage.json`. Version 1.

Snapshots and datasets hold people's words, versions were trained on them. Each names the records that it was made of,
or the folders it was made from, so that an erasure finds them all. Ids are random and stay; words go.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from proto.manifest import Digest
from proto.records import Created, Id

LINEAGE = "lineage.json"
LINEAGE_VERSION = 1
Kind = Literal["snapshot", "dataset", "version"]
HOLD_CONTENT = frozenset({"snapshot", "dataset"})  # an erasure empties these; versions it lists


class LineageError(ValueError):
    """The file is no lineage that this Pawl understands; the message names it, what is wrong, and the cure."""


class FolderLineage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`inputs` maps names to digests: of other folders' lineage, of checkpoints, of files."""

    version: int = LINEAGE_VERSION
    kind: Kind
    created: Created
    command: str
    inputs: dict[str, Digest] = {}
    interactions: list[Id] = []
    feedback: list[Id] = []
    oldest: Created | None = None  # the first record's date; what the folder holds expires with it
    since: int = 0  # a snapshot's cursor: feedback after this one ...
    until: int = 0  # ... up to this one, where the next snapshot begins

    @property
    def digest(self) -> str:
        """The folder's name in the `inputs` of what is made from it: SHA-256 of `lineage.json`."""
        return hashlib.sha256(encode(self)).hexdigest()


def encode(lineage: FolderLineage) -> bytes:
    """The canonical bytes: indented, keys in the order of declaration."""
    return msgspec.json.format(msgspec.json.encode(lineage), indent=1)


def write(folder: Path, lineage: FolderLineage) -> None:
    """Put the file into the folder. Raises LineageError when a field breaks the contract."""
    data = encode(lineage)
    decode(data, folder / LINEAGE)  # a struct made in code has unchecked types
    (folder / LINEAGE).write_bytes(data)


def read(folder: Path) -> FolderLineage:
    """The folder's lineage. Raises LineageError, and OSError when there is none."""
    path = folder / LINEAGE
    return decode(path.read_bytes(), path)


def decode(data: bytes, path: Path) -> FolderLineage:
    """Parse and check. Raises LineageError that names `path` and the field."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).version
        if version != LINEAGE_VERSION:
            raise LineageError(
                f"{path} has version {version}; this Pawl reads {LINEAGE_VERSION}. Use the Pawl that wrote it."
            )
        return msgspec.json.decode(data, type=FolderLineage)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LineageError(f"{path}: {error}") from error


class _Versioned(Struct):
    version: int
