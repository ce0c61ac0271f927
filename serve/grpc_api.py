"""The gRPC adapter: the service of proto/inference.proto, health and reflection, over one Service.

Messages are parsed here, not by grpc, whose answer to garbage would be INTERNAL. Their fields then pass the same
validator as JSON does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from proto import inference_pb2 as pb
from serve.answer import Answer
from serve.api import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    FeedbackRequest,
    TokenizeRequest,
    parse,
)
from serve.auth import Keys, Scope, check_request_id
from serve.errors import (
    Draining,
    Forbidden,
    InsufficientStorage,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PawlError,
    TimedOut,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from serve.grpc_messages import chunk_message, decode, fields_of, join_inputs, usage_message
from serve.logs import REQUEST_ID
from serve.service import Service
from serve.settings import Settings

log = logging.getLogger("pawl.grpc")

NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH = "/grpc.health.v1.Health/"
FEEDBACK = f"/{NAME}/SendFeedback"
READINESS = ("", "readiness", NAME)  # health services that drain; "liveness" stays
CODES: dict[type[PawlError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    TooLarge: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Draining: grpc.StatusCode.UNAVAILABLE,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    InsufficientStorage: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TimedOut: grpc.StatusCode.DEADLINE_EXCEEDED,
    InternalError: grpc.StatusCode.INTERNAL,
}
CLIENT_LEFT = 499  # nginx's number, for the metric only
STOP_SECONDS = 0.5  # for the last statuses to leave; idle health watchers would wait for ever

Checks: TypeAlias = health.aio.HealthServicer
Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[bytes, Context, str], Awaitable[Message | None]]


class GrpcApi:
    """The methods, and the translation between messages and the service's terms."""

    def __init__(self, service: Service, keys: Keys) -> None:
        self.service = service
        self.keys = keys
        self.idle = asyncio.Event()  # no call is running
        self.idle.set()
        self._running = 0
        self._methods: dict[str, Method] = {
            "Complete": self.complete,
            "Chat": self.chat,
            "Embed": self.embed,
            "Tokenize": self.tokenize,
            "Detokenize": self.detokenize,
            "ListModels": self.list_models,
            "SendFeedback": self.send_feedback,
        }

    def handlers(self) -> grpc.GenericRpcHandler:
        """What grpc calls, for every method of the contract."""
        made: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for method in pb.DESCRIPTOR.services_by_name["Inference"].methods:
            make = (
                grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
            )
            made[method.name] = make(self._guarded(method.name), response_serializer=_serialize)
        return grpc.method_handlers_generic_handler(NAME, made)

    def _guarded(self, name: str) -> Callable[[bytes, Context], Awaitable[Message | None]]:
        method, path = self._methods[name], f"/{NAME}/{name}"

        async def call(data: bytes, context: Context) -> Message | None:
            """Every call: answer or refuse, count."""
            self._running += 1
            self.idle.clear()
            status = CLIENT_LEFT
            try:
                try:
                    request_id = check_request_id(_metadata(context.invocation_metadata(), "x-request-id"))
                    REQUEST_ID.set(request_id)
                    if request_id:
                        await context.send_initial_metadata((("x-request-id", request_id),))
                    response = await method(data, context, request_id)
                    status = 200
                    return response
                except PawlError as error:
                    status = error.status
                    await _abort(context, error)
                except Exception:
                    status = InternalError.status
                    log.exception("%s failed", path)
                    await _abort(context, InternalError("the call failed inside the server"))
            finally:
                self.service.metrics.http(path, "GRPC", status)
                self._running -= 1
                if not self._running:
                    self.idle.set()

        return call

    # -- the methods of the contract, in its order --------------------------------------------------------------

    async def complete(self, data: bytes, context: Context, request_id: str) -> None:
        call = parse(CompletionRequest, join_inputs(fields_of(decode(pb.CompletionRequest, data)), "prompt"))
        await self._stream(context, await self.service.complete(call, request_id))

    async def chat(self, data: bytes, context: Context, request_id: str) -> None:
        call = parse(ChatRequest, fields_of(decode(pb.ChatRequest, data)))
        await self._stream(context, await self.service.chat(call, request_id))

    async def embed(self, data: bytes, context: Context, request_id: str) -> Message:
        call = parse(EmbeddingRequest, join_inputs(fields_of(decode(pb.EmbeddingRequest, data)), "input"))
        with await self.service.embed(call, request_id) as answer:
            chunks = await answer.fold()
        rows = [pb.Embedding(index=index, embedding=chunk.embedding or ()) for index, chunk in enumerate(chunks)]
        return pb.EmbeddingResponse(data=rows, model=answer.model, usage=usage_message(answer.usage))

    async def tokenize(self, data: bytes, context: Context, request_id: str) -> Message:
        fields = fields_of(decode(pb.TokenizeRequest, data))
        fields["messages"] = fields["messages"] or None  # protobuf cannot tell an empty list from none
        tokens, strs, max_context = await self.service.tokenize(parse(TokenizeRequest, fields))
        return pb.TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=max_context, token_strs=strs or ())

    async def detokenize(self, data: bytes, context: Context, request_id: str) -> Message:
        call = parse(DetokenizeRequest, fields_of(decode(pb.DetokenizeRequest, data)))
        return pb.DetokenizeResponse(prompt=await self.service.detokenize(call))

    async def list_models(self, data: bytes, context: Context, request_id: str) -> Message:
        decode(pb.ListModelsRequest, data)
        return pb.ListModelsResponse(data=[json_format.ParseDict(model, pb.Model()) for model in self.service.models()])

    async def send_feedback(self, data: bytes, context: Context, request_id: str) -> Message:
        call = parse(FeedbackRequest, fields_of(decode(pb.FeedbackRequest, data)))
        metadata = context.invocation_metadata()
        source = self.keys.check(_metadata(metadata, "authorization"), "feedback")
        key = _metadata(metadata, "idempotency-key") or None
        return pb.FeedbackResponse(feedback_id=await self.service.feedback(call, key, source))

    async def _stream(self, context: Context, answer: Answer) -> None:
        with answer:  # leaving cancels: grpc cancels this task when the client leaves or its deadline passes
            async for index, chunk in answer:
                work = partial(chunk_message, answer, index, chunk)
                await context.write(await self.service.offload(chunk.num_named, work))


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a key that is for them, to every service but health, before their messages are read."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        if not method.startswith(HEALTH):
            scope: Scope = "feedback" if method == FEEDBACK else "generate"
            try:
                self._keys.check(_metadata(handler_call_details.invocation_metadata, "authorization"), scope)
            except (Unauthenticated, Forbidden) as error:
                refusal = error

                async def deny(requests: Any, context: Context) -> None:
                    await _abort(context, refusal)

                return grpc.stream_stream_rpc_method_handler(deny)
        return await continuation(handler_call_details)


