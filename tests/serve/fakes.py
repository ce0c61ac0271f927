"""A scripted engine and its neighbours, so that the adapters are tested against real clients without a model."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import uvloop

from proto.manifest import Architecture, GateReport, Lineage, Manifest, Precision, Recipe
from proto.records import Feedback, Interaction
from serve.choices import Block, Choices
from serve.errors import Draining, InternalError, InvalidRequest, NotFound, Overloaded, PawlError
from serve.grpc_api import GrpcServer, start_grpc
from serve.http_api import HttpServer, start_http
from serve.request import Chunk, Request, TokenLogprob
from serve.service import Service
from serve.settings import Settings
from serve.version import Version
from serve.versions import Versions

CONTEXT = 4096
VOCABULARY = 256


class FakeStream:
    """Whole characters only."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id]))


class FakeTokenizer:
    """Bytes are the tokens."""

    vocab_size = VOCABULARY

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def spell(self, ids: list[int]) -> str:
        return self.decode(ids)

    def offsets(self, ids: list[int], text: str) -> list[int]:
        stream = self.decode_stream([])
        return list(accumulate([len(stream.push(id)) for id in ids], initial=0))[:-1]

    def decode_stream(self, prompt: list[int]) -> FakeStream:
        return FakeStream()

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        if messages[-1]["role"] == "assistant":
            raise InvalidRequest(
                "the chat template refused the messages: the last is the assistant's", param="messages"
            )
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


