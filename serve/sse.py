"""Server-sent events at the cost of one `transport.write` per event."""

from __future__ import annotations

import asyncio

from aiohttp import web

from serve.http_limits import SERVER, GuardedProtocol

KEEP_ALIVE_SECONDS = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {
    "Server": SERVER,
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}


class EventStream:
    """An open event stream. While nothing is sent, comments keep proxies from closing it."""

    def __init__(self, response: web.StreamResponse, request: web.BaseRequest) -> None:
        assert request.transport is not None
        assert isinstance(request.protocol, GuardedProtocol)
        self.response = response
        self._transport = request.transport
        self._protocol = request.protocol
        self._chunked = request.version >= (1, 1)
        self._quiet = True
        self._timer = asyncio.get_running_loop().call_later(KEEP_ALIVE_SECONDS, self._tick)

    @classmethod
    async def open(cls, request: web.BaseRequest, headers: dict[str, str]) -> EventStream:
        """Send the response's headers."""
        response = web.StreamResponse(headers=HEADERS | headers)
        await response.prepare(request)
        if request.transport is None:
            raise ConnectionResetError("the client left")
        return cls(response, request)

    def send(self, events: bytes) -> None:
        """Write at once. Call `drained` before the next one, lest a slow client fill the memory."""
        self._quiet = False
        # aiohttp's own writer costs several calls per chunk; the framing is only this.
        self._transport.write(b"%x\r\n%b\r\n" % (len(events), events) if self._chunked else events)

    async def drained(self) -> None:
        await self._protocol.drained()

    async def end(self) -> None:
        await self.response.write_eof()

    def stop(self) -> None:
        """Stop the comments; must be called however the stream ends."""
        self._timer.cancel()

    def _tick(self) -> None:
        if self._quiet:
            self.send(KEEP_ALIVE)
        self._quiet = True
        self._timer = asyncio.get_running_loop().call_later(KEEP_ALIVE_SECONDS, self._tick)