class GrpcServer:
    """A running server. `port` is the one it listens on."""

    def __init__(self, server: grpc.aio.Server, api: GrpcApi, checks: Checks, settings: Settings) -> None:
        self._server = server
        self._api = api
        self._checks = checks
        self._settings = settings
        self.port = server.add_insecure_port(f"{settings.host}:{settings.grpc_port}")

    async def start(self) -> None:
        await self._server.start()
        for name in (*READINESS, "liveness"):
            await self._checks.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def set_draining(self) -> None:
        """Tell health checks that nothing new is accepted; liveness stays as it is."""
        for name in READINESS:
            await self._checks.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self) -> None:
        """Let running calls finish within `drain_seconds`, close."""
        await self.set_draining()
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._api.idle.wait()
        except TimeoutError:
            log.warning("calls were still running after %g s; they are cut off", self._settings.drain_seconds)
        await self._server.stop(STOP_SECONDS)


async def start_grpc(service: Service, settings: Settings) -> GrpcServer:
    """Listen on `settings.host` and `settings.grpc_port`; 0 picks a free port."""
    keys = Keys(settings.api_key, settings.api_keys)
    api, checks = GrpcApi(service, keys), Checks()
    server = grpc.aio.server(
        interceptors=[KeyInterceptor(keys)],
        maximum_concurrent_rpcs=settings.max_connections,
        options=[
            ("grpc.max_receive_message_length", settings.body_limit_bytes),
            ("grpc.server_handshake_timeout_ms", int(settings.header_seconds * 1000)),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.so_reuseport", 0),  # or a second server would silently share the port
        ],
    )
    server.add_generic_rpc_handlers((api.handlers(),))
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    running = GrpcServer(server, api, checks, settings)
    await running.start()
    return running


async def _abort(context: Context, error: PawlError) -> NoReturn:
    code = next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)
    trailing = [("param", error.param)] if error.param else []
    if isinstance(error, Overloaded):
        trailing.append(("retry-after", str(error.retry_after_seconds)))
    await context.abort(code, error.message, tuple(trailing))


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _metadata(metadata: Any, key: str) -> str:
    """A text value of the call's metadata, "" if there is none."""
    return next((value for name, value in metadata or () if name == key and isinstance(value, str)), "")
