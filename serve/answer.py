"""A call's answers as one stream of (index, chunk); the answer that is not streamed is its fold."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from serve.channel import AsyncChannel, Bell, merge
from serve.request import Chunk, FinishReason, Request, Usage

if TYPE_CHECKING:
    from serve.version import Version

Ended = Callable[["Answer", int], None]


class Answer:
    """What the engine says to one call: `n` answers to each prompt, numbered prompt * n + copy.

    With `echoes`, a text for each prompt, every answer begins with its prompt: that text, and its tokens. Use it in a
    `with`: leaving it cancels in the engine whatever is not finished.
    """

    def __init__(
        self,
        id: str,
        model: str,
        version: Version,
        requests: list[Request],
        bell: Bell,
        n: int,
        ended: Ended,
        echoes: Sequence[str] | None = None,
    ) -> None:
        self.id = id
        self.model = model
        self.version = version
        self.created = int(time.time())
        self.requests = requests
        self.texts: list[list[str]] = [[] for _ in requests]
        self.reasons: list[FinishReason] = ["abort"] * len(requests)
        self.n = n
        self._bell = bell
        self._ended = ended
        self._channels = [channel for r in requests if isinstance(channel := r.channel, AsyncChannel)]
        self._usages = [request.usage for request in requests]
        self._open = list(range(len(requests)))
        self._echoes = echoes
        self._unechoed = set(self._open if echoes else ())

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> tuple[int, Chunk]:
        """The next chunk of any of the answers. Raises the error that ended one of them."""
        while self._open:
            for index in self._open:
                if (chunk := self._channels[index].take()) is not None:
                    if chunk.text:
                        self.texts[index].append(chunk.text)
                    if chunk.finish_reason is not None:
                        self._finish(index, chunk)
                    if index in self._unechoed:
                        self._begin(index, chunk)
                    return index, chunk
            await self._bell.wait()
        raise StopAsyncIteration

    async def fold(self) -> list[Chunk]:
        """Wait for the end; each answer as one chunk."""
        whole: list[Chunk] = [Chunk() for _ in self.requests]
        async for index, chunk in self:
            merge(whole[index], chunk)
        return whole

    @property
    def done(self) -> bool:
        return not self._open

    @property
    def usage(self) -> Usage:
        """Counts so far over all answers; copies share their prompt, which counts once."""
        prompts = self._usages[:: self.n]
        return Usage(
            prompt=sum(usage.prompt for usage in prompts),
            completion=sum(usage.completion for usage in self._usages),
            cached=sum(usage.cached for usage in prompts),
        )

    def echo_of(self, index: int) -> str | None:
        """The text that an answer begins with, if it is its prompt."""
        return None if self._echoes is None else self._echoes[index // self.n]

    def usage_of(self, index: int) -> Usage:
        return self._usages[index]

    def close(self) -> None:
        """Cancel what is not finished. Harmless when repeated."""
        for index in self._open:
            self._channels[index].close()
            self._usages[index] = self.requests[index].usage
            self._ended(self, index)
        self._open = []

    def _begin(self, index: int, chunk: Chunk) -> None:
        """Put the prompt before an answer's first chunk."""
        self._unechoed.remove(index)
        chunk.text = (self.echo_of(index) or "") + chunk.text
        chunk.token_ids = self.requests[index].prompt + chunk.token_ids
        chunk.logprobs, chunk.prompt_logprobs = chunk.prompt_logprobs + chunk.logprobs, []

    def _finish(self, index: int, chunk: Chunk) -> None:
        self._open.remove(index)
        self._channels[index].close()
        self._usages[index] = chunk.usage or self.requests[index].usage
        self.reasons[index] = chunk.finish_reason or "error"
        self._ended(self, index)
        if chunk.error is not None:
            raise chunk.error
