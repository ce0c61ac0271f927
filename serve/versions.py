"""The versions in memory, and which one answers a request: `current`, or for a share of the traffic `candidate`.

A request stays with the version it was given to, until it ends. So a switch changes only where the next one goes; the
version that is left finishes what it has, then gives back its KV cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from serve.errors import NotFound
from serve.version import Version

if TYPE_CHECKING:
    from serve.metrics import Metrics

log = logging.getLogger("pawl.versions")


class Versions:
    """Lives on the event loop. `name` is the model's, whatever its version."""

    def __init__(self, name: str, current: Version, metrics: Metrics, drain_seconds: float) -> None:
        self.name = name
        self.loaded: dict[str, Version] = {}
        self.current = current
        self.candidate: Version | None = None
        self.share = 0.0  # of the traffic, that goes to the candidate
        self._metrics = metrics
        self._drain_seconds = drain_seconds
        self._started: set[Version] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.add(current)
        self.assign(current)

    # -- requests -----------------------------------------------------------------------------------------------

    @contextmanager
    def route(self, model: str, key: str = "") -> Iterator[Version]:
        """The version that answers; it stays as long as the caller is inside. Raises NotFound.

        The same `key` goes the same way as long as candidate and share stay, on every replica and after a restart. A
        larger share keeps those who had the candidate already.
        """
        version = self._choose(model, key)
        version.hold()
        try:
            yield version
        finally:
            version.release()

    def _choose(self, model: str, key: str) -> Version:
        if model in ("", self.name):
            candidate = self.candidate
            return candidate if candidate is not None and point(candidate.digest, key) < self.share else self.current
        for version in self.live:
            if model in (version.digest, version.name):
                return version
        served = ", ".join(repr(version.name) for version in self.live)
        raise NotFound(
            f"model {model!r} is not served here; this server serves {self.name!r}, in version {served}", param="model"
        )

    @property
    def live(self) -> list[Version]:
        """Those that answer, the current one first."""
        return [self.current] if self.candidate is None else [self.current, self.candidate]

    @property
    def draining(self) -> bool:
        """True once nothing new is accepted."""
        return self.current.engine.draining

    @property
    def shares(self) -> dict[str, float]:
        """What part of the traffic each of them gets, by digest."""
        shares = {self.current.digest: 1.0 - self.share}
        return shares if self.candidate is None else shares | {self.candidate.digest: self.share}

    # -- changes ------------------------------------------------------------------------------------------------

    @property
    def leaving(self) -> set[Version]:
        """Those that answer no new request and still have a KV cache."""
        return self._started - {*self.live}

    @property
    def idle(self) -> list[Version]:
        """Those that are in memory without a KV cache."""
        return [version for version in self.loaded.values() if version not in self._started]

    def add(self, version: Version) -> None:
        """A version was loaded."""
        self.loaded[version.digest] = version

    def assign(self, current: Version, candidate: Version | None = None, share: float = 0.0) -> None:
        """From now on new requests go to these. What goes wrong in starting them is raised, and nothing changes."""
        live = [current] if candidate is None else [current, candidate]
        for version in live:
            version.start()
            self._started.add(version)
        self.current, self.candidate, self.share = current, candidate, share
        self._metrics.roles(self.shares)
        for version in self.leaving:
            self._spawn(self._leave(version))

    def drop(self, version: Version) -> None:
        """Out of the memory. It must have no engine: what answers, or is leaving, stays."""
        assert version not in self._started
        del self.loaded[version.digest]
        self._metrics.forget(version.digest)

    async def drain(self) -> bool:
        """Refuse what comes, finish what was accepted, stop. False if requests had to be aborted."""
        engines = [version.engine for version in self._started if version.started]
        drains = [asyncio.to_thread(engine.drain, self._drain_seconds) for engine in engines]
        finished = await asyncio.gather(*drains)
        for task in self._tasks:
            task.cancel()
        return all(finished)

    async def _leave(self, version: Version) -> None:
        await version.unused()
        if version in self.live:
            return  # called back meanwhile
        await version.stop(self._drain_seconds)
        if version in self._started and not version.started:
            self._started.remove(version)
            self._metrics.engine_ended(version.digest)
            log.info("version %s has finished and given back its KV cache", version.name)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def point(salt: str, key: str) -> float:
    """Where a key lies between 0 and 1: evenly spread, and anew for every salt."""
    digest = hashlib.sha256(f"{salt}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") / 2**32
