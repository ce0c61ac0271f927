"""A lock that a process holds as long as it lives, on a file that says who holds it."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.errors import DeployError
from proto.records import utc_now


def owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {utc_now()}"


@contextmanager
def exclusive(path: Path, *, wait: bool) -> Iterator[int]:
    """Hold `path`, by flock(2): the kernel lets go of it when the process ends, however that comes about.

    Gives its file descriptor: a process that inherits it holds the lock too.
    Raises DeployError that names the holder if it is held and we do not `wait`. The file stays: to remove it would
    let two hold "it" at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise DeployError(f"{path} is held by {holder}; wait for it to end, or end it") from error
        file.seek(0)
        file.truncate()
        file.write(owner() + "\n")
        file.flush()
        yield file.fileno()
