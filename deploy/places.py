"""Where a registry lies: a local folder, or any URL that fsspec has a driver for.

Both give the same promises: `replace` shows readers the old content or the new one, `put` a whole folder or none, and
one process at a time holds a lock.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from deploy.lock import exclusive, owner
from proto.manifest import MANIFEST
from proto.registry import RegistryError


class Place(Protocol):
    """Names are paths below the root, with slashes."""

    def read(self, name: str) -> bytes | None:
        """None if there is no such file."""

    def replace(self, name: str, data: bytes) -> None: ...

    def append(self, name: str, line: bytes) -> None:
        """Add a line; what follows the last line's end was torn as it was written, and goes."""

    def remove(self, name: str) -> None:
        """A file, if it is there."""

    def put(self, source: Path, name: str) -> None:
        """Copy a folder of plain files. Only one process may do so at a time."""

    def discard(self, name: str) -> None:
        """A folder."""

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A folder as a path of this machine; what comes from elsewhere is gone afterwards."""

    @contextmanager
    def lock(self, name: str) -> Iterator[None]: ...


def open_place(url: str) -> Place:
    """Raises RegistryError if no driver is installed for the URL."""
    try:
        system, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise RegistryError(f"{url} cannot be opened: {error}") from error
    return Folder(Path(path)) if isinstance(system, LocalFileSystem) else Bucket(system, path, url)


class Folder:
    """On this machine. What was written is on the disk before anyone is told of it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def replace(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")  # one: whoever writes holds the lock
        with temporary.open("wb") as file:
            file.write(data)
            _to_disk(file.fileno())
        temporary.replace(path)
        _folder_to_disk(path.parent)

    def append(self, name: str, line: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line)
            file.flush()
            _to_disk(file.fileno())
        _folder_to_disk(path.parent)

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)
        _folder_to_disk(self.root)

    def put(self, source: Path, name: str) -> None:
        target = self.root / name
        incoming = self.root / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)  # left by a process that was killed
        target.parent.mkdir(parents=True, exist_ok=True)
        incoming.mkdir()
        for file in source.iterdir():
            copy = incoming / file.name
            shutil.copyfile(file, copy, follow_symlinks=False)
            copy.chmod(0o444)
            with copy.open("rb") as copied:
                _to_disk(copied.fileno())
        _folder_to_disk(incoming)
        incoming.rename(target)
        _folder_to_disk(target.parent)

    def discard(self, name: str) -> None:
        shutil.rmtree(self.root / name)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        yield self.root / name

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        with exclusive(self.root / f"{name}.lock", wait=True):
            yield


class Bucket:
    """Elsewhere, through fsspec: a file is written whole by one request, as object stores do.

    A lock is an object that is made only if there is none; how surely so is the driver's word (`mode="create"` of
    fsspec). It outlives a process that was killed, so whoever finds one is told how to remove it.
    """

    def __init__(self, system: Any, path: str, url: str) -> None:
        self._system = system
        self._path = path.rstrip("/")
        self._url = url.rstrip("/")

    def read(self, name: str) -> bytes | None:
        try:
            return bytes(self._system.cat_file(self._at(name)))
        except FileNotFoundError:
            return None

    def replace(self, name: str, data: bytes) -> None:
        self._system.pipe_file(self._at(name), data)

    def append(self, name: str, line: bytes) -> None:
        before = self.read(name) or b""
        self.replace(name, before[: before.rfind(b"\n") + 1] + line)

    def remove(self, name: str) -> None:
        self._system.invalidate_cache()
        if self._system.exists(self._at(name)):
            self._system.rm_file(self._at(name))

    def put(self, source: Path, name: str) -> None:
        # The manifest goes last: a version without one is not there.
        for file in sorted(source.iterdir(), key=lambda file: file.name == MANIFEST):
            self._system.put_file(str(file), self._at(f"{name}/{file.name}"))

    def discard(self, name: str) -> None:
        self._system.rm(self._at(name), recursive=True)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / Path(name).name
            folder.mkdir()
            self._system.invalidate_cache()
            for file in self._system.ls(self._at(name), detail=False):
                self._system.get_file(file, str(folder / Path(file).name))
            yield folder

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        path = self._at(f"{name}.lock")
        try:
            self._system.pipe_file(path, owner().encode(), mode="create")
        except FileExistsError as error:
            holder = (self.read(f"{name}.lock") or b"another process").decode()
            raise RegistryError(
                f"{self._url} is being changed by {holder}; try again, or remove {self._url}/{name}.lock if that "
                "process is gone"
            ) from error
        try:
            yield
        finally:
            self._system.rm_file(path)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"


def _to_disk(number: int) -> None:
    os.fsync(number)


def _folder_to_disk(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
