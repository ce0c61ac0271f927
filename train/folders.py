"""Folders that are whole or not there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.errors import TrainError


def refuse_existing(target: Path) -> None:
    """Raises TrainError if there is a `target`."""
    if target.exists():
        raise TrainError(f"{target} exists; remove it or name another output")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to fill. It becomes `target` if the block ends well, and is removed otherwise.

    Raises TrainError if there is a `target`.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        made = Path(temporary) / "made"  # within, since TemporaryDirectory's own is for the owner's eyes only
        made.mkdir()
        yield made
        made.rename(target)
