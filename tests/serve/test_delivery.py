"""Delivery to the event loop: everything, in order, and no oftener than the loop can bear."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from serve.delivery import SECONDS_PER_CHUNK, Delivery
from serve.request import Chunk
from tests.serve.fakes import run
from tests.serve.tiny import ListChannel


class Clockwork:
    """An event loop whose time is told to it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        self.call_later(0, call)

    def call_later(self, wait: float, call: Callable[[], None]) -> None:
        self.calls.append((self.now + wait, call))

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self.calls and min(self.calls)[0] <= end:
            self.now, call = min(self.calls)
            self.calls.remove((self.now, call))
            call()
        self.now = end


def test_steps_slower_than_the_loop_are_delivered_at_once() -> None:
    loop: Any = Clockwork()
    deliver, channel = Delivery(loop), ListChannel()
    for number in range(5):
        deliver([(channel, Chunk(str(number)))])
        loop.advance(0)
        assert channel.text == "01234"[: number + 1]
        loop.advance(2 * SECONDS_PER_CHUNK)


def test_what_comes_too_fast_is_kept_for_one_turn_later() -> None:
    loop: Any = Clockwork()
    deliver, channels = Delivery(loop), [ListChannel() for _ in range(10)]
    deliver([(channel, Chunk("a")) for channel in channels])
    loop.advance(0)
    for text in "bcd":
        deliver([(channel, Chunk(text)) for channel in channels])
        loop.advance(SECONDS_PER_CHUNK)
    assert {channel.text for channel in channels} == {"a"}
    assert len(loop.calls) == 1, "the loop is woken once"
    loop.advance(7 * SECONDS_PER_CHUNK)
    assert {channel.text for channel in channels} == {"abcd"}
    loop.advance(1)
    assert loop.calls == []


@pytest.mark.parametrize("pace", [0, 1e-4])
def test_nothing_is_lost_or_out_of_order_between_threads(pace: float) -> None:
    async def main() -> None:
        deliver, channel = Delivery(asyncio.get_running_loop()), ListChannel()
        pause = threading.Event()

        def engine() -> None:
            for number in range(2000):
                deliver([(channel, Chunk(token_ids=[number]))])
                if pace:
                    pause.wait(pace)

        await asyncio.to_thread(engine)
        async with asyncio.timeout(30):
            while len(channel.chunks) < 2000:
                await asyncio.sleep(0)
        assert channel.tokens == list(range(2000))

    run(main)
