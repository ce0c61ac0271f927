"""The way back from the engine to one reader on the event loop. A slow reader gets fewer, merged chunks.

Everything here runs on the loop's thread but `closed`, which the engine reads from its own.
"""

from __future__ import annotations

import asyncio

from serve.request import Chunk


class Bell:
    """Wakes the one task that waits for any of several channels."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Until the next ring. Look for chunks first: a ring that nobody awaits is lost."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class AsyncChannel:
    """One request's answer on its way. Holds at most one pending chunk, into which later ones are merged."""

    __slots__ = ("_bell", "_pending", "closed")

    def __init__(self, bell: Bell | None = None) -> None:
        self._bell = bell or Bell()
        self._pending: Chunk | None = None
        self.closed = False

    def send(self, chunk: Chunk) -> None:
        """Called by the engine's delivery, on the loop's thread."""
        if self.closed:
            return
        if self._pending is None:
            self._pending = chunk
            self._bell.ring()
        else:
            merge(self._pending, chunk)

    def take(self) -> Chunk | None:
        """What has come since the last `take`, if anything."""
        chunk, self._pending = self._pending, None
        return chunk

    def close(self) -> None:
        """Cancel the request, unless it is finished. What was pending is dropped."""
        self.closed = True
        self._pending = None

    def __aiter__(self) -> AsyncChannel:
        return self

    async def __anext__(self) -> Chunk:
        while (chunk := self.take()) is None:
            if self.closed:
                raise StopAsyncIteration
            await self._bell.wait()
        self.closed = chunk.finish_reason is not None
        return chunk


def merge(into: Chunk, chunk: Chunk) -> None:
    """Append `chunk`, as if both had come in one step."""
    into.text += chunk.text
    into.token_ids += chunk.token_ids
    into.logprobs += chunk.logprobs
    into.prompt_logprobs += chunk.prompt_logprobs
    into.finish_reason = chunk.finish_reason or into.finish_reason
    into.usage = chunk.usage or into.usage
    into.error = chunk.error or into.error
    into.embedding = chunk.embedding if chunk.embedding is not None else into.embedding
