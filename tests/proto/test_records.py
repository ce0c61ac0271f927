"""The records' contract: what passes, what is refused, and which field the error blames."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto import records
from proto.records import Feedback, Interaction, RecordError

INTERACTION: dict[str, Any] = {
    "id": "chatcmpl-1",
    "created": "2026-11-01T12:00:00.000Z",
    "model": "tiny",
    "model_digest": "0" * 64,
    "endpoint": "chat",
    "messages": [{"role": "user", "content": "hello"}],
    "completion": "hi",
    "params": {"temperature": 0.5, "stop": ["\n"]},
    "prompt_tokens": 3,
    "completion_tokens": 1,
    "cached_tokens": 2,
    "ttft_seconds": 0.01,
    "duration_seconds": 0.02,
    "finish_reason": "stop",
    "request_id": "r-1",
}
FEEDBACK: dict[str, Any] = {
    "id": "feedback-1",
    "created": "2026-11-01T12:00:00.000Z",
    "inference_id": "chatcmpl-1",
    "metric_name": "thumbs",
    "value": True,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"messages": None, "completion": None},
        {"ttft_seconds": None},
        {"endpoint": "completion", "messages": None, "prompt": "once"},
        {"endpoint": "embedding", "messages": None, "prompt": "once", "completion_tokens": 0},
        {"subject": "user-7"},
    ],
)
def test_interaction_round_trip(change: dict[str, Any]) -> None:
    record = records.convert(INTERACTION | change, Interaction)
    assert records.decode(records.encode(record), Interaction) == record


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", ""),
        ("id", "a b"),
        ("id", "a\n"),
        ("id", "x" * 129),
        ("created", "2026-11-01 12:00:00"),
        ("created", "2026-11-01T12:00:00.000+01:00"),
        ("created", "2026-02-30T12:00:00.000Z"),
        ("model_digest", "0" * 63),
        ("endpoint", "rerank"),
        ("messages", "hello"),
        ("prompt", "a chat has none"),
        ("prompt_tokens", -1),
        ("prompt_tokens", 1.5),
        ("cached_tokens", 4),
        ("ttft_seconds", -0.1),
        ("finish_reason", "bored"),
        ("surprise", 1),
        ("version", 2),
    ],
)
def test_interaction_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(RecordError) as caught:
        records.convert(INTERACTION | {field: value}, Interaction)
    assert caught.value.field == field


def test_completion_has_no_messages() -> None:
    with pytest.raises(RecordError, match=r"^messages: "):
        records.convert(INTERACTION | {"endpoint": "completion"}, Interaction)


@pytest.mark.parametrize("field", list(FEEDBACK))
def test_missing_field_is_named(field: str) -> None:
    with pytest.raises(RecordError) as caught:
        records.convert({k: v for k, v in FEEDBACK.items() if k != field}, Feedback)
    # Fields are checked in order, so the blame is exact.
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "value"),
    [("thumbs", False), ("thumbs", True), ("score", 0.5), ("score", 3), ("comment", "nice"), ("demonstration", "")],
)
def test_feedback_round_trip(name: str, value: bool | float | str) -> None:
    record = records.convert(FEEDBACK | {"metric_name": name, "value": value, "tags": {"page": "chat"}}, Feedback)
    again = records.decode(records.encode(record), Feedback)
    assert again == record
    assert type(again.value) is (float if name == "score" else type(value))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("value", {"value": "yes"}),
        ("value", {"value": None}),
        ("value", {"value": [True]}),
        ("value", {"value": float("nan")}),
        ("value", {"value": float("-inf")}),
        ("value", {"value": 10**400}),
        ("value", {"metric_name": "comment"}),
        ("value", {"metric_name": "demonstration", "value": 1.0}),
        ("value", {"metric_name": "comment", "value": "\ud800"}),
        ("metric_name", {"metric_name": ""}),
        ("metric_name", {"metric_name": "two words"}),
        ("metric_name", {"metric_name": "x" * 65}),
        ("inference_id", {"inference_id": 7}),
        ("tags", {"tags": {"page": 1}}),
        ("tags", {"tags": {"": "x"}}),
        ("tags", {"tags": {"x": "\udfff"}}),
        ("tags", {"tags": {"x": "y" * 257}}),
        ("idempotency_key", {"idempotency_key": ""}),
        ("episode_id", {"episode_id": "e"}),
    ],
)
def test_feedback_refused_by_field(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(RecordError) as caught:
        records.convert(FEEDBACK | change, Feedback)
    assert caught.value.field == field


def test_encode_checks_what_code_built() -> None:
    record = Interaction(**(INTERACTION | {"completion_tokens": "three"}))
    with pytest.raises(RecordError, match=r"^completion_tokens: "):
        records.encode(record)
    with pytest.raises(RecordError, match="cannot be written as JSON"):
        records.encode(Interaction(**(INTERACTION | {"completion": "\ud800"})))


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"{", b"\xff", b'{"id": "\xff"}', b"null"])
def test_decode_refuses_what_is_no_record(data: bytes) -> None:
    with pytest.raises(RecordError) as caught:
        records.decode(data, Feedback)
    assert caught.value.field == ""


def test_newer_version_is_named_before_its_fields() -> None:
    data = msgspec.json.encode(FEEDBACK | {"version": 9, "mood": "grim"})
    with pytest.raises(RecordError, match="this Pawl reads version 1"):
        records.decode(data, Feedback)


def test_new_ids_and_times_are_valid() -> None:
    fields = FEEDBACK | {"id": records.new_id("feedback"), "created": records.utc_now()}
    assert re.fullmatch(r"feedback-[0-9a-f]{32}", records.convert(fields, Feedback).id)


@given(
    st.binary(max_size=200)
    | st.dictionaries(st.sampled_from([*FEEDBACK, "tags", "x"]), st.text()).map(msgspec.json.encode)
)
def test_decode_fails_only_with_record_errors(data: bytes) -> None:
    with pytest.raises(RecordError):
        records.decode(data, Feedback)
