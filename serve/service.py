"""What the server does, without a protocol: the adapters only translate. A call's life:

1 check the model's name; 2 render the chat template and tokenize; 3 check against the context; 4 submit to the engine,
all sequences of the call or none; 5 hand out the stream; 6 record the interaction when it ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from proto import records as contract
from proto.manifest import Manifest
from proto.records import Feedback, Interaction
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
from serve.errors import InvalidRequest, NotFound
from serve.request import Request, SamplingParams

if TYPE_CHECKING:
    from serve.engine import Engine
    from serve.metrics import Metrics
    from serve.records import Records
    from serve.settings import Settings
    from serve.tokenizer import Tokenizer

LONG_TEXT = 2048  # characters, or tokens: above, tokenizing would hold up the event loop for milliseconds
Endpoint = Literal["completion", "chat", "embedding"]
Submitted = CompletionRequest | ChatRequest | EmbeddingRequest
T = TypeVar("T")


class Service:
    """Lives on the event loop. `max_context` is what the engine can hold per request, in tokens."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        records: Records,
        metrics: Metrics,
        manifest: Manifest,
        settings: Settings,
        *,
        max_context: int,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.records = records
        self.metrics = metrics
        self.manifest = manifest
        self.settings = settings
        self.max_context = max_context
        self.model = settings.model_name or manifest.name
        self.vocab_size = manifest.architecture.vocab_size
        self.started = int(time.time())
        self.digest = manifest.digest
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="pawl-tokenize")

    @property
    def draining(self) -> bool:
        """True once nothing new is accepted."""
        return self.engine.draining

    def close(self) -> None:
        """Give back the tokenizing thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- generation ---------------------------------------------------------------------------------------------

    async def complete(self, call: CompletionRequest, request_id: str = "") -> Answer:
        """Start the answers to a completion. Raises InvalidRequest, NotFound, Overloaded or Draining."""
        arrival = time.monotonic()
        self._check_model(call.model)
        texts = split_inputs(call.prompt, "prompt")
        prompts = [await self._to_tokens(text, "prompt") for text in texts]
        params = [self._params(call, prompt, "prompt") for prompt in prompts]
        content = [text if isinstance(text, str) else None for text in texts]
        given = zip(content, prompts, strict=True)
        echoes = [await self._to_text(text, prompt) for text, prompt in given] if call.echo else None
        return self._submit(
            "completion", "cmpl", prompts, params, arrival, request_id, call=call, content=content, echoes=echoes
        )

    async def chat(self, call: ChatRequest, request_id: str = "") -> Answer:
        """Start the answers to a conversation. Raises as `complete`."""
        arrival = time.monotonic()
        self._check_model(call.model)
        messages = [message.plain() for message in call.messages]
        prompt = await self._render(messages)
        params = [self._params(call, prompt, "messages")]
        return self._submit("chat", "chatcmpl", [prompt], params, arrival, request_id, call=call, content=messages)

    async def embed(self, call: EmbeddingRequest, request_id: str = "") -> Answer:
        """Start the embeddings of the inputs; each answer's only chunk has an `embedding`. Raises as `complete`."""
        arrival = time.monotonic()
        self._check_model(call.model)
        texts = split_inputs(call.input, "input")
        prompts = [await self._to_tokens(text, "input") for text in texts]
        for prompt in prompts:
            self._check_length(prompt, "input", room=0)
        params = [SamplingParams(max_tokens=1)] * len(prompts)
        content = [text if isinstance(text, str) else None for text in texts]
        return self._submit("embedding", "embd", prompts, params, arrival, request_id, call=call, content=content)

    def _submit(
        self,
        endpoint: Endpoint,
        prefix: str,
        prompts: list[list[int]],
        params: list[SamplingParams],
        arrival: float,
        request_id: str,
        *,
        call: Submitted,
        content: list[Any],
        echoes: list[str] | None = None,
    ) -> Answer:
        n = call.n if isinstance(call, Generate) else 1
        id, bell = contract.new_id(prefix), Bell()
        requests = [
            Request(
                id=id if index == 0 else f"{id}:{index}",
                prompt=prompts[index // n],
                params=_nth_copy(params[index // n], index % n),
                channel=AsyncChannel(bell),
                embed=endpoint == "embedding",
                arrival=arrival,
            )
            for index in range(n * len(prompts))
        ]
        self.engine.submit(*requests)

        def ended(answer: Answer, index: int) -> None:
            self._record(answer, index, endpoint, request_id or id, call, content)

        return Answer(id, self.model, requests, bell, n, ended, echoes)

    def _params(self, call: Generate, prompt: list[int], param: str) -> SamplingParams:
        self._check_length(prompt, param, room=0 if call.max_tokens == 0 else 1)
        return to_params(call, self.max_context - len(prompt), self.vocab_size)

    # -- text and tokens ----------------------------------------------------------------------------------------

    async def tokenize(self, call: TokenizeRequest) -> tuple[list[int], list[str] | None]:
        """The token ids, and their texts if asked for."""
        self._check_model(call.model)
        if call.messages is not None:
            tokens = await self._render([message.plain() for message in call.messages])
        else:
            text, special = call.prompt or "", call.add_special_tokens
            tokens = await self.offload(len(text), lambda: self.tokenizer.encode(text, add_special_tokens=special))
        if not call.return_token_strs:
            return tokens, None
        return tokens, await self.offload(len(tokens), lambda: [self.tokenizer.token_text(id) for id in tokens])

    async def detokenize(self, call: DetokenizeRequest) -> str:
        self._check_model(call.model)
        check_token_ids(call.tokens, self.vocab_size, "tokens")
        return await self.offload(len(call.tokens), lambda: self.tokenizer.decode(call.tokens))

    async def _to_tokens(self, text: str | list[int], param: str) -> list[int]:
        if isinstance(text, list):
            check_token_ids(text, self.vocab_size, param)
            return text
        return await self.offload(len(text), lambda: self.tokenizer.encode(text))

    async def _to_text(self, text: str | None, prompt: list[int]) -> str:
        return await self.offload(len(prompt), lambda: self.tokenizer.spell(prompt)) if text is None else text

    async def _render(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation's tokens. A template spells out its special tokens, so none are added."""

        def work() -> list[int]:
            return self.tokenizer.encode(self.tokenizer.render_chat(messages), add_special_tokens=False)

        return await self.offload(sum(len(message["content"]) for message in messages), work)

    async def offload(self, size: int, work: Callable[[], T]) -> T:
        """Do work on a text of `size` characters or tokens, off the loop if it takes long."""
        if size < LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _check_length(self, prompt: list[int], param: str, *, room: int) -> None:
        if not prompt:
            raise InvalidRequest(f"{param} is empty; give at least one token", param=param)
        if len(prompt) + room > self.max_context:
            raise InvalidRequest(
                f"{param} has {len(prompt)} tokens and the context is {self.max_context}, prompt and completion "
                "together; shorten it",
                param=param,
            )

    def _check_model(self, name: str) -> None:
        if name not in ("", self.model):
            raise NotFound(f"model {name!r} is not served here; this server serves {self.model!r}", param="model")

    # -- models and records -------------------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        """What is served, with the figures of its quality gate: field for field the message `Model`."""
        model: dict[str, Any] = {
            "id": self.model,
            "created": self.started,
            "owned_by": "pawl",
            "max_model_len": self.max_context,
            "digest": self.digest,
            "recipe": self.manifest.recipe.name,
            "kv_cache": self.manifest.kv_cache,
        }
        if self.manifest.gate is not None:
            model["gate"] = msgspec.to_builtins(self.manifest.gate)
        return [model]

    async def feedback(self, call: FeedbackRequest, idempotency_key: str | None = None) -> str:
        """Store a judgement; returns its id once it is durable. Raises NotFound or Unavailable."""
        fields = {
            "id": contract.new_id("feedback"),
            "created": contract.utc_now(),
            "inference_id": call.inference_id,
            "metric_name": call.metric_name,
            "value": call.value,
            "tags": call.tags,
            "idempotency_key": idempotency_key,
        }
        try:
            feedback = contract.convert(fields, Feedback)
        except contract.RecordError as error:
            raise InvalidRequest(str(error), param=error.field) from error
        if call.dryrun:
            return feedback.id
        feedback_id = await self.records.feedback(feedback)
        self.metrics.feedback(feedback.metric_name, feedback.value)
        return feedback_id

    def _record(
        self, answer: Answer, index: int, endpoint: Endpoint, request_id: str, call: Submitted, content: list[Any]
    ) -> None:
        """Hand the interaction to the records, before its last chunk goes out, so that feedback finds it."""
        request, usage = answer.requests[index], answer.usage_of(index)
        params: dict[str, Any] = {} if request.embed else msgspec.to_builtins(request.params)
        if isinstance(call, Generate) and call.metadata:
            params["metadata"] = call.metadata
        kept: dict[str, Any] = {}
        if self.settings.log_content and getattr(call, "store", None) is not False:
            if endpoint == "chat":
                kept["messages"] = content
            else:
                text = content[index // answer.n]
                kept["prompt"] = self.tokenizer.decode(request.prompt) if text is None else text
            if not request.embed:
                kept["completion"] = "".join(answer.texts[index])
        else:
            params.pop("stop", None)
        interaction = Interaction(
            id=request.id,
            created=contract.utc_now(),
            model=self.model,
            model_digest=self.digest,
            endpoint=endpoint,
            params=params,
            prompt_tokens=usage.prompt,
            completion_tokens=usage.completion,
            cached_tokens=usage.cached,
            ttft_seconds=None if request.first_token is None else request.first_token - request.arrival,
            duration_seconds=time.monotonic() - request.arrival,
            finish_reason=answer.reasons[index],
            subject=call.user,
            request_id=request_id,
            **kept,
        )
        self.records.interaction(interaction)


def _nth_copy(params: SamplingParams, copy: int) -> SamplingParams:
    return params if params.seed is None else replace(params, seed=(params.seed + copy) % 2**64)
