"""The load generator against a server that answers at known times, in awkward pieces."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from bench.connection import BadAnswer, Exchange
from bench.load import HOST, Run, drive, request_bytes
from bench.row import Load
from bench.score import read, score

TOKENS = 5
GAP_SECONDS = 0.03


def event(body: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, framed: bool, broken: bool) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
    prompt = json.loads(await reader.readexactly(length))["prompt"]
    frame = chunk if framed else bytes
    writer.write(b"HTTP/1.1 200 OK\r\n" + (b"Transfer-Encoding: chunked\r\n" if framed else b"") + b"\r\n")
    for number in range(TOKENS):
        await asyncio.sleep(GAP_SECONDS)
        data = frame(event({"choices": [{"text": f"data: {number}"}]}))
        writer.write(data[:7])  # split inside the framing, the field name, or both
        await writer.drain()
        writer.write(data[7:])
    if not broken:
        usage = {"prompt_tokens": len(prompt), "completion_tokens": TOKENS}
        writer.write(
            frame(event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n") + (b"0\r\n\r\n" if framed else b"")
        )
    writer.close()


def load(load: Load, num_requests: int, *, framed: bool, broken: bool = False) -> Run:
    async def run() -> Run:
        server = await asyncio.start_server(lambda r, w: answer(r, w, framed=framed, broken=broken), HOST, 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            requests = [request_bytes(load, "m", random.Random(n)) for n in range(num_requests)]
            return await drive(port, requests, load.concurrency)

    return asyncio.run(run())


@pytest.mark.parametrize("framed", [True, False])
def test_figures_are_vllms(framed: bool) -> None:
    run = load(Load(7, TOKENS, 2), 4, framed=framed)
    figures = score(run.exchanges, run.duration)
    assert (figures["completed"], figures["failed"], figures["errors"]) == (4, 0, {})
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (28, 4 * TOKENS)
    assert figures["output_throughput"] == pytest.approx(4 * TOKENS / run.duration)
    for key in ("ttft", "itl", "tpot"):  # a busy machine is late, never early
        assert 0.8 * GAP_SECONDS < figures[f"median_{key}_ms"] / 1e3 < 6 * GAP_SECONDS
    assert figures["median_e2el_ms"] >= 1e3 * TOKENS * GAP_SECONDS


@pytest.mark.parametrize("framed", [True, False])
def test_a_broken_answer_counts_as_failed(framed: bool) -> None:
    run = load(Load(7, TOKENS, 1), 2, framed=framed, broken=True)
    figures = score(run.exchanges, run.duration)
    assert (figures["completed"], figures["failed"]) == (0, 2)
    assert figures["output_throughput"] == 0


@pytest.mark.parametrize(
    ("pieces", "complete", "said"),
    [
        ([], False, "no answer"),
        ([b"HTTP/1.1 503 Service Unavailable\r\n\r\n", b"full"], True, "503 Service Unavailable: full"),
        ([b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"message": "broke"}}\n\n'], True, "broke"),
    ],
)
def test_errors_say_what_came(pieces: list[bytes], complete: bool, said: str) -> None:
    with pytest.raises(BadAnswer, match=said):
        read(Exchange(0.0, [(1.0, piece) for piece in pieces], complete))


def test_each_event_has_the_time_of_its_last_byte() -> None:
    data = chunk(event({"choices": [1]}))
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    pieces = [(1.0, head + data[:9]), (2.0, data[9:-2]), (3.0, data[-2:] + data), (4.0, b"0\r\n\r\n")]
    assert [arrival for arrival, _ in Exchange(0.0, pieces, True).events()] == [2.0, 3.0]
