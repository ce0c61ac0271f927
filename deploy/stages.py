"""Stages that are made once: each leaves a folder, and a marker that says what it was made from and what it is.

`FOLDER/stages/NN-NAME.json` is the marker. A stage whose marker stands is not made again, if its inputs are what they
were and its folder still is what the marker says; so the same command, given again after a kill, goes on where it was,
and repeats what something else was fed to. A stage is made in `NN-NAME.incomplete`, which becomes `NN-NAME`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from proto.records import utc_now

Digests = dict[str, str]


class Marker(Struct, frozen=True, kw_only=True):
    """`inputs` and `outputs` are digests by name; `facts` is what later stages and people want to know."""

    stage: str
    inputs: Digests
    outputs: Digests
    facts: dict[str, Any] = {}
    finished: str


@dataclass(frozen=True, slots=True)
class Done:
    folder: Path
    outputs: Digests
    facts: dict[str, Any]


class Stages:
    """In `folder`, in the order in which they are called."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._number = 0

    def run(
        self,
        name: str,
        inputs: Mapping[str, str],
        make: Callable[[Path], Mapping[str, Any] | None],
        outputs: Callable[[Path], Digests],
        *,
        resumes: bool = False,
    ) -> Done:
        """Have the stage made by `make(folder)`, which returns facts, unless it is there.

        `outputs(folder)` are the digests of what is in it. `make` finds an empty folder or, if it `resumes`, what an
        earlier try with the same inputs left.
        """
        self._number += 1
        title = f"{self._number:02}-{name}"
        target = self._folder / title
        marker = self._folder / "stages" / f"{title}.json"
        if (found := self._find(marker, target, inputs, outputs)) is not None:
            self._say(f"{title}: made before")
            return found
        self._say(f"{title}")
        marker.unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        work = self._prepare(target, inputs, resumes)
        facts = dict(make(work) or {})
        (work / INPUTS).unlink()
        made = outputs(work)
        work.rename(target)
        write(
            marker,
            Marker(stage=name, inputs=dict(inputs), outputs=made, facts=facts, finished=utc_now()),
        )
        return Done(target, made, facts)

    @staticmethod
    def _find(marker: Path, target: Path, inputs: Mapping[str, str], outputs: Callable[[Path], Digests]) -> Done | None:
        if not marker.exists() or not target.is_dir():
            return None
        found = msgspec.json.decode(marker.read_bytes(), type=Marker)
        try:
            whole = found.inputs == dict(inputs) and outputs(target) == found.outputs
        except Exception:  # whatever it is that cannot be read, it is not what was made
            whole = False
        return Done(target, found.outputs, found.facts) if whole else None

    @staticmethod
    def _prepare(target: Path, inputs: Mapping[str, str], resumes: bool) -> Path:
        work = target.with_name(f"{target.name}.incomplete")
        asked = msgspec.json.encode(dict(inputs))
        if not (resumes and (work / INPUTS).exists() and (work / INPUTS).read_bytes() == asked):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            (work / INPUTS).write_bytes(asked)
        return work


INPUTS = ".inputs"  # what an unfinished stage is made from


def write(path: Path, value: Any) -> None:
    """As JSON; the file appears whole, and is on the disk on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
