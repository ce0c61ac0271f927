"""The gRPC adapter with the generated stubs on a free port, over a scripted engine; and that it says what HTTP says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import grpc
import pytest
from google.protobuf.struct_pb2 import Value
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from proto import inference_pb2 as pb
from proto import inference_pb2_grpc as stubs
from serve.errors import InsufficientStorage, Unavailable
from tests.serve.fakes import FakeEngine, Rig, run, serving

SERVICE = "pawl.v1.Inference"
MESSAGES = [pb.ChatMessage(role="user", content="grüß dich")]


@asynccontextmanager
async def connected(rig: Rig, *options: tuple[str, Any]) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(rig.address, options=options) as channel:
        yield channel


@asynccontextmanager
async def client(rig: Rig) -> AsyncIterator[Any]:
    async with connected(rig) as channel:
        yield stubs.InferenceStub(channel)


async def refused(call: Any, code: grpc.StatusCode, param: str | None = None) -> grpc.aio.AioRpcError:
    """The error of a call that must fail with `code`."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (anext(aiter(call)) if hasattr(call, "__aiter__") else call)
    error = caught.value
    assert error.code() == code, error.details()
    assert error.details()
    trailing = dict(error.trailing_metadata() or ())
    assert trailing.get("param") == param
    return error


async def check(rig: Rig, service: str) -> Any:
    async with connected(rig) as channel:
        found = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return found.status


def test_the_same_request_says_the_same_as_http() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api, aiohttp.ClientSession(rig.url) as http:
            options = {"max_tokens": 40, "n": 2, "seed": 2**62 + 1, "logit_bias": {5: 1.0}, "metadata": {"a": "b"}}
            body = options | {"prompt": ["grüß", "a"], "logprobs": 1, "logit_bias": {"5": 1}}
            async with http.post("/v1/completions", json=body) as reply:
                whole = await reply.json()
            request = pb.CompletionRequest(prompt=["grüß", "a"], logprobs=1, **options)
            chunks = [chunk async for chunk in api.Complete(request)]
            assert [r.params for r in rig.engine.seen[:4]] == [r.params for r in rig.engine.seen[4:]]
            assert [r.prompt for r in rig.engine.seen[:4]] == [r.prompt for r in rig.engine.seen[4:]]
            for choice in whole["choices"]:
                mine = [chunk for chunk in chunks if chunk.index == choice["index"]]
                assert "".join(chunk.text for chunk in mine) == choice["text"]
                assert mine[-1].finish_reason == choice["finish_reason"]
                assert not any(chunk.HasField("finish_reason") for chunk in mine[:-1])
                entries = [entry for chunk in mine for entry in chunk.logprobs]
                assert [e.token_id for e in entries] == [id for chunk in mine for id in chunk.token_ids]
                assert [e.logprob for e in entries] == choice["logprobs"]["token_logprobs"]
                assert all(e.top_logprobs[0].token == "\0" for e in entries)
            assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
            usage = chunks[-1].usage
            found = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
            assert found == tuple(whole["usage"][f"{name}_tokens"] for name in ("prompt", "completion", "total"))
            kept = [k for k in rig.records.kept.values() if k.id.startswith(chunks[0].id)]
            assert sorted(k.id for k in kept) == [chunks[0].id] + [f"{chunks[0].id}:{i}" for i in (1, 2, 3)]
            assert kept[0].params["metadata"] == {"a": "b"}

    run(main)


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_an_echo_says_the_same_as_http(max_tokens: int) -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api, aiohttp.ClientSession(rig.url) as http:
            options: dict[str, Any] = {"prompt": ["grüß", "a"], "max_tokens": max_tokens, "echo": True, "logprobs": 2}
            async with http.post("/v1/completions", json=options | {"seed": 0}) as reply:
                whole = await reply.json()
            chunks = [chunk async for chunk in api.Complete(pb.CompletionRequest(**options, seed=0))]
            for choice in whole["choices"]:
                mine = [chunk for chunk in chunks if chunk.index == choice["index"]]
                prompt = options["prompt"][choice["index"]].encode()
                assert bytes(mine[0].token_ids[: len(prompt)]) == prompt
                assert "".join(chunk.text for chunk in mine) == choice["text"]
                entries = [entry for chunk in mine for entry in chunk.logprobs]
                assert [e.token_id for e in entries] == [id for chunk in mine for id in chunk.token_ids]
                found = [e.logprob if e.HasField("logprob") else None for e in entries]
                assert found == choice["logprobs"]["token_logprobs"]
                tops = [{top.token: top.logprob for top in e.top_logprobs} or None for e in entries]
                assert tops == choice["logprobs"]["top_logprobs"]
            usage = chunks[-1].usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (7, 2 * max_tokens)
            await refused(
                api.Complete(pb.CompletionRequest(prompt=["a"], max_tokens=0)),
                grpc.StatusCode.INVALID_ARGUMENT,
                "max_tokens",
            )

    run(main)


