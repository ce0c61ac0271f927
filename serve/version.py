"""A version in memory: a verified artifact, and the engine that answers with it while requests may come.

1 loaded, its weights in memory; 2 started, with an engine and a KV cache; 3 given up: what was begun on it is
finished, then the engine and its cache go; 4 dropped, or started again without being loaded again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from proto.manifest import Manifest
from proto.records import new_id
from serve.errors import InvalidRequest
from serve.metrics import version_name

if TYPE_CHECKING:
    from serve.engine import Engine
    from serve.engines import Engines
    from serve.tokenizer import Tokenizer


class Version:
    """Lives on the event loop, but for its making. `max_context`: the most tokens of a request."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        max_context: int,
        make_engine: Callable[[], Engine | Engines],
        about: str = "",
    ) -> None:
        """`make_engine` makes one that runs, in milliseconds; `about`: what it is and what was chosen, in words."""
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.about = about
        self.digest = manifest.digest
        self.name = version_name(self.digest)
        self.vocab_size = manifest.architecture.vocab_size
        self.loaded = int(time.time())
        self._make_engine = make_engine
        self._engine: Engine | Engines | None = None
        self._uses = 0
        self._released = asyncio.Event()

    @property
    def started(self) -> bool:
        return self._engine is not None

    @property
    def engine(self) -> Engine | Engines:
        assert self._engine is not None
        return self._engine

    def start(self) -> None:
        """Be ready for requests."""
        if self._engine is None:
            self._engine = self._make_engine()

    async def stop(self, timeout_seconds: float) -> bool:
        """Refuse requests, finish those that were accepted, free the KV cache. False if some had to be aborted."""
        if self._engine is None:
            return True
        engine, self._engine = self._engine, None
        return await asyncio.to_thread(engine.drain, timeout_seconds)

    def new_id(self, prefix: str) -> str:
        """A fresh id for an answer of this version."""
        return new_id(f"{prefix}-{self.name}")

    def check_length(self, prompt: list[int], param: str, *, room: int) -> None:
        """Raise InvalidRequest unless the prompt fits the context with `room` more tokens."""
        if not prompt:
            raise InvalidRequest(f"{param} is empty; give at least one token", param=param)
        if len(prompt) + room > self.max_context:
            raise InvalidRequest(
                f"{param} has {len(prompt)} tokens and the context is {self.max_context}, prompt and completion "
                "together; shorten it",
                param=param,
            )

    def hold(self) -> None:
        """A call counts on this version, until as many times `release` was called."""
        self._uses += 1

    def release(self) -> None:
        self._uses -= 1
        self._released.set()

    async def unused(self) -> None:
        """Wait until nobody counts on it."""
        while self._uses:
            self._released.clear()
            await self._released.wait()


def asked_of(inference_id: str) -> str:
    """The short name of the version that gave an answer, from the answer's id."""
    return inference_id.split("-")[1] if inference_id.count("-") > 1 else ""
