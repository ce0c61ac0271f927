"""Several engines behind one door: one on each device, each with the whole model and a KV cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from serve.engine import Engine
from serve.request import Request


class Engines:
    """What `Version` asks of an engine. A request stays on the engine that took it."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines

    def submit(self, *requests: Request) -> None:
        """Queue all or none on the engine that has fewest. Raises as `Engine.submit`."""
        min(self.engines, key=lambda engine: engine.load).submit(*requests)

    @property
    def draining(self) -> bool:
        return any(engine.draining for engine in self.engines)

    def drain(self, timeout_seconds: float) -> bool:
        """Drain them all at once. False if requests had to be aborted."""
        with ThreadPoolExecutor(len(self.engines)) as pool:
            return all(list(pool.map(lambda engine: engine.drain(timeout_seconds), self.engines)))
