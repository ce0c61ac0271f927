"""aiohttp's protocol with the limits it lacks: deadlines for headers and bodies, a cap on connections and on bodies.

A client that trickles its headers is cut off at the deadline; one that trickles its body gets 408. What is not HTTP
gets OpenAI's error body too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler, RequestPayloadError
from aiohttp.web_response import StreamResponse

from serve.errors import InternalError, InvalidRequest, Overloaded, PawlError, TooLarge, Unauthenticated
from serve.settings import Settings

log = logging.getLogger("pawl.http")

SERVER = "pawl"  # aiohttp would tell its version and Python's
MAX_LINE_BYTES = 8190  # of the request line, and of one header
MAX_HEADERS = 64
IDLE_SECONDS = 75.0  # a kept-alive connection without a request; longer than usual proxies' 60 s
LINGER_SECONDS = 2.0  # reading what a refused client still sends, or it would see a reset instead of the refusal

Handler = Callable[[web.BaseRequest], Awaitable[StreamResponse]]


class RequestTimeout(PawlError):
    """The client took too long to send its request."""

    status = 408
    kind = "invalid_request_error"


class MethodNotAllowed(PawlError):
    """The route exists, with other methods."""

    status = 405
    kind = "invalid_request_error"


class UnsupportedMedia(PawlError):
    """Not JSON, or compressed."""

    status = 415
    kind = "invalid_request_error"


class HeadersTooLarge(PawlError):
    """The request line or a header exceeds its limit."""

    status = 431
    kind = "invalid_request_error"


def refuse(error: PawlError) -> web.Response:
    """OpenAI's error body."""
    headers = {"Server": SERVER}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    body = msgspec.json.encode(error_body(error))
    return web.Response(status=error.status, body=body, content_type="application/json", headers=headers)


def error_body(error: PawlError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


class GuardedServer(web.Server):
    """Makes a guarded protocol per connection."""

    def __init__(self, handler: Handler, settings: Settings) -> None:
        super().__init__(handler, handler_cancellation=True)
        self.settings = settings

    def __call__(self) -> RequestHandler:
        return GuardedProtocol(self, asyncio.get_running_loop())


class GuardedProtocol(RequestHandler):
    """One connection."""

    __slots__ = ("_body", "_guarded", "_header_timer")

    def __init__(self, server: GuardedServer, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # aiohttp takes None, which its annotation forgot
            auto_decompress=False,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=LINGER_SECONDS,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
        )
        self._guarded = server
        self._body: StreamReader | None = None  # of the latest request
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if len(self._guarded._connections) >= self._guarded.settings.max_connections:
            log.warning("closed a connection: %d are open, the limit", self._guarded.settings.max_connections)
            transport.close()
            return
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._headers_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        in_body = self._body is not None and not self._body.is_eof()
        seen = self._request_count
        super().data_received(data)
        if self._request_count != seen:
            self._headers_arrived()
            if self._messages:  # the handler starts later, so the newest request is still there
                self._body = self._messages[-1][1]
        elif data and not in_body and self._header_timer is None:
            self._expect_headers()

    async def drained(self) -> None:
        """Wait while the client reads too slowly for what was written."""
        if self._paused:
            await self._drain_helper()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> StreamResponse:
        """aiohttp's answer to what is not HTTP, and to a handler's bug; neither reaches our own handler."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, so no error can be sent")
        error: PawlError
        if isinstance(exc, LineTooLong):
            error = HeadersTooLarge(f"the request line or a header exceeds {MAX_LINE_BYTES} bytes")
        elif status < 500:
            error = InvalidRequest("the request is not valid HTTP")
        else:
            log.error("a handler failed", exc_info=exc)
            error = InternalError("the request failed inside the server")
        response = refuse(error)
        response.force_close()
        return response

    def _expect_headers(self) -> None:
        self._header_timer = self._loop.call_later(self._guarded.settings.header_seconds, self.force_close)

    def _headers_arrived(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


async def read_json(request: web.BaseRequest, settings: Settings) -> bytes:
    """The body, within its limits of type, size and time. Raises a PawlError."""
    # A page of another origin can send a browser's form here without being asked, but no JSON.
    if request.content_type != "application/json":
        raise UnsupportedMedia("the body must be JSON, announced by `Content-Type: application/json`")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("compressed bodies are not accepted; send it without Content-Encoding")
    limit = settings.body_limit_bytes
    if (request.content_length or 0) > limit:
        raise TooLarge(f"the body has {request.content_length} bytes; the limit is {limit}")
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > limit:
                    raise TooLarge(f"the body exceeds the limit of {limit} bytes")
    except TimeoutError as error:
        raise RequestTimeout(f"the body did not arrive within {settings.body_seconds:g} s") from error
    except (RequestPayloadError, web.PayloadAccessError) as error:
        raise InvalidRequest("the body is not what its HTTP headers announce") from error
    return bytes(body)
