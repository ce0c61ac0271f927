"""Between the records and the rows of the store.

An interaction's text lies in a column of its own, so that it can expire before the rest.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from proto import records
from proto.records import Feedback, Interaction
from serve.errors import InvalidRequest, NotFound

Row = tuple[str | None, ...]


class _Content(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """What people wrote and read."""

    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    completion: str | None = None
    stop: list[str] | None = None  # strings, of the parameters


def interaction_row(record: Interaction) -> Row:
    """id, created, subject, record, content. Raises RecordError when the record breaks its contract."""
    content = _Content(record.messages, record.prompt, record.completion, list(record.params.get("stop", ())) or None)
    params = {name: value for name, value in record.params.items() if name != "stop"}
    data = records.encode(
        msgspec.structs.replace(record, messages=None, prompt=None, completion=None, params=params)
    ).decode()
    held = None if content == _Content() else msgspec.json.encode(content).decode()
    return (record.id, record.created, record.subject, data, held)


def read_interaction(record: str, content: str | None) -> Interaction:
    """The record that a row holds, without what has expired."""
    found = records.decode(record, Interaction)
    if content is None:
        return found
    held = msgspec.json.decode(content, type=_Content)
    params = found.params | ({} if held.stop is None else {"stop": held.stop})
    return msgspec.structs.replace(
        found, messages=held.messages, prompt=held.prompt, completion=held.completion, params=params
    )


def feedback_row(feedback: Feedback) -> Row:
    """id, inference_id, metric_name, idempotency_key, record. Raises RecordError as above."""
    data = records.encode(feedback).decode()
    return (feedback.id, feedback.inference_id, feedback.metric_name, feedback.idempotency_key, data)


def repeated(first: Feedback, second: Feedback) -> str | InvalidRequest:
    """What a repeated idempotency key means: the first one's id, unless it was another feedback."""
    if _said(first) == _said(second):
        return first.id
    problem = f"idempotency key {second.idempotency_key!r} was used for another feedback; use a new one"
    return InvalidRequest(problem, param="idempotency_key")


def not_found(id: str) -> NotFound:
    return NotFound(f"no interaction has the id {id!r}", param="inference_id")


def _said(feedback: Feedback) -> tuple[str, str, bool | float | str]:
    return feedback.inference_id, feedback.metric_name, feedback.value
