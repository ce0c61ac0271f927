"""What the server does, without a protocol: the adapters only translate. A call's life:

1 find the version that answers; 2 render the chat template and tokenize; 3 check against the context; 4 submit to the
version's engine, all sequences of the call or none; 5 hand out the stream; 6 record the interaction when it ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from proto import records as contract
from proto.records import Feedback, Interaction
from proto.registry import ROLES
from serve.answer import Answer
from serve.api import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    FeedbackRequest,
    Generate,
    TokenizeRequest,
    check_token_ids,
    split_inputs,
    to_params,
)
from serve.channel import AsyncChannel, Bell
from serve.errors import InvalidRequest
from serve.request import Request, SamplingParams
from serve.version import Version, asked_of

if TYPE_CHECKING:
    from serve.metrics import Metrics
    from serve.records import Records
    from serve.settings import Settings
    from serve.versions import Versions

LONG_TEXT = 2048  # characters, or tokens: above, tokenizing would hold up the event loop for milliseconds
Endpoint = Literal["completion", "chat", "embedding"]
Submitted = CompletionRequest | ChatRequest | EmbeddingRequest
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Call:
    """What a client asked, as it is recorded. `prefix` begins its id; `content`: its messages or its texts."""

    endpoint: Endpoint
    prefix: str
    call: Submitted
    content: list[Any]
    request_id: str
    arrival: float


class Service:
    """Lives on the event loop."""

    def __init__(self, versions: Versions, records: Records, metrics: Metrics, settings: Settings) -> None:
        self.versions = versions
        self.records = records
        self.metrics = metrics
        self.settings = settings
        self.model = versions.name
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="pawl-tokenize")

    @property
    def draining(self) -> bool:
        """True once nothing new is accepted."""
        return self.versions.draining

    def close(self) -> None:
        """Give back the tokenizing thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- generation ---------------------------------------------------------------------------------------------

    async def complete(self, call: CompletionRequest, request_id: str = "") -> Answer:
        """Start the answers to a completion. Raises InvalidRequest, NotFound, Overloaded or Draining."""
        arrival = time.monotonic()
        texts = split_inputs(call.prompt, "prompt")
        with self.versions.route(call.model, call.user or request_id or f"{texts[0]}") as version:
            prompts = [await self._to_tokens(version, text, "prompt") for text in texts]
            params = [self._params(version, call, prompt, "prompt") for prompt in prompts]
            content = [text if isinstance(text, str) else None for text in texts]
            given = zip(content, prompts, strict=True)
            echoes = [await self._to_text(version, text, prompt) for text, prompt in given] if call.echo else None
            told = _Call("completion", "cmpl", call, content, request_id, arrival)
            return self._submit(version, told, prompts, params, echoes)

    async def chat(self, call: ChatRequest, request_id: str = "") -> Answer:
        """Start the answers to a conversation. Raises as `complete`."""
        arrival = time.monotonic()
        messages = [message.plain() for message in call.messages]
        with self.versions.route(call.model, call.user or request_id or _opening(messages)) as version:
            prompt = await self._render(version, messages)
            params = [self._params(version, call, prompt, "messages")]
            told = _Call("chat", "chatcmpl", call, messages, request_id, arrival)
            return self._submit(version, told, [prompt], params)

    async def embed(self, call: EmbeddingRequest, request_id: str = "") -> Answer:
        """Start the embeddings of the inputs; each answer's only chunk has an `embedding`. Raises as `complete`."""
        arrival = time.monotonic()
        texts = split_inputs(call.input, "input")
        with self.versions.route(call.model, call.user or request_id or f"{texts[0]}") as version:
            prompts = [await self._to_tokens(version, text, "input") for text in texts]
            for prompt in prompts:
                version.check_length(prompt, "input", room=0)
            params = [SamplingParams(max_tokens=1)] * len(prompts)
            content = [text if isinstance(text, str) else None for text in texts]
            told = _Call("embedding", "embd", call, content, request_id, arrival)
            return self._submit(version, told, prompts, params)

    def _submit(
        self,
        version: Version,
        told: _Call,
        prompts: list[list[int]],
        params: list[SamplingParams],
        echoes: list[str] | None = None,
    ) -> Answer:
        n = told.call.n if isinstance(told.call, Generate) else 1
        id, bell = version.new_id(told.prefix), Bell()
        requests = [
            Request(
                id=id if index == 0 else f"{id}:{index}",
                prompt=prompts[index // n],
                params=_nth_copy(params[index // n], index % n),
                channel=AsyncChannel(bell),
                embed=told.endpoint == "embedding",
                arrival=told.arrival,
            )
            for index in range(n * len(prompts))
        ]
        version.engine.submit(*requests)
        for _ in requests:
            version.hold()

        def ended(answer: Answer, index: int) -> None:
            version.release()
            self._record(answer, index, told)

        return Answer(id, self.model, version, requests, bell, n, ended, echoes)

    def _params(self, version: Version, call: Generate, prompt: list[int], param: str) -> SamplingParams:
        version.check_length(prompt, param, room=0 if call.max_tokens == 0 else 1)
        return to_params(call, version.max_context - len(prompt), version.vocab_size)

    # -- text and tokens ----------------------------------------------------------------------------------------

    async def tokenize(self, call: TokenizeRequest) -> tuple[list[int], list[str] | None, int]:
        """The token ids, their texts if asked for, and the most tokens that a request may have."""
        with self.versions.route(call.model) as version:
            tokenizer = version.tokenizer
            if call.messages is not None:
                tokens = await self._render(version, [message.plain() for message in call.messages])
            else:
                text, special = call.prompt or "", call.add_special_tokens
                tokens = await self.offload(len(text), lambda: tokenizer.encode(text, add_special_tokens=special))
            if not call.return_token_strs:
                return tokens, None, version.max_context
            strs = await self.offload(len(tokens), lambda: [tokenizer.token_text(id) for id in tokens])
            return tokens, strs, version.max_context

    async def detokenize(self, call: DetokenizeRequest) -> str:
        with self.versions.route(call.model) as version:
            check_token_ids(call.tokens, version.vocab_size, "tokens")
            return await self.offload(len(call.tokens), lambda: version.tokenizer.decode(call.tokens))

    async def _to_tokens(self, version: Version, text: str | list[int], param: str) -> list[int]:
        if isinstance(text, list):
            check_token_ids(text, version.vocab_size, param)
            return text
        return await self.offload(len(text), lambda: version.tokenizer.encode(text))

    async def _to_text(self, version: Version, text: str | None, prompt: list[int]) -> str:
        return await self.offload(len(prompt), lambda: version.tokenizer.spell(prompt)) if text is None else text

    async def _render(self, version: Version, messages: list[dict[str, str]]) -> list[int]:
        """A conversation's tokens. A template spells out its special tokens, so none are added."""
        tokenizer = version.tokenizer

        def work() -> list[int]:
            return tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)

        return await self.offload(sum(len(message["content"]) for message in messages), work)

    async def offload(self, size: int, work: Callable[[], T]) -> T:
        """Do work on a text of `size` characters or tokens, off the loop if it takes long."""
        if size < LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # -- models and records -------------------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        """The versions that answer, the current one first, with the figures of their quality gates.

        Field for field the message `Model`. The current one goes by the model's name, which requests of the candidate
        share too; `digest`, or its first 12 digits, names each alone.
        """
        found = []
        for version, role in zip(self.versions.live, ROLES, strict=False):
            model: dict[str, Any] = {
                "id": self.model if role == "current" else version.name,
                "created": version.loaded,
                "owned_by": "pawl",
                "max_model_len": version.max_context,
                "digest": version.digest,
                "recipe": version.manifest.recipe.name,
                "kv_cache": version.manifest.kv_cache,
                "role": role,
                "share": self.versions.shares[version.digest],
            }
            if version.manifest.gate is not None:
                model["gate"] = msgspec.to_builtins(version.manifest.gate)
            found.append(model)
        return found

    async def feedback(
        self, call: FeedbackRequest, idempotency_key: str | None = None, source: str | None = None
    ) -> str:
        """Store a judgement; returns its id once it is durable. Raises NotFound or Unavailable.

        `source` is the name of the API key that it came with.
        """
        fields = {
            "id": contract.new_id("feedback"),
            "created": contract.utc_now(),
            "inference_id": call.inference_id,
            "metric_name": call.metric_name,
            "value": call.value,
            "tags": call.tags,
            "idempotency_key": idempotency_key,
            "source": source,
        }
        try:
            feedback = contract.convert(fields, Feedback)
        except contract.RecordError as error:
            raise InvalidRequest(str(error), param=error.field) from error
        if call.dryrun:
            return feedback.id
        feedback_id = await self.records.feedback(feedback)
        self.metrics.feedback(feedback.metric_name, feedback.value, asked_of(feedback.inference_id))
        return feedback_id

    def _record(self, answer: Answer, index: int, told: _Call) -> None:
        """Hand the interaction to the records, before its last chunk goes out, so that feedback finds it."""
        call = told.call
        request, usage = answer.requests[index], answer.usage_of(index)
        params: dict[str, Any] = {} if request.embed else msgspec.to_builtins(request.params)
        if isinstance(call, Generate) and call.metadata:
            params["metadata"] = call.metadata
        kept: dict[str, Any] = {}
        if self.settings.log_content and getattr(call, "store", None) is not False:
            if told.endpoint == "chat":
                kept["messages"] = told.content
            else:
                text = told.content[index // answer.n]
                kept["prompt"] = answer.version.tokenizer.decode(request.prompt) if text is None else text
            if not request.embed:
                kept["completion"] = "".join(answer.texts[index])
        else:
            params.pop("stop", None)
        interaction = Interaction(
            id=request.id,
            created=contract.utc_now(),
            model=self.model,
            model_digest=answer.version.digest,
            endpoint=told.endpoint,
            params=params,
            prompt_tokens=usage.prompt,
            completion_tokens=usage.completion,
            cached_tokens=usage.cached,
            ttft_seconds=None if request.first_token is None else request.first_token - request.arrival,
            duration_seconds=time.monotonic() - request.arrival,
            mean_logprob=request.logprob_sum / len(request.output) if request.watched and request.output else None,
            finish_reason=answer.reasons[index],
            subject=call.user,
            request_id=told.request_id or answer.id,
            **kept,
        )
        self.records.interaction(interaction)


def _opening(messages: list[dict[str, str]]) -> str:
    """What a conversation began with, up to the user's first message: the same in all its turns."""
    roles = [message["role"] for message in messages]
    return f"{messages[: roles.index('user') + 1 if 'user' in roles else 1]}"


def _nth_copy(params: SamplingParams, copy: int) -> SamplingParams:
    return params if params.seed is None else replace(params, seed=(params.seed + copy) % 2**64)
