"""Folders that were made from the records: found by their `lineage.json`, emptied when what they hold must go.

A folder is emptied whole: its lineage stays, so that what was made from it is still found, and it can be made again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from proto.lineage import HOLD_CONTENT, LINEAGE, FolderLineage, read
from proto.records import utc_now
from serve.store import Erased, Store

EMPTIED = "emptied.json"  # when and why, beside the lineage that stays


@dataclass(frozen=True, slots=True)
class Folder:
    path: Path
    lineage: FolderLineage

    @property
    def emptied(self) -> bool:
        return (self.path / EMPTIED).exists()

    @property
    def holds_content(self) -> bool:
        return self.lineage.kind in HOLD_CONTENT and not self.emptied


@dataclass(frozen=True, slots=True)
class Erasure:
    """What an erasure reached: rows, folders that were emptied, and versions that were trained on them."""

    rows: Erased
    emptied: list[Path]
    versions: list[Path]


def find(root: Path) -> list[Folder]:
    """All such folders under `root`, which need not exist. Raises LineageError for a file that is not understood."""
    found = []
    for name, _, files in os.walk(root):
        if LINEAGE in files:
            found.append(Folder(Path(name), read(Path(name))))
    return sorted(found, key=lambda folder: folder.path)


def made_from(folders: Iterable[Folder], ids: set[str]) -> list[Folder]:
    """Those made from one of these records, directly or from another such folder."""
    folders = list(folders)
    hit = {f.lineage.digest for f in folders if not ids.isdisjoint([*f.lineage.interactions, *f.lineage.feedback])}
    grown = True
    while grown:
        more = {f.lineage.digest for f in folders if not hit.isdisjoint(f.lineage.inputs.values())} - hit
        hit |= more
        grown = bool(more)
    return [folder for folder in folders if folder.lineage.digest in hit]


def empty(folder: Folder, why: str) -> None:
    """Remove all that a folder holds but its lineage."""
    for entry in folder.path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LINEAGE:
            entry.unlink()
    (folder.path / EMPTIED).write_bytes(msgspec.json.encode({"at": utc_now(), "why": why}))


def expire(root: Path, before: str) -> list[Path]:
    """Empty the folders that hold text from before this date; returns them."""
    old = [f for f in find(root) if f.holds_content and f.lineage.oldest is not None and f.lineage.oldest < before]
    for folder in old:
        empty(folder, f"held text from before {before}")
    return [folder.path for folder in old]


def erase(store: Store, subject: str, root: Path) -> Erasure:
    """Delete all of a subject's records from the store and from what was made of them under `root`.

    Rows go last: while they are there, a second try finds what the first one left. Raises StoreError, LineageError.
    """
    emptied: dict[Path, None] = {}
    rows = store.owned(subject)
    versions = _empty_all(root, rows, emptied)
    rows = store.erase(subject)
    versions += _empty_all(root, rows, emptied)  # what was made, and recorded, meanwhile
    return Erasure(rows, list(emptied), sorted(set(versions)))


def _empty_all(root: Path, rows: Erased, emptied: dict[Path, None]) -> list[Path]:
    """Empty what holds these records; returns the versions that were trained on them."""
    folders = made_from(find(root), {*rows.interactions, *rows.feedback})
    for folder in folders:
        if folder.holds_content:
            empty(folder, "a subject's records were erased")
            emptied[folder.path] = None
    return [folder.path for folder in folders if folder.lineage.kind == "version"]
