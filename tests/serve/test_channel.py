"""The way back to a reader: at most one chunk waits, and nothing of it is lost."""

from __future__ import annotations

import asyncio

from serve.channel import AsyncChannel
from serve.request import Chunk, TokenLogprob, Usage
from tests.serve.fakes import run


def test_a_slow_reader_gets_one_merged_chunk() -> None:
    channel = AsyncChannel()
    for number in range(3):
        channel.send(Chunk(text=str(number), token_ids=[number], logprobs=[TokenLogprob(number, -1.0)]))
    usage = Usage(prompt=1, completion=4, cached=0)
    channel.send(Chunk(text="!", token_ids=[9], finish_reason="stop", usage=usage))
    chunk = channel.take()
    assert chunk is not None
    assert (chunk.text, chunk.token_ids) == ("012!", [0, 1, 2, 9])
    assert [entry.token_id for entry in chunk.logprobs] == [0, 1, 2]
    assert (chunk.finish_reason, chunk.usage) == ("stop", usage)
    assert channel.take() is None


def test_a_closed_channel_takes_nothing() -> None:
    channel = AsyncChannel()
    channel.send(Chunk(text="a"))
    channel.close()
    channel.send(Chunk(text="b"))
    assert channel.closed
    assert channel.take() is None


def test_iteration_ends_with_the_answer() -> None:
    async def main() -> None:
        channel = AsyncChannel()
        loop = asyncio.get_running_loop()
        loop.call_soon(channel.send, Chunk(text="a"))
        told = []
        async for chunk in channel:
            told.append(chunk.text)
            loop.call_soon(channel.send, Chunk(text="b", finish_reason="stop"))
        assert told == ["a", "b"]

    run(main)
