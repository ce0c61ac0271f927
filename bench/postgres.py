"""A PostgreSQL server of one's own, in a temporary folder, reached by a Unix socket. Needs Debian's `postgresql`."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USER = "postgres"  # made by Debian's package; the server refuses to run as root
FLAGS = ("listen_addresses=", "wal_recycle=off", "min_wal_size=32MB", "max_connections=20", "shared_buffers=32MB")


@dataclass
class Postgres:
    """A running server. `folder` holds the socket, the log and, under `data`, all of its files."""

    folder: Path
    programs: Path

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@/{database}?host={self.folder}"

    def create(self, database: str, tablespace: Path | None = None) -> str:
        """Make an empty database, whose tables lie in the folder `tablespace` if one is given; returns its URL."""
        if tablespace is not None:
            self.execute(f"CREATE TABLESPACE {database}_place LOCATION '{tablespace}'")
        place = "" if tablespace is None else f" TABLESPACE {database}_place"
        self.execute(f"CREATE DATABASE {database}{place}")
        return self.url(database)

    def drop(self, database: str, *, tablespace: bool = False) -> None:
        self.execute(f"DROP DATABASE {database}")
        if tablespace:
            self.execute(f"DROP TABLESPACE {database}_place")

    def execute(self, command: str) -> None:
        self._run("psql", "-q", "-h", str(self.folder), "-d", "postgres", "-c", command)

    def start(self) -> None:
        options = f"-k {self.folder} " + " ".join(f"-c {flag}" for flag in FLAGS)
        self._control("start", "-l", str(self.folder / "log"), "-o", options)

    def stop(self, mode: str = "fast") -> None:
        """`immediate` is as if the power had failed."""
        self._control("stop", "-m", mode)

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-w", "-s", "-D", str(self.folder / "data"), *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            entry = pwd.getpwnam(USER)
            as_user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        with tempfile.TemporaryFile("w+") as said:  # a pipe would stay open as long as the server that pg_ctl starts
            command = [str(self.programs / program), *arguments]
            done = subprocess.run(command, cwd=self.folder, stdout=said, stderr=said, **as_user)
            if done.returncode:
                said.seek(0)
                log = self.folder / "log"
                raise RuntimeError(f"{program}: {said.read()}{log.read_text() if log.exists() else ''}")


@contextmanager
def running() -> Iterator[Postgres]:
    """A fresh server, removed with all it holds at the end. Raises RuntimeError when PostgreSQL is not installed."""
    folder = Path(tempfile.mkdtemp(prefix="pawl-postgres-"))
    server = Postgres(folder, _programs())
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, USER, USER)
        server._run("initdb", "-D", str(folder / "data"), "-U", USER, "-A", "trust", "-E", "UTF8", "-N")
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
    finally:
        shutil.rmtree(folder)


def _programs() -> Path:
    """Debian keeps each version's programs apart."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not found:
        raise RuntimeError(
            "PostgreSQL is not installed; `make test-system` installs it, or `apt-get install postgresql`"
        )
    return found[-1]
