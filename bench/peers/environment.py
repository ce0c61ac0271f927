"""A peer's own folder and virtual environment, outside the repository: `$PAWL_PEERS`, or `~/.cache/pawl-peers`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "models" / "base"  # the Hugging Face directory that the peers' models are made from


class PeerError(Exception):
    """A peer could not be set up or run; the message ends with the last of its output."""


def peer_home(name: str) -> Path:
    """`name` has the version in it: another version is another folder."""
    return Path(os.environ.get("PAWL_PEERS") or Path.home() / ".cache" / "pawl-peers") / name


def run(command: list[object], environment: dict[str, str] | None = None) -> str:
    """What a command that must succeed writes to its standard output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PeerError(f"{command[0]} failed with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


class Environment:
    """Exactly the packages of `bench/peers/NAME.txt`, their dependencies included, in a folder for NAME-VERSION."""

    def __init__(self, name: str, version: str) -> None:
        self.home = peer_home(f"{name}-{version}")
        self.python = self.home / "venv" / "bin" / "python"
        self.pins = Path(__file__).with_name(f"{name}.txt")

    def prepare(self) -> None:
        """Without dependency resolution: it would bring packages that are not needed, and a CUDA torch beside them."""
        stamp = self.home / "installed.txt"
        if stamp.is_file() and stamp.read_text() == self.pins.read_text():
            return
        print(f"installing {self.pins.stem} in {self.home}", file=sys.stderr)
        self.home.mkdir(parents=True, exist_ok=True)
        run([sys.executable, "-m", "venv", self.home / "venv"])
        run([self.python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", self.pins])
        stamp.write_text(self.pins.read_text())


def base_model() -> Path:
    """The checkpoint to convert. Raises PeerError if it is not there."""
    if not (BASE / "config.json").is_file():
        raise PeerError("models/base is not there; make it with `make models/base/config.json`")
    return BASE
