"""The HTTP adapter: OpenAI's API, TensorZero's feedback, health and metrics, over one Service."""

from __future__ import annotations

import base64
import logging
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
from aiohttp import web

from serve.answer import Answer
from serve.api import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    FeedbackRequest,
    Generate,
    TokenizeRequest,
    parse,
)
from serve.auth import Keys, Scope, check_request_id
from serve.errors import Draining, InternalError, NotFound, PawlError
from serve.http_limits import SERVER, GuardedServer, MethodNotAllowed, read_json, refuse
from serve.logs import REQUEST_ID
from serve.metrics import version_name
from serve.openai_json import Events, usage_json, whole_json
from serve.parsing import show
from serve.service import Service
from serve.settings import Settings
from serve.sse import EventStream

log = logging.getLogger("pawl.http")

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
MODEL_PREFIX = "/v1/models/"
OPEN = {"/", "/health", "/ready"}  # the page is static; what it calls is not open
SCOPES: dict[str, Scope] = {"/metrics": "metrics", "/v1/feedback": "feedback", "/feedback": "feedback"}
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}  # others share one metric label
CLIENT_LEFT = 499  # nginx's number, for the metric only

Route = Callable[[web.BaseRequest, str], Awaitable[web.StreamResponse]]


class HttpApi:
    """Routes, and the translation between JSON and the service's terms."""

    def __init__(self, service: Service, settings: Settings) -> None:
        self.service = service
        self.settings = settings
        self.keys = Keys(settings.api_key, settings.api_keys)
        self.page = PAGE.read_bytes() if PAGE.is_file() else None
        self.routes: dict[str, tuple[str, Route]] = {
            "/": ("GET", self.index),
            "/health": ("GET", self.health),
            "/ready": ("GET", self.ready),
            "/metrics": ("GET", self.metrics),
            "/v1/models": ("GET", self.models),
            MODEL_PREFIX + "{id}": ("GET", self.model),
            "/v1/completions": ("POST", self.completions),
            "/v1/chat/completions": ("POST", self.chat),
            "/v1/embeddings": ("POST", self.embeddings),
            "/v1/feedback": ("POST", self.feedback),
            "/feedback": ("POST", self.feedback),
            "/tokenize": ("POST", self.tokenize),
            "/detokenize": ("POST", self.detokenize),
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request: route, authenticate, answer or refuse, count."""
        path = request.path
        name = MODEL_PREFIX + "{id}" if path.startswith(MODEL_PREFIX) and path != MODEL_PREFIX else path
        status, request_id = CLIENT_LEFT, ""
        response: web.StreamResponse
        try:
            try:
                REQUEST_ID.set("")  # the task answers one request of a connection after another
                request_id = check_request_id(request.headers.get("X-Request-Id", ""))
                REQUEST_ID.set(request_id)
                response = await self._resolve(request, name)(request, request_id)
            except PawlError as error:
                response = refuse(error)
                if isinstance(error, MethodNotAllowed):
                    response.headers["Allow"] = self.routes[name][0]
            except ConnectionError:
                raise
            except Exception:
                log.exception("a handler failed")
                response = refuse(InternalError("the request failed inside the server"))
            if not response.prepared:
                response.headers["Server"] = SERVER
                if request_id:
                    response.headers["X-Request-Id"] = request_id
            status = response.status
            return response
        finally:
            method = request.method if request.method in METHODS else "other"
            self.service.metrics.http(name if name in self.routes else "unknown", method, status)

    def _resolve(self, request: web.BaseRequest, name: str) -> Route:
        if name not in OPEN:
            self._caller(request, SCOPES.get(name, "generate"))
        if name not in self.routes:
            raise NotFound(f"there is no route {show(request.path)}")
        method, route = self.routes[name]
        if request.method != method and (request.method, method) != ("HEAD", "GET"):
            raise MethodNotAllowed(f"{name} is called with {method}, not {show(request.method)}")
        return route

    def _caller(self, request: web.BaseRequest, scope: Scope) -> str | None:
        return self.keys.check(request.headers.get("Authorization", ""), scope)

    # -- generation ---------------------------------------------------------------------------------------------

    async def completions(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        call = parse(CompletionRequest, await read_json(request, self.settings))
        return await self._answer(request, call, await self.service.complete(call, request_id), request_id)

    async def chat(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        call = parse(ChatRequest, await read_json(request, self.settings))
        return await self._answer(request, call, await self.service.chat(call, request_id), request_id)

    async def _answer(
        self, request: web.BaseRequest, call: Generate, answer: Answer, request_id: str
    ) -> web.StreamResponse:
        chat = isinstance(call, ChatRequest)
        with answer:  # leaving cancels: aiohttp cancels this task when the client leaves
            if not call.stream:
                chunks = await answer.fold()
                work = partial(whole_json, answer, chunks, chat=chat)
                return _json_bytes(await self.service.offload(sum(chunk.num_named for chunk in chunks), work))
            include_usage = call.stream_options is not None and call.stream_options.include_usage
            events = Events(answer, chat=chat, include_usage=include_usage)
            stream = await EventStream.open(request, {"X-Request-Id": request_id} if request_id else {})
            try:
                async for index, chunk in answer:
                    if event := await self.service.offload(chunk.num_named, partial(events.of, index, chunk)):
                        stream.send(event)
                        await stream.drained()
                stream.send(events.end())
            except PawlError as error:
                stream.send(events.error(error))
            finally:
                stream.stop()
            await stream.end()
            return stream.response

    async def embeddings(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        call = parse(EmbeddingRequest, await read_json(request, self.settings))
        with await self.service.embed(call, request_id) as answer:
            vectors = [list(chunk.embedding or ()) for chunk in await answer.fold()]
        base64_wanted = call.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if base64_wanted else vector}
            for index, vector in enumerate(vectors)
        ]
        return _json({"object": "list", "data": data, "model": answer.model, "usage": usage_json(answer.usage)})

    # -- the rest -----------------------------------------------------------------------------------------------

    async def tokenize(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        call = parse(TokenizeRequest, await read_json(request, self.settings))
        tokens, strs, max_context = await self.service.tokenize(call)
        body = {"tokens": tokens, "count": len(tokens), "max_model_len": max_context}
        return _json(body if strs is None else body | {"token_strs": strs})

    async def detokenize(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        call = parse(DetokenizeRequest, await read_json(request, self.settings))
        return _json({"prompt": await self.service.detokenize(call)})

    async def feedback(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        call = parse(FeedbackRequest, await read_json(request, self.settings))
        source = self._caller(request, "feedback")
        feedback_id = await self.service.feedback(call, request.headers.get("Idempotency-Key"), source)
        return _json({"feedback_id": feedback_id})

    async def models(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        return _json({"object": "list", "data": [{"object": "model"} | model for model in self.service.models()]})

    async def model(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        name = unquote(request.path.removeprefix(MODEL_PREFIX))
        for model in self.service.models():
            if name in (model["id"], model["digest"], version_name(model["digest"])):
                return _json({"object": "model"} | model)
        raise NotFound(f"model {show(name)} is not served here; this server serves {self.service.model!r}")

    async def health(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        return _json({"status": "ok"})

    async def ready(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        if self.service.draining:
            raise Draining("the server is shutting down")
        return _json({"status": "ready"})

    async def metrics(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        body, content_type = self.service.metrics.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def index(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        if self.page is None:
            raise NotFound("this server has no page; see /v1/models")
        return web.Response(body=self.page, content_type="text/html", charset="utf-8", headers=PAGE_HEADERS)


class HttpServer:
    """A running server. `port` is the one it listens on."""

    def __init__(self, runner: web.ServerRunner, port: int) -> None:
        self._runner = runner
        self.port = port

    @property
    def num_connections(self) -> int:
        server = self._runner.server
        return 0 if server is None else len(server.connections)

    async def stop(self) -> None:
        """Accept nothing new, let running answers finish within `drain_seconds`, close."""
        await self._runner.cleanup()


async def start_http(service: Service, settings: Settings) -> HttpServer:
    """Listen on `settings.host` and `settings.http_port`; 0 picks a free port."""
    server = GuardedServer(HttpApi(service, settings).handle, settings)
    runner = web.ServerRunner(server, shutdown_timeout=settings.drain_seconds)
    await runner.setup()
    site = web.TCPSite(runner, settings.host, settings.http_port, backlog=min(settings.max_connections, 1024))
    await site.start()
    return HttpServer(runner, site.port)


def _json(body: Any) -> web.Response:
    return _json_bytes(msgspec.json.encode(body))


def _json_bytes(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
