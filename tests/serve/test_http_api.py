"""The HTTP adapter with real clients on a free port, over a scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import openai
import pytest

import serve.sse
from serve.errors import InsufficientStorage, TimedOut, Unavailable
from serve.openai_json import Events
from serve.request import Chunk
from tests.serve.fakes import CONTEXT, FakeEngine, Rig, exchange, run, serving

LONG = {"prompt": "abc", "max_tokens": 4000}
BODIES = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/embeddings": {"input": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [65]},
    "/v1/feedback": {"inference_id": "nobody", "metric_name": "thumb", "value": True},
    "/feedback": {"inference_id": "nobody", "metric_name": "thumb", "value": True},
}
MESSAGES: list[Any] = [{"role": "user", "content": "grüß dich"}]


@asynccontextmanager
async def client(rig: Rig, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key=key, max_retries=0) as made:
        yield made


@asynccontextmanager
async def session(rig: Rig) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(rig.url) as made:
        yield made


def head(path: str = "/v1/completions", *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join(
        [f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *lines, "", ""]
    ).encode()


def body_of(answer: bytes) -> Any:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def assert_error(status: int, body: Any, expected: int) -> None:
    assert status == expected, body
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert isinstance(body["error"]["type"], str)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_streamed_completion_is_the_whole_one_in_pieces() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api:
            options: dict[str, Any] = {"model": "echo", "prompt": ["grüß", "a"], "max_tokens": 40, "n": 2, "seed": 3}
            whole = await api.completions.create(**options, logprobs=1)
            streamed = await api.completions.create(
                **options, logprobs=1, stream=True, stream_options={"include_usage": True}
            )
            events = [event async for event in streamed]
            assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
            for choice in whole.choices:
                mine = [c for event in events for c in event.choices if c.index == choice.index]
                assert "".join(c.text for c in mine) == choice.text
                assert [c.finish_reason for c in mine][-1] == choice.finish_reason == "length"
                assert all(c.finish_reason is None for c in mine[:-1])
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    pieces = [item for c in mine if c.logprobs for item in getattr(c.logprobs, name)]
                    assert pieces == getattr(choice.logprobs, name)
            assert whole.choices[0].text != whole.choices[1].text  # the second copy has another seed
            assert all(event.usage is None for event in events[:-1])
            assert events[-1].choices == []
            assert events[-1].usage == whole.usage
            assert whole.usage is not None
            assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (6 + 1, 160)
            assert whole.usage.prompt_tokens_details is not None
            assert whole.usage.prompt_tokens_details.cached_tokens == 0

    run(main)


@pytest.mark.parametrize("max_tokens", [0, 7])
def test_an_echo_begins_every_answer_and_a_stream(max_tokens: int) -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api:
            options: dict[str, Any] = {"model": "", "prompt": ["grüß", "a"], "max_tokens": max_tokens, "n": 2}
            options |= {"echo": True, "logprobs": 1, "seed": 0}
            whole = await api.completions.create(**options)
            streamed = await api.completions.create(**options, stream=True)
            events = [event async for event in streamed]
            for choice in whole.choices:
                prompt = options["prompt"][choice.index // 2].encode()
                logprobs: Any = choice.logprobs
                assert choice.text.encode().startswith(prompt)
                assert len(logprobs.tokens) == len(prompt) + max_tokens
                assert logprobs.token_logprobs == [None, *[-1.0] * (len(prompt) - 1), *[-0.25] * max_tokens]
                assert logprobs.top_logprobs[0] is None
                assert logprobs.top_logprobs[1:] == [{"\0": -1.5}] * (len(prompt) - 1) + [{"\0": -0.5}] * max_tokens
                if choice.index == 0:  # ü and ß are two tokens each
                    assert logprobs.text_offset == [0, 1, 2, 2, 3, 3, 4, 5, 6, 6, 7, 7, 8][: 6 + max_tokens]
                mine = [c for event in events for c in event.choices if c.index == choice.index]
                assert mine[0].text.encode().startswith(prompt)
                assert "".join(c.text for c in mine) == choice.text
                assert mine[-1].finish_reason == choice.finish_reason == "length"
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    pieces = [item for c in mine if c.logprobs for item in getattr(c.logprobs, name)]
                    assert pieces == getattr(logprobs, name)
            assert whole.usage is not None
            assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (6 + 1, 4 * max_tokens)

    run(main)


def test_an_echo_alone_of_texts_and_token_ids() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api:
            for prompt, text in (("grüß", "grüß"), (list("grüß".encode()), "grüß"), ([[97, 98]], "ab")):
                for max_tokens in (0, 2):
                    fields: dict[str, Any] = {"model": "", "prompt": prompt, "max_tokens": max_tokens, "seed": 0}
                    (choice,) = (await api.completions.create(**fields, echo=True)).choices
                    assert (choice.text, choice.logprobs) == (text + text[:max_tokens], None)
            kept = list(rig.records.kept.values())[-1]
            assert (kept.prompt, kept.completion) == ("ab", "ab")
            full = [97] * CONTEXT
            (choice,) = (await api.completions.create(model="", prompt=full, max_tokens=0, echo=True)).choices
            assert choice.text == "a" * CONTEXT
            with pytest.raises(openai.BadRequestError, match=f"{CONTEXT} tokens"):
                await api.completions.create(model="", prompt=full, max_tokens=1, echo=True)
            with pytest.raises(openai.BadRequestError, match="max_tokens is 0"):
                await api.completions.create(model="", prompt="a", max_tokens=0)

    run(main)


def test_an_answer_that_fails_before_it_begins_echoes_nothing() -> None:
    async def main() -> None:
        async with serving(FakeEngine(fail_after=0)) as rig, client(rig) as api:
            fields: dict[str, Any] = {"model": "", "prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 1}
            with pytest.raises(openai.InternalServerError, match="it broke"):
                await api.completions.create(**fields)
            with pytest.raises(openai.APIError, match="it broke"):
                _ = [event async for event in await api.completions.create(**fields, stream=True)]

    run(main)


def test_a_streamed_chat_is_the_whole_one_in_pieces() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api:
            options: dict[str, Any] = {"model": "echo", "messages": MESSAGES, "max_completion_tokens": 30, "n": 2}
            options |= {"logprobs": True, "top_logprobs": 2}
            whole = await api.chat.completions.create(**options)
            events = [event async for event in await api.chat.completions.create(**options, stream=True)]
            for choice in whole.choices:
                mine = [c for event in events for c in event.choices if c.index == choice.index]
                assert mine[0].delta.role == choice.message.role == "assistant"
                assert all(c.delta.role is None for c in mine[1:])
                assert "".join(c.delta.content or "" for c in mine) == choice.message.content
                assert mine[-1].finish_reason == choice.finish_reason
                pieces = [entry for c in mine if c.logprobs for entry in c.logprobs.content or []]
                assert choice.logprobs is not None
                assert pieces == choice.logprobs.content
                assert len(pieces) == 30
            assert {event.id for event in events} != {whole.id}
            assert len({event.id for event in events}) == 1

    run(main)


def test_answers_without_logprobs_and_with_held_bytes() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api:
            stream = await api.completions.create(model="", prompt="ü€", max_tokens=5, stream=True)
            texts = [event.choices[0].text async for event in stream]
            assert "".join(texts) == "ü€"
            assert "\ufffd" not in "".join(texts)
            whole = await api.completions.create(model="", prompt="ü€", max_tokens=5)
            assert whole.choices[0].text == "ü€"
            assert whole.choices[0].logprobs is None

    run(main)


def test_chat_fills_the_context_by_default() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api:
            whole = await api.chat.completions.create(model="echo", messages=MESSAGES)
            assert whole.usage is not None
            assert whole.usage.total_tokens == 4096

    run(main)


def test_embeddings_in_both_forms() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api, session(rig) as http:
            found = await api.embeddings.create(model="echo", input=["ab", "abc"])  # this client asks for base64
            assert [row.embedding for row in found.data] == [[1.0, -1.5, 0.25], [1.5, -1.5, 0.25]]
            assert found.usage.prompt_tokens == found.usage.total_tokens == 5
            async with http.post("/v1/embeddings", json={"input": [[1, 2]]}) as reply:
                assert (await reply.json())["data"][0]["embedding"] == [1.0, -1.5, 0.25]

    run(main)


def test_models_tokens_and_page() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api, session(rig) as http:
            listed = [model async for model in api.models.list()]
            assert [model.id for model in listed] == ["echo"]
            one = (await api.models.retrieve("echo")).model_dump()
            assert one == listed[0].model_dump()
            assert (one["recipe"], one["kv_cache"], one["max_model_len"]) == ("w8a8", "int8", 4096)
            assert one["gate"]["metrics"] == {"kl_nats": 0.5}
            with pytest.raises(openai.NotFoundError, match="'echo'"):
                await api.models.retrieve("gpt")
            async with http.post("/tokenize", json={"prompt": "hü", "return_token_strs": True}) as reply:
                found = await reply.json()
                assert found == {
                    "tokens": [104, 195, 188],
                    "count": 3,
                    "max_model_len": 4096,
                    "token_strs": ["h", "\ufffd", "\ufffd"],
                }
            async with http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}) as reply:
                assert bytes((await reply.json())["tokens"]) == b"<user>a<assistant>"
            async with http.post("/detokenize", json={"tokens": [104, 195, 188]}) as reply:
                assert await reply.json() == {"prompt": "hü"}
            async with http.get("/metrics") as reply:
                assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                assert await reply.text() == "# EOF\n"
            async with http.head("/health") as reply:
                assert reply.status == 200
                assert reply.headers["Server"] == "pawl"  # and no versions for attackers
            async with http.get("/") as reply:
                assert reply.status in (200, 404)

    run(main)


def test_long_texts_are_tokenized_off_the_loop() -> None:
    async def main() -> None:
        async with serving() as rig, session(rig) as http:
            async with http.post("/tokenize", json={"prompt": "x" * 100_000}) as reply:
                assert (await reply.json())["count"] == 100_000
            async with http.post("/v1/completions", json={"prompt": "x" * 100_000}) as reply:
                assert_error(reply.status, body := await reply.json(), 400)
                assert "100000 tokens and the context is 4096" in body["error"]["message"]
                assert body["error"]["param"] == "prompt"

    run(main)


# -- records ----------------------------------------------------------------------------------------------------------


def test_an_answer_can_be_judged_by_its_id() -> None:
    async def main() -> None:
        async with serving() as rig, client(rig) as api, session(rig) as http:
            answer = await api.chat.completions.create(
                model="echo", messages=MESSAGES, max_tokens=3, user="ann", metadata={"a": "b"}, n=2, seed=5
            )
            kept = rig.records.kept[answer.id]
            assert kept.messages == MESSAGES
            assert (kept.completion, kept.finish_reason, kept.subject) == (">gr", "length", "ann")
            assert (kept.params["seed"], kept.params["metadata"]) == (5, {"a": "b"})
            assert rig.records.kept[f"{answer.id}:1"].completion == "gr\ufffd"
            feedback = {"inference_id": answer.id, "metric_name": "comment", "value": "fine", "tags": {"by": "me"}}
            for path in ("/feedback", "/v1/feedback"):
                async with http.post(path, json=feedback, headers={"Idempotency-Key": "k1"}) as reply:
                    assert reply.status == 200
                    assert (await reply.json())["feedback_id"] == rig.records.judged[-1].id
            assert (rig.records.judged[0].value, rig.records.judged[0].idempotency_key) == ("fine", "k1")
            async with http.post("/feedback", json=feedback | {"dryrun": True}) as reply:
                assert reply.status == 200
            assert len(rig.records.judged) == len(rig.metrics.feedbacks) == 2
            async with http.post("/feedback", json=feedback | {"inference_id": "nobody"}) as reply:
                assert_error(reply.status, await reply.json(), 404)
            async with http.post("/feedback", json=feedback, headers={"Idempotency-Key": "a b"}) as reply:
                assert_error(reply.status, await reply.json(), 400)
            for rig.records.error in (Unavailable("away"), InsufficientStorage("full")):
                async with http.post("/feedback", json=feedback) as reply:
                    assert_error(reply.status, await reply.json(), rig.records.error.status)
                    assert reply.headers["Retry-After"] == "1"
            assert reply.status == 507

    run(main)


@pytest.mark.parametrize(
    ("log_content", "store", "expected"), [(True, None, True), (True, False, False), (False, True, False)]
)
def test_content_is_kept_only_when_allowed(log_content: bool, store: bool | None, expected: bool) -> None:
    async def main() -> None:
        async with serving(log_content=log_content) as rig, session(rig) as http:
            for prompt in ("ab", [97, 98]):
                body = {"prompt": prompt, "max_tokens": 2, "stop": "secret"} | (
                    {} if store is None else {"store": store}
                )
                async with http.post("/v1/completions", json=body) as reply:
                    kept = rig.records.kept[(await reply.json())["id"]]
                assert (kept.prompt, kept.completion) == (("ab", "ab") if expected else (None, None))
                assert ("stop" in kept.params) == expected
                assert (kept.prompt_tokens, kept.completion_tokens) == (2, 2)

    run(main)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals_have_openais_shape() -> None:
    async def main() -> None:
        async with serving(body_limit_bytes=10_000) as rig, session(rig) as http:
            json_type = {"Content-Type": "application/json"}

            async def expect(expected: int, path: str, method: str = "POST", **options: Any) -> dict[str, Any]:
                async with http.request(method, path, **options) as reply:
                    body = await reply.json()
                    assert_error(reply.status, body, expected)
                    return dict(body["error"], allow=reply.headers.get("Allow"))

            assert (await expect(404, "/nowhere"))["message"] == "there is no route '/nowhere'"
            await expect(404, "/v1/models/", method="GET")
            await expect(404, "/v1/models/a%2Fb", method="GET")
            assert (await expect(405, "/v1/completions", method="GET"))["allow"] == "POST"
            assert (await expect(405, "/health", method="POST"))["allow"] == "GET"
            await expect(405, "/v1/models/echo", method="DELETE")
            await expect(405, "/v1/completions", method="PROPFIND")
            for path in BODIES:
                await expect(400, path, data=b"{", headers=json_type)
                await expect(400, path, data=b"", headers=json_type)
                await expect(400, path, data=b"[" * 5_000, headers=json_type)
                await expect(400, path, json=BODIES[path] | {"nonsense": 1})
                await expect(415, path, data=b"{}", headers={"Content-Type": "text/plain"})
                await expect(415, path, data={"prompt": "x"})
                zipped = gzip.compress(b"x" * 1_000_000)
                await expect(415, path, data=zipped, headers=json_type | {"Content-Encoding": "gzip"})
                await expect(413, path, data=b" " * 10_001, headers=json_type)

                async def chunks() -> AsyncIterator[bytes]:
                    for _ in range(30):
                        yield b" " * 1_000

                await expect(413, path, data=chunks(), headers=json_type)
            for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"):
                error = await expect(404, path, json=BODIES[path] | {"model": "gpt"})
                assert error["param"] == "model"
                assert "'echo'" in error["message"]
            error = await expect(400, "/v1/completions", json={"prompt": "x", "max_tokens": 5000})
            assert (error["param"], "4095" in error["message"]) == ("max_tokens", True)
            for prompt in ("", [], [[]], [256], ["x", ""]):
                assert (await expect(400, "/v1/completions", json={"prompt": prompt}))["param"] == "prompt"
                assert (await expect(400, "/v1/embeddings", json={"input": prompt}))["param"] == "input"
            error = await expect(
                400, "/v1/chat/completions", json={"messages": [{"role": "assistant", "content": "x"}]}
            )
            assert error["param"] == "messages"
            assert (await expect(400, "/detokenize", json={"tokens": [256]}))["param"] == "tokens"
            await expect(400, "/health", method="GET", headers={"X-Request-Id": "a b"})
            async with http.get("/health") as reply:  # still alive, on the same connection or another
                assert reply.status == 200
            assert not rig.engine.seen
            counted = rig.metrics.counted
            assert ("/v1/models/{id}", "DELETE", 405) in counted
            assert ("unknown", "POST", 404) in counted
            assert ("/v1/completions", "other", 405) in counted

    run(main)


def test_bodies_are_limited_to_the_byte() -> None:
    async def main() -> None:
        async with serving(body_limit_bytes=100) as rig, session(rig) as http:
            body = json.dumps({"prompt": "x", "user": "y"}).encode()
            headers = {"Content-Type": "application/json; charset=utf-8"}
            async with http.post("/v1/completions", data=body.ljust(100), headers=headers) as reply:
                assert reply.status == 200
            async with http.post("/v1/completions", data=body.ljust(101), headers=headers) as reply:
                assert reply.status == 413

    run(main)


def test_overload_and_draining_are_503_with_a_time_to_retry() -> None:
    async def main() -> None:
        async with serving(FakeEngine(room=2)) as rig, client(rig) as api, session(rig) as http:
            for options in ({}, {"stream": True}):
                with pytest.raises(openai.InternalServerError) as caught:
                    await api.completions.create(model="echo", prompt="x", n=3, **options)
                assert caught.value.status_code == 503
                assert caught.value.response.headers["Retry-After"] == "3"
                assert caught.value.type == "overloaded_error"
            async with http.get("/ready") as reply:
                assert reply.status == 200
            rig.engine.draining = True
            async with http.get("/ready") as reply:
                assert_error(reply.status, await reply.json(), 503)
                assert "Retry-After" in reply.headers
            async with http.get("/health") as reply:
                assert reply.status == 200
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                await api.completions.create(model="echo", prompt="x")

    run(main)


def test_engine_errors_whole_and_in_a_stream() -> None:
    async def main() -> None:
        async with serving(FakeEngine(fail_after=2)) as rig, client(rig) as api:
            with pytest.raises(openai.InternalServerError, match="it broke") as caught:
                await api.completions.create(model="echo", prompt="x", max_tokens=5)
            assert caught.value.status_code == 500
            stream = await api.completions.create(model="echo", prompt="x", max_tokens=5, stream=True)
            texts: list[str] = []
            with pytest.raises(openai.APIError, match="it broke"):
                texts = [event.choices[0].text async for event in stream]
            assert not texts
            assert [kept.finish_reason for kept in rig.records.kept.values()] == ["error", "error"]

    run(main)


def test_a_request_that_timed_out_is_a_504_with_a_code() -> None:
    async def main() -> None:
        engine = FakeEngine(fail_after=0, error=TimedOut("timed out after 1 s"))
        async with serving(engine) as rig, client(rig) as api:
            with pytest.raises(openai.InternalServerError, match="timed out") as caught:
                await api.completions.create(model="", prompt="x")
            assert (caught.value.status_code, caught.value.code) == (504, "request_timeout")
            assert caught.value.type == "timeout_error"
            with pytest.raises(openai.APIError, match="timed out") as late:
                _ = [event async for event in await api.completions.create(model="", prompt="x", stream=True)]
            assert late.value.code == "request_timeout"

    run(main)


def test_every_route_but_health_and_the_page_needs_the_key() -> None:
    async def main() -> None:
        async with serving(api_key="sésame") as rig, session(rig) as http:
            routes = [("POST", path) for path in BODIES] + [
                ("GET", path) for path in ("/metrics", "/v1/models", "/v1/models/echo", "/nowhere")
            ]
            for method, path in routes:
                for authorization in ("", "Bearer", "Bearer wrong", "Basic sésame", "Bearer sésame2", "sésame"):
                    headers = {"Authorization": authorization} if authorization else {}
                    async with http.request(method, path, json=BODIES.get(path), headers=headers) as reply:
                        assert_error(reply.status, await reply.json(), 401)
                        assert reply.headers["WWW-Authenticate"] == "Bearer"
                headers = {"Authorization": "Bearer sésame"}
                async with http.request(method, path, json=BODIES.get(path), headers=headers) as reply:
                    assert reply.status in (200, 404)
            for path in ("/health", "/ready", "/"):
                async with http.get(path) as reply:
                    assert reply.status != 401
            async with client(rig, key="sesame") as api:
                with pytest.raises(openai.AuthenticationError):
                    await api.models.list()

    run(main)


def test_request_ids_are_echoed() -> None:
    async def main() -> None:
        async with serving() as rig, session(rig) as http:
            headers = {"X-Request-Id": "abc:1.2_3-4"}
            for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}, {"prompt": ""}):
                async with http.post("/v1/completions", json=body, headers=headers) as reply:
                    assert reply.headers["X-Request-Id"] == "abc:1.2_3-4"
                    await reply.read()
            assert {kept.request_id for kept in rig.records.kept.values()} == {"abc:1.2_3-4"}

    run(main)


# -- connections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_cancels(stream: bool) -> None:
    async def main() -> None:
        async with serving(FakeEngine(step_seconds=0.001)) as rig:
            body = json.dumps(LONG | {"stream": stream, "n": 2}).encode()
            _, writer = await asyncio.open_connection("127.0.0.1", rig.http.port)
            writer.write(head("/v1/completions", f"Content-Length: {len(body)}") + body)
            await rig.engine.until(lambda: len(rig.engine.running) == 2)
            writer.transport.abort()
            await rig.engine.until(lambda: len(rig.engine.cancelled) == 2)
            assert not rig.engine.running
            assert [kept.finish_reason for kept in rig.records.kept.values()] == ["abort", "abort"]
            assert ("/v1/completions", "POST", 499) in rig.metrics.counted

    run(main)


def test_100_disconnects_leave_nothing_behind() -> None:
    async def main() -> None:
        async with serving(FakeEngine(room=100, step_seconds=0.001)) as rig:
            body = json.dumps(LONG | {"stream": True}).encode()

            async def leave() -> None:
                reader, writer = await asyncio.open_connection("127.0.0.1", rig.http.port)
                writer.write(head("/v1/completions", f"Content-Length: {len(body)}") + body)
                await reader.readuntil(b"data: ")
                writer.transport.abort()

            await asyncio.gather(*(leave() for _ in range(100)))
            await rig.engine.until(lambda: len(rig.engine.cancelled) == 100)
            assert not rig.engine.running

    run(main)


def test_64_streams_at_once_are_each_their_own() -> None:
    async def main() -> None:
        async with serving(FakeEngine(room=64)) as rig, client(rig) as api:

            async def one(number: int) -> None:
                prompt = f"client {number}."
                stream = await api.completions.create(model="echo", prompt=prompt, max_tokens=100, stream=True)
                text = "".join([event.choices[0].text async for event in stream])
                assert text == (prompt * 100)[:100]

            await asyncio.gather(*(one(number) for number in range(64)))

    run(main)


def test_a_client_that_does_not_read_gets_merged_chunks() -> None:
    async def main() -> None:
        async with serving(FakeEngine(room=32)) as rig:
            prompt = "x" * 10
            body = json.dumps({"prompt": prompt, "max_tokens": 4000, "n": 8, "stream": True}).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.http.port, limit=1024)
            writer.write(head("/v1/completions", f"Content-Length: {len(body)}", "Connection: close") + body)
            await rig.engine.until(lambda: len(rig.engine.seen) == 8 and not rig.engine.running)
            assert not rig.engine.cancelled
            answer = bytearray()
            while chunk := await reader.read(65536):
                answer += chunk
            writer.close()
            events = [json.loads(line[6:]) for line in answer.split(b"\r\n") if line.startswith(b'data: {"id"')]
            assert sum(len(event["choices"][0]["text"]) for event in events) == 8 * 4000
            assert len(events) < 8 * 4000  # what no buffer took was merged
            assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    run(main)


def test_quiet_streams_are_kept_alive_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(serve.sse, "KEEP_ALIVE_SECONDS", 0.01)
        async with serving(FakeEngine(step_seconds=0.05)) as rig, session(rig) as http:
            async with http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2, "stream": True}) as reply:
                text = await reply.text()
            assert text.count(": keep-alive\n\n") > 2
            assert text.endswith("data: [DONE]\n\n")
            assert reply.headers["Content-Type"].startswith("text/event-stream")

    run(main)


def test_http_1_0_gets_a_plain_stream() -> None:
    async def main() -> None:
        async with serving() as rig:
            body = b'{"prompt": "ab", "max_tokens": 2, "stream": true}'
            request = head("/v1/completions", f"Content-Length: {len(body)}").replace(b"HTTP/1.1", b"HTTP/1.0") + body
            answer = await exchange(rig.http.port, request)
            events = answer.partition(b"\r\n\r\n")[2]
            assert events.startswith(b"data: {")
            assert events.endswith(b"data: [DONE]\n\n")

    run(main)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nA B: c\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (4 << 20) + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(100_000)) + b"\r\n", 400),
        (head("/v1/completions", "Content-Length: -1"), 400),
        (head("/v1/completions", "Content-Length: 5", "Content-Length: 6") + b"{}", 400),
        (head("/v1/completions", "Content-Length: 2", "Transfer-Encoding: chunked") + b"{}", 400),
        (head("/v1/completions", "Transfer-Encoding: chunked") + b"zz\r\n{}\r\n0\r\n\r\n", 400),
        (head("/v1/completions", "Content-Length: 99999999999", "Connection: close") + b"{}", 413),
    ],
)
def test_what_is_not_http_is_refused_in_json(data: bytes, expected: int) -> None:
    async def main() -> None:
        async with serving() as rig, session(rig) as http:
            try:
                answer = await exchange(rig.http.port, data)
            except ConnectionResetError:  # the kernel may drop the answer when we are still sending
                answer = b""
            if answer or len(data) < 50_000:
                assert_error(status_of(answer), body_of(answer), expected)
            async with http.get("/health") as reply:
                assert reply.status == 200

    run(main)


def test_a_body_longer_than_announced_is_refused() -> None:
    async def main() -> None:
        async with serving() as rig:
            body = b'{"prompt": "x"}garbage\r\n\r\n'
            answer = await exchange(rig.http.port, head("/tokenize", "Content-Length: 15") + body)
            assert_error(status_of(answer), body_of(answer), 400)

    run(main)


def test_slow_headers_are_cut_off() -> None:
    async def main() -> None:
        async with serving(header_seconds=0.1) as rig, session(rig) as http:
            starts = [b"", b"GET /health", b"GET /health HTTP/1.1\r\nHost: x\r\n"]
            answers = await asyncio.gather(*(exchange(rig.http.port, start) for start in starts * 30))
            assert answers == [b""] * 90
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.http.port)
            writer.write(head("/health", method="GET"))
            await reader.readuntil(b'{"status":"ok"}')
            writer.write(b"GET /hea")  # a second request that does not end
            assert await reader.read() == b""
            writer.close()
            async with http.get("/health") as reply:
                assert reply.status == 200

    run(main)


def test_the_header_deadline_spares_running_answers() -> None:
    async def main() -> None:
        async with serving(FakeEngine(step_seconds=0.02), header_seconds=0.05) as rig, client(rig) as api:
            for _ in range(2):
                stream = await api.completions.create(model="echo", prompt="ab", max_tokens=10, stream=True)
                assert "".join([event.choices[0].text async for event in stream]) == "ab" * 5

    run(main)


def test_slow_bodies_get_408() -> None:
    async def main() -> None:
        async with serving(body_seconds=0.1) as rig:
            request = head("/v1/completions", "Content-Length: 100", "Connection: close") + b'{"prompt"'
            answer = await exchange(rig.http.port, request)
            assert_error(status_of(answer), body_of(answer), 408)

    run(main)


def test_a_body_that_is_cut_off_is_no_request() -> None:
    async def main() -> None:
        async with serving() as rig, session(rig) as http:
            await exchange(rig.http.port, head("/v1/completions", "Content-Length: 100") + b'{"prompt"', eof=True)
            assert not rig.engine.seen
            async with http.get("/health") as reply:
                assert reply.status == 200

    run(main)


def test_connections_are_limited() -> None:
    async def main() -> None:
        async with serving(max_connections=2) as rig:
            pairs = [await asyncio.open_connection("127.0.0.1", rig.http.port) for _ in range(2)]
            for reader, writer in pairs:
                writer.write(head("/health", method="GET"))
                await reader.readuntil(b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert await exchange(rig.http.port, head("/health", method="GET")) == b""
            for _, writer in pairs:
                writer.close()
                await writer.wait_closed()
            while rig.http.num_connections:
                await asyncio.sleep(0)
            answer = await exchange(rig.http.port, head("/health", "Connection: close", method="GET"))
            assert status_of(answer) == 200

    run(main)


def test_expect_100_continue() -> None:
    async def main() -> None:
        async with serving() as rig:
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.http.port)
            headers = ("Content-Length: 15", "Expect: 100-continue", "Connection: close")
            writer.write(head("/tokenize", *headers))
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b'{"prompt": "x"}')
            assert status_of(await reader.read()) == 200
            writer.close()

    run(main)


def test_stopping_lets_running_answers_finish() -> None:
    async def main() -> None:
        async with serving(FakeEngine(step_seconds=0.002)) as rig, client(rig) as api:
            whole = asyncio.create_task(api.completions.create(model="echo", prompt="ab", max_tokens=50))
            stream = await api.completions.create(model="echo", prompt="ab", max_tokens=50, stream=True)
            await rig.engine.until(lambda: len(rig.engine.running) == 2)
            stopping = asyncio.create_task(rig.http.stop())
            assert "".join([event.choices[0].text async for event in stream]) == "ab" * 25
            assert (await whole).choices[0].text == "ab" * 25
            await stopping
            with pytest.raises(openai.APIConnectionError):
                await api.models.list()

    run(main)


def test_a_bug_in_a_handler_is_a_500_without_details(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving() as rig, session(rig) as http:
            monkeypatch.setattr(rig.service, "models", lambda: 1 // 0)
            async with http.get("/v1/models") as reply:
                body = await reply.json()
                assert_error(reply.status, body, 500)
                assert "division" not in body["error"]["message"]

    run(main)


def test_an_event_without_news_is_none() -> None:
    async def main() -> None:
        async with serving() as rig:
            call: Any = type("Answer", (), {"id": "i", "created": 1, "model": "m", "requests": [None]})()
            call.version = rig.service.versions.current
            events = Events(call, chat=True, include_usage=False)
            assert events.of(0, Chunk(token_ids=[1])) == b""

    run(main)
