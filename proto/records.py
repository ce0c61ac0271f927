"""The records: what was answered (an interaction) and what people said of it (feedback). Version 1.

Training reads them months after serving wrote them, so they carry a version and are checked on both sides.
"""

from __future__ import annotations

import math
import re
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

RECORD_VERSION = 1

# Reserved metric names, whose value is text. Every other name takes a boolean or a finite number.
COMMENT = "comment"
DEMONSTRATION = "demonstration"  # the answer as it should have been
TEXT_METRICS = frozenset({COMMENT, DEMONSTRATION})

Id = Annotated[str, Meta(pattern=r"^[\x21-\x7e]{1,128}\Z")]  # printable ASCII without blanks
Created = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\Z")]  # sorts as text
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
MetricName = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.:-]{0,63}\Z")]
Source = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
TagName = Annotated[str, Meta(min_length=1, max_length=64)]
TagValue = Annotated[str, Meta(max_length=256)]

_AT = re.compile(r"`\$\.([^`.\[]+)")  # msgspec's path, cut to the record's own field
_NAMED = re.compile(r"field `([^`]+)`")  # a missing or unknown field


class RecordError(ValueError):
    """A record that breaks the contract. `field` is the one to blame, "" when there is no record at all."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field
        self.problem = problem


class _Record(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int = RECORD_VERSION


class Interaction(_Record, frozen=True, kw_only=True):
    """One answered request. `messages`, `prompt` and `completion` are None when content is not logged."""

    id: Id  # the inference id that clients get and feedback names
    created: Created
    model: str
    model_digest: Digest
    endpoint: Literal["completion", "chat", "embedding"]
    messages: list[dict[str, Any]] | None = None  # of a chat
    prompt: str | None = None  # of a completion or an embedding
    completion: str | None = None
    params: dict[str, Any] = {}
    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count  # of the prompt's, reused from an earlier request
    ttft_seconds: Seconds | None  # None: ended before its first token
    duration_seconds: Seconds
    mean_logprob: float | None = None  # of the completion's tokens in nats; None: not one of those that are watched
    finish_reason: Literal["stop", "length", "abort", "error"]
    subject: str | None = None  # whose data this is, for erasure
    request_id: str

    def __post_init__(self) -> None:
        _check_created(self.created)
        if self.cached_tokens > self.prompt_tokens:
            raise RecordError("cached_tokens", f"{self.cached_tokens} exceeds the {self.prompt_tokens} of the prompt")
        if self.prompt is not None and self.endpoint == "chat":
            raise RecordError("prompt", "a chat has messages, not a prompt")
        if self.messages is not None and self.endpoint != "chat":
            raise RecordError("messages", f"a record of endpoint {self.endpoint!r} has a prompt, not messages")
        if "\0" in (self.subject or ""):
            raise RecordError("subject", "holds a NUL, which not every database can store")


class Feedback(_Record, frozen=True, kw_only=True):
    """One judgement of one interaction."""

    id: Id
    created: Created
    inference_id: Id
    metric_name: MetricName
    value: bool | float | str
    tags: dict[TagName, TagValue] = {}
    idempotency_key: Id | None = None  # a repeated key is the same feedback, sent again
    source: Source | None = None  # the name of the API key that it came with; None: none was asked for

    def __post_init__(self) -> None:
        _check_created(self.created)
        if self.metric_name in TEXT_METRICS:
            if not isinstance(self.value, str):
                raise RecordError("value", f"metric {self.metric_name!r} takes text, not {self.value!r}")
            _check_text("value", self.value)
        elif isinstance(self.value, str):
            names = " and ".join(sorted(TEXT_METRICS))
            raise RecordError("value", f"metric {self.metric_name!r} takes a boolean or a number; {names} take text")
        elif not math.isfinite(self.value):
            raise RecordError("value", f"{self.value} is not a finite number")
        for name, value in self.tags.items():
            _check_text("tags", name + value)


R = TypeVar("R", bound=Interaction | Feedback)


def new_id(prefix: str) -> str:
    """A fresh random id, such as `feedback-6b0c...`."""
    return f"{prefix}-{uuid.uuid4().hex}"


def utc_now() -> str:
    """Now, as `created` wants it."""
    return to_created(datetime.now(UTC))


def to_created(moment: datetime) -> str:
    """ISO 8601 in UTC, to the millisecond, so that text order is time order."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def convert(fields: Any, kind: type[R]) -> R:
    """Make a record from plain values, such as a JSON body's, and check it. Raises RecordError."""
    _check_version(fields)
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _explain(error) from error


def encode(record: Interaction | Feedback) -> bytes:
    """The record as one line of JSON. Raises RecordError when a field's type or content is wrong."""
    # A struct made in code has unchecked types. The check reads back the bytes that will be stored.
    try:
        data = msgspec.json.encode(record)
    except (UnicodeEncodeError, TypeError, ValueError) as error:  # a lone surrogate, or an object JSON cannot hold
        raise RecordError("", f"the {type(record).__name__} cannot be written as JSON: {error}") from error
    decode(data, type(record))
    return data


def decode(data: bytes | str, kind: type[R]) -> R:
    """Parse and check. Raises RecordError that names the field."""
    try:
        _check_version(msgspec.json.decode(data))
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordError("", f"not a record: {error}") from error


def _check_version(fields: Any) -> None:
    # Before the fields: a newer version may have others, and "unknown field" would hide the cause.
    if not isinstance(fields, dict):
        raise RecordError("", f"a record is an object, not {type(fields).__name__}")
    if (version := fields.get("version", RECORD_VERSION)) != RECORD_VERSION:
        raise RecordError("version", f"{version!r}; this Pawl reads version {RECORD_VERSION}")


def _check_created(created: str) -> None:
    try:
        datetime.fromisoformat(created)
    except ValueError as error:
        raise RecordError("created", f"{created!r} is not a date: {error}") from error


def _check_text(field: str, text: str) -> None:
    # JSON can spell half a surrogate pair; nothing that stores text can hold it.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(field, "holds half a surrogate pair, which is not text") from error


def _explain(error: msgspec.ValidationError) -> RecordError:
    """Our error from msgspec's, which wraps what `__post_init__` raised and names fields only in its text."""
    if isinstance(error.__cause__, RecordError):
        return error.__cause__
    text = str(error)
    found = _AT.search(text) or _NAMED.search(text)
    return RecordError(found[1] if found else "", text.split(" - at ")[0])
