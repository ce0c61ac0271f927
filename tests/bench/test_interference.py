"""What counts for which phase, and the whole scenario against a server of this test's own."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from bench import interference
from bench.connection import Exchange
from bench.interference import Phases, drive, score
from bench.load import HOST, request_bytes
from bench.row import Load

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
EVENT = b'data: {"choices": [{"text": "x"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 1}}\n\ndata: [DONE]\n\n'
TOKEN_SECONDS = 0.01
BLOCK_SECONDS = 0.1


def stream(*arrivals: float) -> Exchange:
    return Exchange(0.0, [(0.0, HEAD), *((arrival, EVENT) for arrival in arrivals)], complete=False)


def test_a_gap_belongs_to_the_phase_that_it_touches() -> None:
    # settling; two quiet gaps of 1 s; one into the noisy phase of 2 s, one out of it of 4 s; afterwards
    figures = score([stream(0.0, 5.0, 10.0, 11.0, 12.0, 14.0, 18.0, 19.0)], Phases(quiet=10.0, noisy=13.0, end=15.0))
    assert figures["quiet"] == pytest.approx(
        {"tokens_per_second": 2 / 3, "median_itl_ms": 1000, "p99_itl_ms": 1000, "max_itl_ms": 1000}
    )
    assert figures["noisy"]["max_itl_ms"] == pytest.approx(4000)
    assert figures["noisy"]["tokens_per_second"] == pytest.approx(1)
    assert figures["median_itl_ms_ratio"] == pytest.approx(3)


def test_long_prompts_show_in_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interference, "INTERVAL_SECONDS", 0.4)
    blocked = asyncio.Event()
    answered: list[int] = []
    open_connections: set[asyncio.StreamWriter] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        writer.write(HEAD)
        open_connections.add(writer)
        if body["max_tokens"] == 1:
            blocked.set()
            await asyncio.sleep(BLOCK_SECONDS)
            blocked.clear()
            answered.append(len(body["prompt"]))
            if len(answered) == 1:  # the second is left without an answer
                writer.write(EVENT + USAGE)
                writer.close()
        while not writer.is_closing():
            writer.write(EVENT)
            await asyncio.sleep(3 * TOKEN_SECONDS if blocked.is_set() else TOKEN_SECONDS)
        open_connections.remove(writer)

    async def run() -> dict[str, object]:
        server = await asyncio.start_server(answer, HOST, 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            requests = [request_bytes(Load(8, 1000, 2), "m", random.Random(n)) for n in range(2)]
            figures = await drive(port, "m", requests, Load(40, 1, 1), 1.0)
            while open_connections:  # until the server has noticed that they were closed
                await asyncio.sleep(TOKEN_SECONDS)
            return figures

    figures = asyncio.run(run())
    assert (figures["streams"], figures["streams_ended_early"]) == (2, 0)
    assert (figures["long_prompts_answered"], figures["errors"]) == (1, [])
    assert figures["long_prompts_sent"] > 1  # type: ignore[operator]
    assert figures["noisy"]["p99_itl_ms"] >= 3e3 * TOKEN_SECONDS  # type: ignore[index]
