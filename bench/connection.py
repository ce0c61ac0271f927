"""One HTTP connection for load: sends a request, keeps what comes back with its arrival times, reads it later.

The client's processor time is the server's loss on a small machine, so nothing is parsed while a run goes on: a piece
costs a clock reading and an append. `events` makes sense of the pieces afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

LAST_CHUNK = b"\r\n0\r\n\r\n"
END_OF_HEAD = b"\r\n\r\n"


class BadAnswer(Exception):
    """Not a complete streamed answer with status 200; the message begins with what came instead."""


@dataclass(slots=True)
class Exchange:
    """A request as sent, and the pieces of its answer with the times they came."""

    sent: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    complete: bool = False

    def events(self) -> Iterator[tuple[float, bytes]]:
        """(arrival, data) of each server-sent event. Raises BadAnswer."""
        whole = b"".join(piece for _, piece in self.pieces)
        head, _, body = whole.partition(END_OF_HEAD)
        if not self.complete or not head.startswith(b"HTTP/1.1 200"):
            status = head.split(b"\r\n")[0].decode("latin-1") or "no answer"
            raise BadAnswer(
                f"{status}: {body[:200].decode(errors='replace')}" if self.complete else f"cut off: {status}"
            )
        chunked = b"transfer-encoding: chunked" in head.lower()
        position, arrivals = len(head) + len(END_OF_HEAD), self._arrivals()
        end, arrival = next(arrivals)
        pending = b""
        while position < len(whole):
            size, text = len(whole) - position, whole[position:]
            if chunked:
                line = whole.index(b"\r\n", position)
                size, start = int(whole[position:line], 16), line + 2
                text, position = whole[start : start + size], start + size + 2
            else:
                position += size
            while end < position - 2:
                end, arrival = next(arrivals)
            *events, pending = (pending + text).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield arrival, event.removeprefix(b"data: ")

    def _arrivals(self) -> Iterator[tuple[int, float]]:
        total = 0
        for arrival, piece in self.pieces:
            total += len(piece)
            yield total, arrival


class Connection(asyncio.Protocol):
    """Keeps one connection to the server, opened anew when the server closes it."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None
        self._tail = b""

    async def send(self, request: bytes) -> Exchange:
        """Send `request`, wait for the end of its answer or of the connection."""
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            await loop.create_connection(lambda: self, self.host, self.port)
        assert self._transport is not None
        self._done = loop.create_future()
        self._tail = b""
        self._exchange = exchange = Exchange(time.perf_counter())
        self._transport.write(request)
        await self._done
        head = exchange.pieces[0][1][:1024].lower() if exchange.pieces else b""
        if b"connection: close" in head or not head.startswith(b"http/1.1 200"):
            self.close()
        return exchange

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            return
        self._exchange.pieces.append((time.perf_counter(), data))
        self._tail = (
            (self._tail + data)[-len(LAST_CHUNK) :] if len(data) < len(LAST_CHUNK) else data[-len(LAST_CHUNK) :]
        )
        if self._tail == LAST_CHUNK or not self._exchange.pieces[0][1].startswith(b"HTTP/1.1 200"):
            self._finish(complete=True)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        # Without chunks the end of the connection ends the answer; with them it cuts it off.
        pieces = self._exchange.pieces if self._exchange else []
        whole = bool(pieces) and b"transfer-encoding: chunked" not in pieces[0][1][:2048].lower()
        self._finish(complete=whole and error is None)

    def _finish(self, *, complete: bool) -> None:
        if self._exchange is not None and self._done is not None and not self._done.done():
            self._exchange.complete = complete
            self._done.set_result(None)
