"""What a client may ask, written once: the structs that validate both HTTP bodies and gRPC messages.

`parse` turns a JSON body or a message's fields into a struct or raises InvalidRequest that names the field, its value
and its limit. A parameter that Pawl does not support is refused by name, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta, Struct

from proto.records import DEMONSTRATION, TEXT_METRICS, Id, MetricName, TagName, TagValue
from serve.errors import InvalidRequest
from serve.parsing import parse_fields
from serve.request import SamplingParams

MAX_ANSWERS = 32  # of one call: prompts times n
DEFAULT_COMPLETION_TOKENS = 16
MAX_FEEDBACK = 65536  # characters

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Natural = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
Name = Annotated[str, Meta(max_length=256)]
Subject = Annotated[str, Meta(max_length=256, pattern=r"^[^\x00]*\Z")]  # not every database can store a NUL
Labels = Annotated[dict[TagName, TagValue], Meta(max_length=16)]
# Texts, or token ids, of one or several; msgspec knows no union of arrays, so `split_inputs` checks that it is pure.
Inputs = str | list[str | Natural | list[Natural]]


class Part(Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of all structs: unknown fields are refused by name."""


class Call(Part):
    """Base of all requests."""

    model: Name = ""  # "": the served one

    def check(self) -> None:
        """Raise InvalidRequest for what no single field shows."""


class StreamOptions(Part):
    include_usage: bool = False


class Generate(Call):
    """How to generate: common to completions and chat. None and absence mean the default."""

    max_tokens: Count | None = None
    min_tokens: Natural = 0
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = 0  # -1 or 0: all
    min_p: Share = 0.0
    n: Annotated[int, Meta(ge=1, le=8)] = 1
    seed: Int64 | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] = []
    stop_token_ids: Annotated[list[Natural], Meta(max_length=64)] = []
    ignore_eos: bool = False
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] = 1.0
    logit_bias: Annotated[dict[Natural, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=300)] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Subject | None = None  # recorded as the interaction's subject
    metadata: Labels = {}  # recorded with the interaction
    store: bool | None = None  # False: this request's content is not recorded, whatever the server's setting

    def token_limit(self, remaining_context: int) -> int:
        """How many tokens may be generated when the prompt leaves room for `remaining_context`."""
        return remaining_context if self.max_tokens is None else self.max_tokens

    def num_logprobs(self) -> int | None:
        """How many alternatives to report per token; None: no log-probabilities at all."""
        raise NotImplementedError

    def num_prompt_logprobs(self) -> int | None:
        """The same of the prompt's tokens."""
        return None


class CompletionRequest(Generate, kw_only=True):
    prompt: Inputs
    max_tokens: Natural | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool = False  # begin the answer with the prompt

    def check(self) -> None:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens is 0; ask for at least 1 token, or for echo", param="max_tokens")
        num_prompts = len(split_inputs(self.prompt, "prompt"))
        if num_prompts * self.n > MAX_ANSWERS:
            raise InvalidRequest(
                f"{num_prompts} prompts times n = {self.n} exceed {MAX_ANSWERS} answers in one request; split it",
                param="n" if self.n > 1 else "prompt",
            )

    def token_limit(self, remaining_context: int) -> int:
        return min(DEFAULT_COMPLETION_TOKENS, remaining_context) if self.max_tokens is None else self.max_tokens

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None


class TextPart(Part):
    type: Literal["text"]
    text: str


class ChatMessage(Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Annotated[str, Meta(max_length=64)] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else message | {"name": self.name}


Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=1024)]


class ChatRequest(Generate, kw_only=True):
    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0

    def check(self) -> None:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise InvalidRequest(
                    f"max_tokens {self.max_tokens} and max_completion_tokens {self.max_completion_tokens} are two "
                    "names of one limit; give one of them",
                    param="max_tokens",
                )
            self.max_tokens = self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class EmbeddingRequest(Call, kw_only=True):
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"  # base64: of little-endian float32
    user: Subject | None = None

    def check(self) -> None:
        if len(inputs := split_inputs(self.input, "input")) > MAX_ANSWERS:
            raise InvalidRequest(f"{len(inputs)} inputs exceed {MAX_ANSWERS} in one request; split it", param="input")


