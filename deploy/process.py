"""Commands of ours that a cycle runs: they die with it, and hold its lock as long as they live."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from deploy.errors import DeployError

ROOT = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class CommandFailed(DeployError):
    """A command ended with `status`, which is not 0."""

    def __init__(self, command: str, status: int) -> None:
        super().__init__(f"`{command}` failed with status {status}; see what it said")
        self.status = status


def run(words: list[str], *, lock: int, threads: int) -> None:
    """`python -m WORDS`, from the root. `lock` is a file descriptor that the process inherits.

    Raises CommandFailed. What it says goes where ours goes.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # before the fork: nothing may be loaded after it

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)},
        pass_fds=(lock,),
        preexec_fn=die_with_parent,
        check=False,
    )
    if done.returncode:
        raise CommandFailed(f"python -m {words[0]} {words[1]}", done.returncode)
