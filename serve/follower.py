"""Follows a registry: what its pointers name is loaded beside what answers, and takes over when it is ready.

Twice a second: 1 read the pointers; 2 give the requests to what they name, as far as it is in memory; 3 load what is
missing, one version at a time; 4 drop what nobody names. A version that cannot be loaded is reported, left out, and
tried again when its pointer is written again. `previous` stays in memory, so that a rollback need not load anything.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from proto.registry import Pointer, RegistryError
from serve.loader import Loader
from serve.machine import available_bytes
from serve.metrics import Metrics, version_name
from serve.registry import History, Pointers, load_version, read_pointers
from serve.version import Version
from serve.versions import Versions

log = logging.getLogger("pawl.follower")

POLL_SECONDS = 0.5
SPARE = 2  # times its size that must be free before a version is loaded that nobody waits for


class Follower:
    """Lives on the event loop; reads and loads in threads."""

    def __init__(self, root: Path, loader: Loader, versions: Versions, metrics: Metrics) -> None:
        self._root = root
        self._loader = loader
        self._versions = versions
        self._metrics = metrics
        self._history = History(root)
        self._failed: set[Pointer] = set()
        self._named: set[str] = set()  # by the pointers of the last turn: a movement writes one after the other
        self.busy: set[asyncio.Task[None]] = set()  # the load that is under way
        self._complaint = ""

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self.turn()
            except Exception as error:  # whatever it is, it goes on to follow
                self._metrics.in_step(False)
                self._complain(error)
            if self.busy:
                await asyncio.wait(self.busy, timeout=POLL_SECONDS)
            else:
                await asyncio.sleep(POLL_SECONDS)

    async def turn(self) -> None:
        """Read, and do what can be done at once. Raises RegistryError or OSError; what answers then stays."""
        pointers = await asyncio.to_thread(read_pointers, self._root)
        for movement in await asyncio.to_thread(self._history.news):
            self._metrics.moved(movement)
        named = [pointer for pointer in (pointers.current, pointers.candidate, pointers.previous) if pointer]
        self._failed.intersection_update(named)
        self._assign(pointers)
        self._drop({pointer.version for pointer in named})
        self._load_next(pointers)
        self._metrics.in_step(self._followed(pointers))
        self._complaint = ""

    def _assign(self, pointers: Pointers) -> None:
        versions = self._versions
        current = versions.loaded.get(pointers.current.version, versions.current)
        candidate, share = None, 0.0
        if pointers.candidate is not None:
            candidate, share = versions.loaded.get(pointers.candidate.version), pointers.candidate.share
        # A candidate can wait: three KV caches at once are for a rollback alone.
        busy = bool(versions.leaving) or current is not versions.current
        if candidate is current or (candidate is not None and busy and not candidate.started):
            candidate = None
        if candidate is None:
            share = 0.0
        if (current, candidate, share) == (versions.current, versions.candidate, versions.share):
            return
        versions.assign(current, candidate, share)
        log.info(
            "version %s answers%s",
            current.name,
            f", {share:.1%} of it {candidate.name}" if candidate is not None else "",
        )

    def _followed(self, pointers: Pointers) -> bool:
        wanted = {pointers.current.version: 1.0}
        if pointers.candidate is not None and pointers.candidate.version != pointers.current.version:
            wanted = {pointers.current.version: 1.0 - pointers.candidate.share}
            wanted[pointers.candidate.version] = pointers.candidate.share
        return wanted == self._versions.shares

    def _drop(self, named: set[str]) -> None:
        for version in self._versions.idle:
            if version.digest not in named | self._named:
                self._versions.drop(version)
        self._named = named

    def _load_next(self, pointers: Pointers) -> None:
        if self.busy:
            return
        previous, loaded = pointers.previous, self._versions.loaded
        for pointer in (pointers.current, pointers.candidate, previous):
            if pointer is None or pointer in self._failed or pointer.version in loaded:
                continue
            size = _size(self._root / pointer.folder)
            if pointer is previous and available_bytes() < SPARE * size:
                continue
            if pointer is not previous and previous is not None and available_bytes() < size:
                for version in self._versions.idle:
                    if version.digest == previous.version:
                        self._versions.drop(version)
            task = asyncio.get_running_loop().create_task(self._load(pointer))
            self.busy.add(task)
            task.add_done_callback(self.busy.discard)
            return

    async def _load(self, pointer: Pointer) -> None:
        began = time.monotonic()
        try:
            version = await asyncio.to_thread(self._read, pointer.version)
        except Exception as error:
            self._failed.add(pointer)
            self._metrics.load_failed()
            log.error("version %s cannot be loaded and does not answer: %s", version_name(pointer.version), error)
            return
        self._versions.add(version)
        log.info("version %s %s: loaded in %.1f s", version.name, version.about, time.monotonic() - began)

    def _read(self, digest: str) -> Version:
        return self._loader.load(*load_version(self._root, digest), warm=True)

    def _complain(self, error: Exception) -> None:
        if str(error) != self._complaint:  # once, not twice a second
            self._complaint = str(error)
            known = isinstance(error, (RegistryError, OSError))
            log.error("the registry cannot be followed: %s", error, exc_info=None if known else error)


def _size(directory: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in directory.glob("*"))