def test_a_chat_says_the_same_as_http() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api, aiohttp.ClientSession(rig.url) as http:
            body = {"messages": [{"role": "user", "content": "grüß dich"}], "max_completion_tokens": 30, "seed": -4}
            async with http.post("/v1/chat/completions", json=body) as reply:
                whole = await reply.json()
            request = pb.ChatRequest(messages=MESSAGES, max_completion_tokens=30, seed=-4)
            chunks = [chunk async for chunk in api.Chat(request)]
            assert "".join(chunk.text for chunk in chunks) == whole["choices"][0]["message"]["content"]
            assert chunks[-1].finish_reason == "length"
            assert {(chunk.id, chunk.model) for chunk in chunks} == {(chunks[0].id, "echo")}
            assert rig.engine.seen[0].params == rig.engine.seen[1].params

    run(main)


def test_absent_fields_have_the_same_defaults_as_in_http() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api, aiohttp.ClientSession(rig.url) as http:
            async with http.post("/v1/completions", json={"prompt": "x"}) as reply:
                await reply.read()
            async for _ in api.Complete(pb.CompletionRequest(prompt=["x"])):
                pass
            assert rig.engine.seen[0].params == rig.engine.seen[1].params
            async for _ in api.Complete(pb.CompletionRequest(prompt_token_ids=[pb.TokenIds(ids=[7, 8])], max_tokens=1)):
                pass
            assert rig.engine.seen[2].prompt == [7, 8]
            async for _ in api.Chat(pb.ChatRequest(messages=[pb.ChatMessage(role="user")], max_tokens=1)):
                pass
            assert bytes(rig.engine.seen[3].prompt) == b"<user><assistant>"

    run(main)


def test_the_other_methods() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api:
            found = await api.Embed(pb.EmbeddingRequest(input=["ab", "abc"]))
            assert [list(row.embedding) for row in found.data] == [[1.0, -1.5, 0.25], [1.5, -1.5, 0.25]]
            assert [row.index for row in found.data] == [0, 1]
            assert (found.usage.prompt_tokens, found.usage.total_tokens) == (5, 5)
            tokens = await api.Tokenize(pb.TokenizeRequest(prompt="hü", return_token_strs=True))
            assert (list(tokens.tokens), tokens.count, tokens.max_model_len) == ([104, 195, 188], 3, 4096)
            assert list(tokens.token_strs) == ["h", "\ufffd", "\ufffd"]
            tokens = await api.Tokenize(pb.TokenizeRequest(messages=[pb.ChatMessage(role="user", content="a")]))
            assert bytes(tokens.tokens) == b"<user>a<assistant>"
            assert (await api.Detokenize(pb.DetokenizeRequest(tokens=[104, 195, 188]))).prompt == "hü"
            [model] = (await api.ListModels(pb.ListModelsRequest())).data
            assert (model.id, model.recipe, model.kv_cache, model.owned_by) == ("echo", "w8a8", "int8", "pawl")
            assert (model.gate.passed, dict(model.gate.metrics)) == (True, {"kl_nats": 0.5})
            assert len(model.digest) == 64

    run(main)


