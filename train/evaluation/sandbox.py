"""Generated Python is run here and nowhere else: in a process of its own, with as little as the kernel lets us give.

`jail.py` is what runs inside, and says how. It holds against what a model writes by mistake or to please the checks:
endless loops, forks, memory, files, `sys.exit(0)`, patched builtins. It is no wall against someone who attacks the
kernel; for that, judge inside a virtual machine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.errors import TrainError

JAIL = Path(__file__).with_name("jail.py")
LEVELS = ("namespaces", "limits")
FIRST_UID = 1 << 20  # as root, each program runs as a user of its own, far from those of the machine

PROBE = "import colorsys, mmap\n\ndef one():\n    return 1\n"  # a module in Python, and one in C

Verdict = Literal["passed", "failed", "timeout", "crashed"]


@dataclass(frozen=True, slots=True)
class Limits:
    seconds: int = 5  # of CPU
    wall_seconds: float = 30.0  # for those who sleep; a busy machine needs some to start an interpreter
    memory_bytes: int = 512 << 20  # of address space
    file_bytes: int = 1 << 20  # of all files together, and of each


@dataclass(frozen=True, slots=True)
class Outcome:
    """`passed`: all checks ran and held. `failed`: a check or the program raised. `crashed`: it ended itself."""

    verdict: Verdict
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def run_checks(program: str, entry_point: str, check: str, limits: Limits | None = None) -> Outcome:
    """Run `program`, then the assertions of `check`, which call its function `entry_point`.

    `check` may instead define `check(candidate)`, as HumanEval does. Arguments and results cross as plain data:
    numbers, texts, bytes, None, and lists, tuples, sets and dictionaries of them. An argument that the function changes
    stays unchanged for the checks. Raises TrainError where no sandbox can be made.
    """
    return _run(level(), program, entry_point, check, limits or Limits())


@functools.cache
def level() -> str:
    """The strongest level of isolation that this machine allows."""
    found = ""
    for name in LEVELS:
        outcome = _run(name, PROBE, "one", "assert one() == 1", Limits())
        if outcome.passed:
            return name
        found = f"{outcome.verdict}: {outcome.detail}"
    raise TrainError(f"no sandbox can be made here for generated code ({found}); judge functions on Linux")


def _run(level_name: str, program: str, entry_point: str, check: str, limits: Limits) -> Outcome:
    token = secrets.token_hex(16)
    uid = FIRST_UID + secrets.randbelow(FIRST_UID)
    job = json.dumps({"program": program, "entry_point": entry_point, "check": check, "token": token})
    numbers = (limits.memory_bytes, limits.seconds, limits.file_bytes, uid)
    with tempfile.TemporaryDirectory(prefix="sandbox-") as directory:
        if os.getuid() == 0:
            os.chown(directory, uid, uid)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", JAIL.read_text(encoding="utf-8"), level_name, *map(str, numbers)],
            cwd=directory,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(job.encode(), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return Outcome("timeout", f"longer than {limits.wall_seconds} seconds by the clock")
        finally:
            with process, contextlib.suppress(ProcessLookupError):  # closes the pipes and reaps
                os.killpg(process.pid, signal.SIGKILL)
    said = output.decode(errors="replace").split(maxsplit=2)
    if said[:1] != [token]:
        return Outcome("crashed", errors.decode(errors="replace").strip()[-500:])
    if said[1] == "timeout":
        return Outcome("timeout", f"longer than {limits.seconds} seconds of CPU")
    return Outcome(
        "passed" if said[1] == "passed" else "failed" if said[1] == "failed" else "crashed", "".join(said[2:]).strip()
    )
