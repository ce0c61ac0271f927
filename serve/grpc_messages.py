"""Between protobuf's messages and the service's terms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from proto import inference_pb2 as pb
from serve.answer import Answer
from serve.errors import InvalidRequest
from serve.request import Chunk, Usage

M = TypeVar("M", bound=Message)


def decode(kind: type[M], data: bytes) -> M:
    """Parse. Raises InvalidRequest for garbage, and for fields of a newer contract: nothing is ignored."""
    try:
        message = kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"the message is not a {kind.DESCRIPTOR.full_name}") from error
    if unknown := next(_unknown_fields(message), None):
        raise InvalidRequest(f"{unknown} is not known to this server; leave it out")
    return message


def _unknown_fields(message: Message) -> Iterator[str]:
    unknown = UnknownFieldSet(message)
    for index in range(len(unknown)):
        yield f"field number {unknown[index].field_number} of {message.DESCRIPTOR.full_name}"
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None and not descriptor.message_type.GetOptions().map_entry:
            for item in [value] if isinstance(value, Message) else value:
                yield from _unknown_fields(item)


def fields_of(message: Message) -> dict[str, Any]:
    """The fields as JSON would have them. Fields without presence come with their defaults, which mean the same."""
    try:
        fields = json_format.MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
    except (json_format.Error, ValueError) as error:  # a NaN inside a Value
        raise InvalidRequest(f"the message cannot be understood: {error}") from error
    if "seed" in fields:  # protobuf's JSON spells 64-bit integers as strings
        fields["seed"] = int(fields["seed"])
    return fields


def join_inputs(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """OpenAI's union of texts and token ids is two fields in protobuf."""
    token_ids = [item["ids"] for item in fields.pop(f"{name}_token_ids")]
    if token_ids and fields[name]:
        raise InvalidRequest(f"give either {name} or {name}_token_ids", param=name)
    return fields | {name: token_ids or fields[name]}


def chunk_message(answer: Answer, index: int, chunk: Chunk) -> pb.AnswerChunk:
    """One step of one answer; the call's last one has the usage."""
    message = pb.AnswerChunk(
        id=answer.id,
        model=answer.model,
        created=answer.created,
        index=index,
        text=chunk.text,
        token_ids=chunk.token_ids,
        finish_reason=chunk.finish_reason,
        usage=usage_message(answer.usage) if answer.done else None,
        system_fingerprint=answer.version.name,
    )
    spell = answer.version.tokenizer.token_text
    for entry in chunk.logprobs:
        top = [pb.TopLogprob(token_id=id, token=spell(id), logprob=logprob) for id, logprob in entry.top]
        token = spell(entry.token_id)
        message.logprobs.add(token_id=entry.token_id, token=token, logprob=entry.logprob, top_logprobs=top)
    return message


def usage_message(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt,
        completion_tokens=usage.completion,
        total_tokens=usage.prompt + usage.completion,
        cached_tokens=usage.cached,
    )