def test_feedback() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api:
            [chunk] = [chunk async for chunk in api.Complete(pb.CompletionRequest(prompt=["x"], max_tokens=1))]
            values = {"thumb": True, "score": 0.5, "comment": "fine"}
            for name, value in values.items():
                made = Value(**{{bool: "bool_value", float: "number_value", str: "string_value"}[type(value)]: value})
                request = pb.FeedbackRequest(inference_id=chunk.id, metric_name=name, value=made, tags={"a": "b"})
                stored = await api.SendFeedback(request, metadata=(("idempotency-key", name),))
                assert stored.feedback_id == rig.records.judged[-1].id
            assert {feedback.metric_name: feedback.value for feedback in rig.records.judged} == values
            assert [feedback.idempotency_key for feedback in rig.records.judged] == list(values)
            for value in (Value(), Value(null_value=0), Value(number_value=float("nan"))):
                bad = pb.FeedbackRequest(inference_id=chunk.id, metric_name="thumb", value=value)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await api.SendFeedback(bad)
                assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            unknown = pb.FeedbackRequest(inference_id="nobody", metric_name="thumb", value=Value(bool_value=True))
            await refused(api.SendFeedback(unknown), grpc.StatusCode.NOT_FOUND, "inference_id")
            for rig.records.error, code in (
                (Unavailable("away"), grpc.StatusCode.UNAVAILABLE),
                (InsufficientStorage("full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
            ):
                error = await refused(api.SendFeedback(request), code)
                assert dict(error.trailing_metadata() or ())["retry-after"] == "1"

    run(main)


def test_refusals_have_codes_and_name_the_parameter() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api:
            invalid = grpc.StatusCode.INVALID_ARGUMENT
            completion, chat = pb.CompletionRequest, pb.ChatRequest
            await refused(api.Complete(completion()), invalid, "prompt")
            await refused(api.Complete(completion(prompt=[""])), invalid, "prompt")
            both = completion(prompt=["x"], prompt_token_ids=[pb.TokenIds(ids=[1])])
            await refused(api.Complete(both), invalid, "prompt")
            await refused(api.Complete(completion(prompt_token_ids=[pb.TokenIds()])), invalid, "prompt")
            await refused(api.Complete(completion(prompt_token_ids=[pb.TokenIds(ids=[256])])), invalid, "prompt")
            await refused(api.Complete(completion(prompt=["x" * 5000])), invalid, "prompt")
            await refused(api.Complete(completion(prompt=["x"], temperature=3)), invalid, "temperature")
            await refused(api.Complete(completion(prompt=["x"], temperature=float("nan"))), invalid, "temperature")
            await refused(api.Complete(completion(prompt=["x"], max_tokens=0)), invalid, "max_tokens")
            error = await refused(api.Complete(completion(prompt=["x"], max_tokens=5000)), invalid, "max_tokens")
            assert "4095" in (error.details() or "")
            await refused(api.Chat(chat()), invalid, "messages")
            await refused(api.Chat(chat(messages=[pb.ChatMessage(role="tool")])), invalid, "messages")
            await refused(api.Chat(chat(messages=[pb.ChatMessage(role="assistant")])), invalid, "messages")
            await refused(api.Embed(pb.EmbeddingRequest()), invalid, "input")
            await refused(api.Tokenize(pb.TokenizeRequest()), invalid, "prompt")
            await refused(api.Detokenize(pb.DetokenizeRequest(tokens=[256])), invalid, "tokens")
            missing = grpc.StatusCode.NOT_FOUND
            error = await refused(api.Complete(completion(model="gpt", prompt=["x"])), missing, "model")
            assert "'echo'" in (error.details() or "")
            bad_id = (("x-request-id", "a b"),)
            await refused(api.ListModels(pb.ListModelsRequest(), metadata=bad_id), invalid, "x-request-id")
            assert not rig.engine.seen
            assert (f"/{SERVICE}/Chat", "GRPC", 400) in rig.metrics.counted

    run(main)


def test_garbage_is_an_invalid_argument() -> None:
    async def main() -> None:
        async with serving(body_limit_bytes=100_000) as rig, connected(rig) as channel:
            invalid = grpc.StatusCode.INVALID_ARGUMENT
            deep = b""
            for _ in range(300):  # a Value in a list in a Value in a list ...
                inner = b"\x0a" + _varint(len(deep)) + deep
                deep = b"\x32" + _varint(len(inner)) + inner
            deep = b"\x1a" + _varint(len(deep)) + deep
            await refused(channel.unary_unary(f"/{SERVICE}/SendFeedback")(deep), invalid)
            newer = pb.ChatMessage(role="user", content="x").SerializeToString() + b"\xfa\x06\x01x"
            newer = b"\x12" + _varint(len(newer)) + newer
            error = await refused(channel.unary_stream(f"/{SERVICE}/Chat")(newer), invalid)
            assert (
                error.details() == "field number 111 of pawl.v1.ChatMessage is not known to this server; leave it out"
            )
            for data in (b"\xff" * 40, b"\x0a\x02\xff\xfe", b"\x0a\xff\xff\xff\xff\x0f", b"\xfa\x06\x01x"):
                for name in ("Embed", "Tokenize", "Detokenize", "ListModels", "SendFeedback"):
                    await refused(channel.unary_unary(f"/{SERVICE}/{name}")(data), invalid)
                for name in ("Complete", "Chat"):
                    await refused(channel.unary_stream(f"/{SERVICE}/{name}")(data), invalid)
            huge = channel.unary_unary(f"/{SERVICE}/Tokenize")(b"\0" * 100_001)
            await refused(huge, grpc.StatusCode.RESOURCE_EXHAUSTED)
            await refused(channel.unary_unary(f"/{SERVICE}/Nothing")(b""), grpc.StatusCode.UNIMPLEMENTED)
            assert (await stubs.InferenceStub(channel).Tokenize(pb.TokenizeRequest(prompt="x"))).count == 1

    run(main)


def _varint(number: int) -> bytes:
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def test_overload_and_draining() -> None:
    async def main() -> None:
        async with serving(FakeEngine(room=2)) as rig, client(rig) as api:
            error = await refused(
                api.Complete(pb.CompletionRequest(prompt=["x"], n=3)), grpc.StatusCode.RESOURCE_EXHAUSTED
            )
            assert dict(error.trailing_metadata() or ())["retry-after"] == "3"
            rig.engine.draining = True
            error = await refused(api.Chat(pb.ChatRequest(messages=MESSAGES)), grpc.StatusCode.UNAVAILABLE)
            assert dict(error.trailing_metadata() or ())["retry-after"] == "1"

    run(main)


def test_engine_errors() -> None:
    async def main() -> None:
        async with serving(FakeEngine(fail_after=2)) as rig, client(rig) as api:
            with pytest.raises(grpc.aio.AioRpcError, match="it broke") as caught:
                _ = [chunk async for chunk in api.Complete(pb.CompletionRequest(prompt=["x"]))]
            assert caught.value.code() == grpc.StatusCode.INTERNAL

    run(main)


def test_a_bug_is_internal_without_details(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api:
            monkeypatch.setattr(rig.service, "models", lambda: 1 // 0)
            error = await refused(api.ListModels(pb.ListModelsRequest()), grpc.StatusCode.INTERNAL)
            assert "division" not in (error.details() or "")

    run(main)


def test_cancelled_and_expired_calls_free_the_engine() -> None:
    async def main() -> None:
        async with serving(FakeEngine(step_seconds=0.001)) as rig, client(rig) as api:
            request = pb.CompletionRequest(prompt=["abc"], max_tokens=4000, n=2)
            call = api.Complete(request)
            await anext(aiter(call))
            call.cancel()
            await rig.engine.until(lambda: len(rig.engine.cancelled) == 2)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [chunk async for chunk in api.Complete(request, timeout=0.05)]
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await rig.engine.until(lambda: len(rig.engine.cancelled) == 4)
            await refused(api.Complete(request, timeout=-1), grpc.StatusCode.DEADLINE_EXCEEDED)
            assert not rig.engine.running
            assert {kept.finish_reason for kept in rig.records.kept.values()} == {"abort"}
            assert (f"/{SERVICE}/Complete", "GRPC", 499) in rig.metrics.counted

    run(main)


def test_closed_connections_free_the_engine() -> None:
    async def main() -> None:
        async with serving(FakeEngine(step_seconds=0.001)) as rig:

            async def leave() -> None:
                async with connected(rig, ("grpc.use_local_subchannel_pool", 1)) as channel:
                    call = stubs.InferenceStub(channel).Complete(pb.CompletionRequest(prompt=["abc"], max_tokens=4000))
                    await anext(aiter(call))

            await asyncio.gather(*(leave() for _ in range(20)))
            await rig.engine.until(lambda: len(rig.engine.cancelled) == 20)
            assert not rig.engine.running

    run(main)


async def silence() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
    """A client that says nothing: sending would race with the refusal, and the loser reports INTERNAL."""
    await asyncio.Event().wait()
    yield reflection_pb2.ServerReflectionRequest(list_services="")


def test_every_service_but_health_needs_the_key() -> None:
    async def main() -> None:
        async with serving(api_key="sesame") as rig, connected(rig) as channel:
            api, unauthenticated = stubs.InferenceStub(channel), grpc.StatusCode.UNAUTHENTICATED
            for key in (None, "Bearer wrong", "sesame"):
                metadata = (("authorization", key),) if key else ()
                await refused(api.ListModels(pb.ListModelsRequest(), metadata=metadata), unauthenticated)
                await refused(api.Chat(pb.ChatRequest(messages=MESSAGES), metadata=metadata), unauthenticated)
                reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                    silence(), metadata=metadata
                )
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await anext(aiter(reflect))
                assert caught.value.code() == unauthenticated
            found = await api.ListModels(pb.ListModelsRequest(), metadata=(("authorization", "Bearer sesame"),))
            assert len(found.data) == 1
            assert await check(rig, "liveness") == health_pb2.HealthCheckResponse.SERVING

    run(main)


def test_request_ids_are_echoed() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api:
            request = pb.CompletionRequest(prompt=["x"], max_tokens=1)
            call = api.Complete(request, metadata=(("x-request-id", "abc:1"),))
            assert dict(await call.initial_metadata())["x-request-id"] == "abc:1"
            [chunk] = [chunk async for chunk in call]
            assert rig.records.kept[chunk.id].request_id == "abc:1"

    run(main)


def test_health_follows_draining() -> None:
    async def main() -> None:
        serving_status, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        async with serving() as rig, connected(rig) as channel:
            for name in ("", "liveness", "readiness", SERVICE):
                assert await check(rig, name) == serving_status
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
            watched = aiter(watch)
            assert (await anext(watched)).status == serving_status
            await rig.grpc.set_draining()
            assert (await anext(watched)).status == not_serving
            for name in ("", "readiness", SERVICE):
                assert await check(rig, name) == not_serving
            assert await check(rig, "liveness") == serving_status

    run(main)


def test_reflection_knows_the_service() -> None:
    async def main() -> None:
        async with serving() as rig, connected(rig) as channel:
            requests = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
            ]
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(requests))
            listed, described = [reply async for reply in call]
            assert SERVICE in {service.name for service in listed.list_services_response.service}
            assert b"CompletionRequest" in described.file_descriptor_response.file_descriptor_proto[0]

    run(main)


def test_stopping_lets_running_calls_finish() -> None:
    async def main() -> None:
        async with serving(FakeEngine(step_seconds=0.002)) as rig, client(rig) as api:
            call = api.Complete(pb.CompletionRequest(prompt=["ab"], max_tokens=50))
            await rig.engine.until(lambda: len(rig.engine.running) == 1)
            stopping = asyncio.create_task(rig.grpc.stop())
            assert "".join([chunk.text async for chunk in call]) == "ab" * 25
            await stopping

    run(main)


def test_64_streams_at_once_are_each_their_own() -> None:
    async def main() -> None:
        async with serving(FakeEngine(room=64)) as rig, client(rig) as api:

            async def one(number: int) -> None:
                prompt = f"client {number}."
                call = api.Complete(pb.CompletionRequest(prompt=[prompt], max_tokens=100))
                assert "".join([chunk.text async for chunk in call]) == (prompt * 100)[:100]

            await asyncio.gather(*(one(number) for number in range(64)))

    run(main)