@dataclass
class FakeEngine:
    """Echoes the prompt, over and over, rotated by the seed, one token per turn of the loop."""

    room: int = 64  # requests at once
    step_seconds: float = 0.0
    fail_after: int | None = None  # tokens, then the error
    error: PawlError = field(default_factory=lambda: InternalError("it broke"))
    draining: bool = False
    running: set[Request] = field(default_factory=set)
    seen: list[Request] = field(default_factory=list)
    cancelled: list[Request] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def submit(self, *requests: Request) -> None:
        if self.draining:
            raise Draining("the server is shutting down")
        if len(self.running) + len(requests) > self.room:
            raise Overloaded(f"{len(self.running)} requests are waiting", retry_after_seconds=3)
        for request in requests:
            self.running.add(request)
            self.seen.append(request)
            task = asyncio.get_running_loop().create_task(self._run(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self.changed.set()

    def drain(self, timeout_seconds: float) -> bool:
        """Called when nothing runs."""
        return not self.running

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something about the requests to become true."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def _run(self, request: Request) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        params, prompt = request.params, request.prompt
        while True:
            await asyncio.sleep(self.step_seconds)
            if request.channel.closed:
                self.cancelled.append(request)
                break
            if request.embed:
                embedding = [len(prompt) / 2, -1.5, 0.25]
                request.channel.send(Chunk(finish_reason="stop", usage=request.usage, embedding=embedding))
                break
            number = len(request.output)
            begun: list[TokenLogprob] = []
            if number == 0 and params.prompt_logprobs is not None:
                ranked = tuple((id, -1.5 - id) for id in range(params.prompt_logprobs))
                begun = [TokenLogprob(prompt[0], None), *(TokenLogprob(token, -1.0, ranked) for token in prompt[1:])]
            if params.max_tokens == 0:
                chunk = Chunk(prompt_logprobs=begun, finish_reason="length", usage=request.usage)
                request.channel.send(chunk)
                break
            if number == self.fail_after:
                request.channel.send(Chunk(finish_reason="error", error=self.error, usage=request.usage))
                break
            token = prompt[(number + (params.seed or 0)) % len(prompt)]
            request.output.append(token)
            request.first_token = request.first_token or request.arrival
            chunk = Chunk(text=decoder.decode(bytes([token])), token_ids=[token], prompt_logprobs=begun)
            if params.logprobs is not None:
                top = tuple((id, -0.5 - id) for id in range(params.logprobs))
                chunk.logprobs = [TokenLogprob(token, -0.25, top)]
            if len(request.output) == params.max_tokens:
                chunk.text += decoder.decode(b"", final=True)
                chunk.finish_reason, chunk.usage = "length", request.usage
            request.channel.send(chunk)
            if chunk.finish_reason:
                break
        self.running.discard(request)
        self.changed.set()


@dataclass
class FakeRecords:
    kept: dict[str, Interaction] = field(default_factory=dict)
    judged: list[Feedback] = field(default_factory=list)
    error: PawlError | None = None  # what feedback is refused with

    def interaction(self, record: Interaction) -> None:
        self.kept[record.id] = record

    async def feedback(self, feedback: Feedback) -> str:
        if self.error is not None:
            raise self.error
        if feedback.inference_id not in self.kept:
            raise NotFound(f"no interaction has the id {feedback.inference_id!r}", param="inference_id")
        self.judged.append(feedback)
        return feedback.id


@dataclass
class FakeMetrics:
    counted: list[tuple[str, str, int]] = field(default_factory=list)
    feedbacks: list[tuple[str, bool | float | str, str]] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)

    def http(self, handler: str, method: str, status: int) -> None:
        self.counted.append((handler, method, status))

    def feedback(self, metric_name: str, value: bool | float | str, version: str) -> None:
        self.feedbacks.append((metric_name, value, version))

    def roles(self, shares: dict[str, float]) -> None:
        self.shares.append(shares)

    def engine_ended(self, digest: str) -> None:
        """Not counted."""

    def forget(self, digest: str) -> None:
        """Not counted."""

    def render(self, accept: str = "") -> tuple[bytes, str]:
        return b"# EOF\n", "text/plain; version=0.0.4; charset=utf-8"


def manifest() -> Manifest:
    return Manifest(
        format_version=1,
        name="echo",
        architecture=Architecture(
            family="llama",
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_size=8,
            hidden_size=8,
            vocab_size=VOCABULARY,
            max_context=CONTEXT,
        ),
        recipe=Recipe(name="w8a8", default=Precision(weight_bits=8, activation_bits=8)),
        kv_cache="int8",
        target="cpu",
        files={},
        lineage=Lineage(checkpoint="0" * 64),
        gate=GateReport(passed=True, forced=False, tokens=100, metrics={"kl_nats": 0.5}, thresholds={"kl_nats": 1.0}),
    )


def choices(num_blocks: int = 16) -> Choices:
    """Of an engine with 4 slots."""
    return Choices(1, "", 64, 4, "", Block(16, 4096, "int8"), num_blocks)


@dataclass
class Rig:
    """Both servers, running over one scripted engine."""

    service: Service
    settings: Settings
    engine: FakeEngine
    records: FakeRecords
    metrics: FakeMetrics
    http: HttpServer
    grpc: GrpcServer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.port}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc.port}"


@asynccontextmanager
async def serving(engine: FakeEngine | None = None, records: Any = None, **options: Any) -> AsyncIterator[Rig]:
    settings = Settings(model=Path("unused"), http_port=0, grpc_port=0, **({"drain_seconds": 5.0} | options))
    engine = engine or FakeEngine()
    records = records or FakeRecords()
    metrics: Any = FakeMetrics()
    tokenizer: Any = FakeTokenizer()
    version = Version(manifest(), tokenizer, CONTEXT, lambda: engine)
    versions = Versions(settings.model_name or "echo", version, metrics, settings.drain_seconds)
    service = Service(versions, records, metrics, settings)
    http, grpc = await start_http(service, settings), await start_grpc(service, settings)
    try:
        yield Rig(service, settings, engine, records, metrics, http, grpc)
    finally:
        await asyncio.gather(http.stop(), grpc.stop())
        service.close()


def run(main: Callable[[], Awaitable[None]], seconds: float = 20) -> None:
    """Run a test on uvloop, as the server does."""

    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await main()

    uvloop.run(bounded())


async def exchange(port: int, data: bytes, *, eof: bool = False) -> bytes:
    """Send raw bytes; what the server answers until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if eof:
            writer.write_eof()
        answer = bytearray()
        while chunk := await reader.read(65536):
            answer += chunk
        return bytes(answer)
    finally:
        writer.close()
