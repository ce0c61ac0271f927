"""One HTTP exchange under load: sends a request, keeps what comes back with its arrival times, reads it later.

The client's processor time is the server's loss on a small machine, so nothing is parsed while a run goes on: a piece
costs a clock reading and an append. `events` makes sense of the pieces afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

END_OF_HEAD = b"\r\n\r\n"


class BadAnswer(Exception):
    """Not a complete streamed answer with status 200; the message begins with what came instead."""


@dataclass(slots=True)
class Exchange:
    """A request as sent, and the pieces of its answer with the times they came."""

    sent: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    complete: bool = False

    def events(self, *, whole: bool = True) -> Iterator[tuple[float, bytes]]:
        """(arrival, data) of each server-sent event. Raises BadAnswer, for a missing end only if `whole`."""
        content = b"".join(piece for _, piece in self.pieces)
        head, _, body = content.partition(END_OF_HEAD)
        if (whole and not self.complete) or not head.startswith(b"HTTP/1.1 200"):
            status = head.split(b"\r\n")[0].decode("latin-1") or "no answer"
            raise BadAnswer(
                f"{status}: {body[:200].decode(errors='replace')}" if self.complete else f"cut off: {status}"
            )
        chunked = b"transfer-encoding: chunked" in head.lower()
        position, arrivals = len(head) + len(END_OF_HEAD), self._arrivals()
        end, arrival = next(arrivals)
        pending = b""
        while position < len(content):
            if chunked:
                line = content.find(b"\r\n", position)
                size = int(content[position:line], 16) if line >= 0 else len(content)
                text, position = content[line + 2 : line + 2 + size], line + 2 + size + 2
                if not size:
                    return
                if position > len(content):
                    if whole:
                        raise BadAnswer("cut off within a chunk")
                    return
            else:
                line = content.find(b"\n\n", position)
                line = len(content) if line < 0 else line + 2
                text, position = content[position:line], line
            while end < min(position, len(content)) - 2 * chunked:  # the piece that holds the text's last byte
                end, arrival = next(arrivals)
            *events, pending = (pending + text).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield arrival, event.removeprefix(b"data: ")
        if chunked and whole:
            raise BadAnswer("cut off between chunks")

    def _arrivals(self) -> Iterator[tuple[int, float]]:
        total = 0
        for arrival, piece in self.pieces:
            total += len(piece)
            yield total, arrival


class Connection(asyncio.Protocol):
    """One request and its answer. Each has a connection of its own, opened before the clock starts.

    Reuse would be a little cheaper, but llama.cpp's server closes streamed connections that it promised to keep, and
    every second request would be lost.
    """

    def __init__(self) -> None:
        self.exchange = Exchange(0.0)
        self._closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.exchange.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self.exchange.complete = error is None
        self._closed.set()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        self._transport.close()

    async def ended(self) -> None:
        await self._closed.wait()


async def exchange(host: str, port: int, request: bytes) -> Exchange:
    """Send `request`, which must ask for the connection's close, and wait for the end of its answer."""
    try:
        transport, connection = await asyncio.get_running_loop().create_connection(Connection, host, port)
    except OSError:
        return Exchange(time.perf_counter())
    connection.exchange.sent = time.perf_counter()
    transport.write(request)
    try:
        await connection.ended()
    finally:
        transport.close()
    return connection.exchange
