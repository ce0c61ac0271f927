"""A run's folder: what was asked, where it ran, what it measured, and the checkpoint it ends in."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from train.errors import TrainError

TOOLS = ("torch", "transformers", "tokenizers", "peft")


class RunFolder:
    """options.json, environment.json, metrics.jsonl, curves.png, data/, checkpoints/ and, at the end, model/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"

    @property
    def finished(self) -> bool:
        return self.model.is_dir()

    def open(self, options: Mapping[str, Any]) -> None:
        """Write what was asked; raises TrainError if the folder holds a run of which something else was asked."""
        file = self.path / "options.json"
        asked = json.loads(json.dumps(options, default=str))
        if file.exists():
            before = json.loads(file.read_text())
            names = sorted(name for name in asked.keys() | before.keys() if asked.get(name) != before.get(name))
            if names:
                told = ", ".join(f"{name} was {before.get(name)} and is now {asked.get(name)}" for name in names)
                raise TrainError(f"{self.path} holds a run with other options: {told}. Give another --output.")
            return
        if self.path.exists() and any(self.path.iterdir()):
            raise TrainError(f"{self.path} is not empty and holds no run; give a new folder as --output")
        self.path.mkdir(parents=True, exist_ok=True)
        write(file, asked)
        write(self.path / "environment.json", environment())


def environment() -> dict[str, Any]:
    return {
        "command": shlex.join([Path(sys.executable).name, "-m", "train", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in TOOLS}},
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write(path: Path, value: Mapping[str, Any]) -> None:
    """As JSON; the file appears whole."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