class TokenizeRequest(Call):
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True  # of a prompt; a chat template writes its own
    return_token_strs: bool = False

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages", param="prompt")


class DetokenizeRequest(Call, kw_only=True):
    tokens: list[Natural]


class FeedbackRequest(Part):
    """TensorZero's shape. A demonstration may also be given as the text parts of an answer; `check` joins them."""

    inference_id: Id
    metric_name: MetricName
    value: bool | float | Annotated[str, Meta(max_length=MAX_FEEDBACK)] | list[TextPart]
    tags: Labels = {}
    dryrun: bool = False

    def check(self) -> None:
        if isinstance(self.value, list) and self.metric_name == DEMONSTRATION:
            self.value = "".join(part.text for part in self.value)
            if len(self.value) > MAX_FEEDBACK:
                problem = f"the value has {len(self.value)} characters; give at most {MAX_FEEDBACK}"
                raise InvalidRequest(problem, param="value")
        if isinstance(self.value, str) != (self.metric_name in TEXT_METRICS):
            wanted = "text" if self.metric_name in TEXT_METRICS else "a boolean or a number"
            texts = " and ".join(sorted(TEXT_METRICS))
            raise InvalidRequest(
                f"the value of metric {self.metric_name!r} is {wanted}; {texts} take text", param="value"
            )


T = TypeVar("T", bound=Call | FeedbackRequest)


def parse(struct_type: type[T], body: bytes | dict[str, Any]) -> T:
    """Validate a JSON body or a message's fields. Raises InvalidRequest, and nothing else, whatever the input."""
    request = parse_fields(struct_type, body)
    request.check()
    return request


def split_inputs(value: Inputs, param: str) -> list[str] | list[list[int]]:
    """The texts, or the lists of token ids, that a `prompt` or `input` means; at least one."""
    items: list[Any] = [value] if isinstance(value, str) else list(value)
    if items and all(isinstance(item, int) for item in items):
        items = [items]  # one prompt, given as token ids
    if not items or any(type(item) is not type(items[0]) for item in items):
        raise InvalidRequest(f"{param} must be a text, a list of texts, or token ids or lists of them", param=param)
    return items


def to_params(request: Generate, remaining_context: int, vocab_size: int) -> SamplingParams:
    """The engine's parameters. `remaining_context` is what the prompt leaves, in tokens."""
    max_tokens = request.token_limit(remaining_context)
    if max_tokens > remaining_context:
        raise InvalidRequest(
            f"max_tokens is {max_tokens} and the prompt leaves room for {remaining_context} tokens of the context; "
            f"ask for at most {remaining_context}, or shorten the prompt",
            param="max_tokens",
        )
    if request.min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {request.min_tokens}, above max_tokens {max_tokens}", param="min_tokens")
    check_token_ids(request.stop_token_ids, vocab_size, "stop_token_ids")
    check_token_ids(list(request.logit_bias), vocab_size, "logit_bias")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        temperature=float(request.temperature),
        top_k=max(0, request.top_k),
        top_p=float(request.top_p),
        min_p=float(request.min_p),
        seed=None if request.seed is None else request.seed % 2**64,  # generators take no negative seeds
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop),
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        repetition_penalty=float(request.repetition_penalty),
        presence_penalty=float(request.presence_penalty),
        frequency_penalty=float(request.frequency_penalty),
        logit_bias=tuple(request.logit_bias.items()),
        logprobs=request.num_logprobs(),
        prompt_logprobs=request.num_prompt_logprobs(),
    )


def check_token_ids(token_ids: list[int], vocab_size: int, param: str) -> None:
    """Raise InvalidRequest unless all ids are below the vocabulary's size (they are known to be non-negative)."""
    if token_ids and (largest := max(token_ids)) >= vocab_size:
        raise InvalidRequest(
            f"{param} holds token id {largest}; the vocabulary's ids are 0 to {vocab_size - 1}", param=param
        )
