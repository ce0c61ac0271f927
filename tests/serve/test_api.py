"""The one validator: each limit at and beyond its edge, in JSON and in protobuf; nothing but InvalidRequest ever."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import inference_pb2 as pb
from serve.api import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    FeedbackRequest,
    TokenizeRequest,
    parse,
    to_params,
)
from serve.errors import InvalidRequest
from serve.grpc_messages import decode, fields_of, join_inputs
from serve.parsing import UNSUPPORTED

TYPES = (ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, FeedbackRequest, TokenizeRequest)
MESSAGES = [{"role": "user", "content": "hi"}]

# Parameter, values at the limits, values beyond.
LIMITS: list[tuple[str, list[Any], list[Any]]] = [
    ("temperature", [0, 2, 0.5], [-0.1, 2.1, 1e308]),
    ("top_p", [1, 0.001], [0, -1, 1.1]),
    ("min_p", [0, 1], [-0.1, 1.1]),
    ("top_k", [-1, 0, 10**6], [-2]),
    ("n", [1, 8], [0, 9, -1]),
    ("max_tokens", [1, 100], [0, -1]),
    ("min_tokens", [0, 1], [-1]),
    ("seed", [0, -(2**63), 2**63 - 1], []),
    ("stop", [[], ["x"] * 16, ["x" * 256]], [["x"] * 17, ["x" * 257], [""]]),
    ("stop_token_ids", [[], [0] * 64], [[0] * 65, [-1]]),
    ("ignore_eos", [True, False], []),
    ("presence_penalty", [-2, 2], [-2.1, 2.1]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
    ("repetition_penalty", [0.01, 2], [0, -1, 2.1]),
    ("logit_bias", [{}, {"1": -100, "2": 100}, {str(i): 0 for i in range(300)}], [{"1": 101}, {"1": -101}]),
    ("logit_bias", [], [{"-1": 1}, {str(i): 0 for i in range(301)}]),
    ("user", ["", "x" * 256], ["x" * 257]),
    ("metadata", [{}, {"a": "b" * 256}], [{"a": "b" * 257}, {"a" * 65: ""}, {str(i): "" for i in range(17)}]),
    ("store", [True, False], []),
]
JSON_ONLY: list[tuple[str, list[Any], list[Any]]] = [
    ("temperature", [], ["1", True, [], {}]),
    ("max_tokens", [None], [1.5, "1", True, 2**31, 10**30]),
    ("seed", [None], [2**63, -(2**63) - 1, 1.5]),
    ("stop", ["x", None], ["", 1, [1]]),
    ("n", [None], ["2", 1.5]),
    ("stream", [True, False, None], [1, "true"]),
    ("stream_options", [{"include_usage": True}, {}, None], [{"include_usage": 1}, {"continuous_usage_stats": True}]),
    ("user", [None], [1]),
    ("logit_bias", [None], [{"a": 1}, {"1": "x"}, {"1.5": 1}, []]),
    ("model", ["", "anything"], [1, "x" * 257]),
]


def as_message(kind: type[Message], fields: dict[str, Any]) -> dict[str, Any]:
    """The same fields by way of protobuf."""
    fields = dict(fields)
    if isinstance(fields.get("prompt"), str) and kind is pb.CompletionRequest:
        fields["prompt"] = [fields["prompt"]]
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(key): value for key, value in fields["logit_bias"].items()}
    found = fields_of(decode(kind, kind(**fields).SerializeToString()))
    return join_inputs(found, "prompt") if kind is pb.CompletionRequest else found


def cases(table: list[tuple[str, list[Any], list[Any]]]) -> list[Any]:
    good = [
        pytest.param(name, value, True, id=f"{name}-good{i}") for name, at, _ in table for i, value in enumerate(at)
    ]
    bad = [pytest.param(name, value, False, id=f"{name}-bad{i}") for name, _, no in table for i, value in enumerate(no)]
    return good + bad


def check(kind: type[Any], fields: dict[str, Any] | bytes, name: str, good: bool) -> None:
    if good:
        parse(kind, fields)
    else:
        with pytest.raises(InvalidRequest) as caught:
            parse(kind, fields)
        assert caught.value.param == name
        assert name in caught.value.message


@pytest.mark.parametrize(("name", "value", "good"), cases(LIMITS) + cases(JSON_ONLY))
def test_limits_in_json(name: str, value: Any, good: bool) -> None:
    check(CompletionRequest, json.dumps({"prompt": "x", name: value}).encode(), name, good)
    check(ChatRequest, json.dumps({"messages": MESSAGES, name: value}).encode(), name, good)


@pytest.mark.parametrize(("name", "value", "good"), cases(LIMITS))
def test_limits_in_protobuf(name: str, value: Any, good: bool) -> None:
    check(CompletionRequest, as_message(pb.CompletionRequest, {"prompt": "x", name: value}), name, good)
    check(ChatRequest, as_message(pb.ChatRequest, {"messages": MESSAGES, name: value}), name, good)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
def test_numbers_are_finite(name: str, value: float) -> None:
    check(CompletionRequest, as_message(pb.CompletionRequest, {"prompt": "x", name: value}), name, False)
    with pytest.raises(InvalidRequest):
        parse(CompletionRequest, json.dumps({"prompt": "x", name: value}).encode())


@pytest.mark.parametrize(
    ("prompt", "good"),
    [
        ("x", True),
        (["x", "y"], True),
        (["x"] * 32, True),
        ([1, 2], True),
        ([[1], [2, 3]], True),
        (["x"] * 33, False),
        ([], False),
        ([1, "x"], False),
        ([[1], 2], False),
        ([[1], "x"], False),
        ([-1], False),
        ([True], False),
        ([1.5], False),
        ([[["x"]]], False),
        ({"x": 1}, False),
        (1, False),
        (None, False),
    ],
)
def test_prompts(prompt: Any, good: bool) -> None:
    check(CompletionRequest, json.dumps({"prompt": prompt}).encode(), "prompt", good)
    check(EmbeddingRequest, json.dumps({"input": prompt}).encode(), "input", good)


def test_answers_of_one_call_are_bounded() -> None:
    parse(CompletionRequest, {"prompt": ["x"] * 4, "n": 8})
    check(CompletionRequest, {"prompt": ["x"] * 5, "n": 8}, "n", False)


@pytest.mark.parametrize(
    ("messages", "good"),
    [
        (MESSAGES, True),
        (MESSAGES * 1024, True),
        ([{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], True),
        ([{"role": "assistant", "content": "x", "tool_calls": None, "refusal": None}], True),
        (MESSAGES * 1025, False),
        ([], False),
        ("hi", False),
        ([{"role": "tool", "content": "x"}], False),
        ([{"role": "user"}], False),
        ([{"role": "user", "content": None}], False),
        ([{"role": "user", "content": 1}], False),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], False),
        ([{"role": "assistant", "content": "x", "tool_calls": []}], False),
        ([{"role": "user", "content": "x", "name": "x" * 65}], False),
        ([[]], False),
        ([None], False),
    ],
)
def test_messages(messages: Any, good: bool) -> None:
    check(ChatRequest, json.dumps({"messages": messages}).encode(), "messages", good)


def test_content_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = parse(ChatRequest, {"messages": [{"role": "developer", "content": parts, "name": "x"}]})
    assert [message.plain() for message in call.messages] == [{"role": "system", "content": "ab", "name": "x"}]


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_parameters_are_refused_by_name_unless_they_change_nothing(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name} is not supported") as caught:
        parse(ChatRequest, {"messages": MESSAGES, name: {"some": "thing"}})
    assert caught.value.param == name
    for harmless in (None, *UNSUPPORTED[name]):
        parse(ChatRequest, {"messages": MESSAGES, name: harmless})


def test_unknown_parameters_are_refused_by_name() -> None:
    check(ChatRequest, {"messages": MESSAGES, "temprature": 1}, "temprature", False)
    check(CompletionRequest, {"prompt": "x", "messages": MESSAGES}, "messages", False)


def test_missing_parameters_are_named() -> None:
    check(ChatRequest, {}, "messages", False)
    check(FeedbackRequest, {"metric_name": "x", "value": True}, "inference_id", False)


def test_max_completion_tokens_is_the_same_limit() -> None:
    fields = {"messages": MESSAGES, "max_completion_tokens": 7}
    assert to_params(parse(ChatRequest, fields), 100, 10).max_tokens == 7
    assert to_params(parse(ChatRequest, fields | {"max_tokens": 7}), 100, 10).max_tokens == 7
    check(ChatRequest, fields | {"max_tokens": 8}, "max_tokens", False)


def test_logprobs_of_a_chat() -> None:
    fields = {"messages": MESSAGES, "logprobs": True}
    assert to_params(parse(ChatRequest, {"messages": MESSAGES}), 9, 10).logprobs is None
    assert to_params(parse(ChatRequest, fields), 9, 10).logprobs == 0
    assert to_params(parse(ChatRequest, fields | {"top_logprobs": 20}), 9, 10).logprobs == 20
    check(ChatRequest, fields | {"top_logprobs": 21}, "top_logprobs", False)
    check(ChatRequest, {"messages": MESSAGES, "top_logprobs": 1}, "top_logprobs", False)
    check(CompletionRequest, {"prompt": "x", "logprobs": 21}, "logprobs", False)
    check(CompletionRequest, {"prompt": "x", "logprobs": True}, "logprobs", False)


@pytest.mark.parametrize("by_message", [False, True])
def test_echo_brings_the_prompts_logprobs_and_may_ask_for_no_token(by_message: bool) -> None:
    def params(**fields: Any) -> tuple[int, int | None, int | None]:
        fields = {"prompt": "x"} | fields
        call = parse(CompletionRequest, as_message(pb.CompletionRequest, fields) if by_message else fields)
        found = to_params(call, 9 if call.max_tokens else 0, 10)
        return found.max_tokens, found.logprobs, found.prompt_logprobs

    assert params(max_tokens=4, logprobs=2) == (4, 2, None)
    assert params(max_tokens=4, logprobs=0, echo=True) == (4, 0, 0)
    assert params(max_tokens=4, echo=True) == (4, None, None)
    assert params(max_tokens=0, logprobs=20, echo=True) == (0, 20, 20)
    assert params(max_tokens=0, echo=True) == (0, None, None)


def test_no_token_without_echo_and_no_echo_in_chat() -> None:
    check(CompletionRequest, {"prompt": "x", "max_tokens": 0, "echo": False}, "max_tokens", False)
    check(CompletionRequest, {"prompt": "x", "max_tokens": -1, "echo": True}, "max_tokens", False)
    check(CompletionRequest, {"prompt": "x", "logprobs": 21, "echo": True}, "logprobs", False)
    check(CompletionRequest, {"prompt": "x", "echo": 1}, "echo", False)
    check(CompletionRequest, {"prompt": ["x"] * 5, "echo": True, "n": 8}, "n", False)
    check(CompletionRequest, {"prompt": "x", "echo": True, "best_of": 2}, "best_of", False)
    check(ChatRequest, {"messages": MESSAGES, "echo": True}, "echo", False)
    check(ChatRequest, {"messages": MESSAGES, "max_tokens": 0}, "max_tokens", False)
    with pytest.raises(InvalidRequest, match="min_tokens"):
        to_params(parse(CompletionRequest, {"prompt": "x", "echo": True, "max_tokens": 0, "min_tokens": 1}), 9, 10)


def test_defaults_are_openais() -> None:
    params = to_params(parse(CompletionRequest, {"prompt": "x"}), 100, 10)
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (16, 1.0, 1.0, None)
    assert to_params(parse(CompletionRequest, {"prompt": "x"}), 5, 10).max_tokens == 5
    assert to_params(parse(ChatRequest, {"messages": MESSAGES}), 100, 10).max_tokens == 100


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"stop_token_ids": [10]}, "stop_token_ids"),
        ({"logit_bias": {"10": 1}}, "logit_bias"),
    ],
)
def test_limits_that_depend_on_the_model(fields: dict[str, Any], param: str) -> None:
    call = parse(CompletionRequest, {"prompt": "x"} | fields)
    with pytest.raises(InvalidRequest) as caught:
        to_params(call, 100, 10)
    assert caught.value.param == param


def test_parameters_arrive() -> None:
    fields: dict[str, Any] = {
        "prompt": "x",
        "seed": -1,
        "stop": "a",
        "top_k": -1,
        "logit_bias": {"3": 2},
        "max_tokens": 9,
    }
    for given_fields in (fields, as_message(pb.CompletionRequest, fields | {"stop": ["a"]})):
        params = to_params(parse(CompletionRequest, given_fields), 9, 10)
        assert (params.seed, params.stop, params.top_k) == (2**64 - 1, ("a",), 0)
        assert (params.logit_bias, params.max_tokens) == (((3, 2.0),), 9)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"metric_name": "comment", "value": "nice"}, None),
        ({"metric_name": "demonstration", "value": "x" * 65536}, None),
        ({"metric_name": "thumb", "value": True}, None),
        ({"metric_name": "score", "value": 1}, None),
        ({"metric_name": "score", "value": 0.5, "tags": {"a": "b"}, "dryrun": True}, None),
        ({"metric_name": "comment", "value": True}, "value"),
        ({"metric_name": "score", "value": "good"}, "value"),
        ({"metric_name": "comment", "value": "x" * 65537}, "value"),
        ({"metric_name": "score", "value": {}}, "value"),
        ({"metric_name": "score", "value": None}, "value"),
        ({"metric_name": "", "value": True}, "metric_name"),
        ({"metric_name": "x" * 65, "value": True}, "metric_name"),
        ({"metric_name": "a b", "value": True}, "metric_name"),
        ({"metric_name": "x", "value": True, "inference_id": "a\nb"}, "inference_id"),
        ({"metric_name": "x", "value": True, "episode_id": "x"}, "episode_id"),
        ({"metric_name": "x", "value": True, "tags": {"a": 1}}, "tags"),
    ],
)
def test_feedback(fields: dict[str, Any], param: str | None) -> None:
    check(FeedbackRequest, {"inference_id": "x"} | fields, param or "", param is None)


def test_tokenize_takes_one_of_two() -> None:
    parse(TokenizeRequest, {"prompt": ""})
    parse(TokenizeRequest, {"messages": MESSAGES})
    check(TokenizeRequest, {}, "prompt", False)
    check(TokenizeRequest, {"prompt": "x", "messages": MESSAGES}, "prompt", False)


BAD_BODIES = {
    "empty": b"",
    "not JSON": b"prompt=x",
    "cut off": b'{"prompt": "x"',
    "trailing": b'{"prompt": "x"} {}',
    "list": b"[]",
    "text": b'"x"',
    "null": b"null",
    "deep list": b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "deep object": b'{"prompt": ' + b'{"a":' * 10_000,
    "deep unknown": b'{"x": ' + b"[" * 900 + b"]" * 900 + b', "prompt": "x"}',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": Infinity}',
    "1e308": b'{"prompt": "x", "temperature": 1e308}',
    "1e999": b'{"prompt": "x", "temperature": 1e999}',
    "many digits": b'{"prompt": "x", "seed": ' + b"9" * 4301 + b"}",
    "fewer digits": b'{"prompt": "x", "temperature": ' + b"9" * 4299 + b"}",
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "invalid UTF-8 key": b'{"\xff": 1}',
    "encoded surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone low surrogate": b'{"prompt": "\\udc00 x"}',
    "surrogate key": b'{"\\ud800": 1}',
    "control character": b'{"prompt": "\x00"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies(name: str) -> None:
    for kind in TYPES:
        with pytest.raises(InvalidRequest) as caught:
            parse(kind, BAD_BODIES[name])
        assert len(caught.value.message) < 500
        caught.value.message.encode()


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", TYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_values_of_known_fields(kind: type[Any], data: st.DataObject) -> None:
    names = st.sampled_from([*kind.__struct_fields__, *UNSUPPORTED]) | st.text(max_size=4)
    fields = data.draw(st.dictionaries(names, plain, max_size=4))
    body = json.dumps(fields).encode()
    for given_body in (body, fields):
        try:
            parse(kind, given_body)
        except InvalidRequest as error:
            error.message.encode("utf-8", "surrogatepass")


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), number=st.integers(0, 5))
def test_any_bytes(data: bytes, number: int) -> None:
    messages = [pb.ChatRequest, pb.CompletionRequest, pb.DetokenizeRequest, pb.EmbeddingRequest, pb.FeedbackRequest]
    for kind in (TYPES[number], ChatRequest):
        with contextlib.suppress(InvalidRequest):
            parse(kind, data)
    with contextlib.suppress(InvalidRequest):
        fields = fields_of(decode([*messages, pb.TokenizeRequest][number], data))
        if number in (1, 3):
            fields = join_inputs(fields, "prompt" if number == 1 else "input")
        parse(TYPES[number], fields)


def test_mutated_messages() -> None:
    """Protobuf garbage that begins like a real message."""
    message = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="hi")], temperature=0.5, seed=3)
    seed = message.SerializeToString()
    chance = random.Random(0)
    for _ in range(2000):
        data = bytearray(seed)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with contextlib.suppress(InvalidRequest):
            parse(ChatRequest, fields_of(decode(pb.ChatRequest, bytes(data))))
