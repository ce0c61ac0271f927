"""The real server process, the tiny model and real clients: what is promised holds over the wire."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import grpc
import msgspec
import openai
import pytest
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Value
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from proto import inference_pb2 as pb
from proto import inference_pb2_grpc as stubs
from proto.manifest import GRAPH, MANIFEST, TOKENIZER, WEIGHTS, Manifest
from serve.store import open_store
from tests.serve.fakes import run
from tests.serve.tiny import CAPACITY, ROOT, SPECIAL, TEXT, VOCABULARY, Server, start_server, stop_server

DEADLINE_SECONDS = 30


@dataclass
class Clients:
    """Everyone who talks to one server."""

    server: Server
    http: aiohttp.ClientSession
    openai: openai.AsyncOpenAI
    grpc: Any
    health: Any

    async def whole(self, body: dict[str, Any]) -> str:
        async with self.http.post("/v1/chat/completions", json=body) as reply:
            assert reply.status == 200, await reply.text()
            choice = (await reply.json())["choices"][0]
            assert choice["finish_reason"] in ("stop", "length")
            return str(choice["message"]["content"])

    async def streamed(self, body: dict[str, Any]) -> str:
        text, reason = "", None
        async with self.http.post("/v1/chat/completions", json=body | {"stream": True}) as reply:
            assert reply.status == 200, await reply.text()
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    text += choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
        assert reason in ("stop", "length")
        return text

    async def over_grpc(self, body: dict[str, Any]) -> str:
        text, reason = "", ""
        async for chunk in self.grpc.Chat(pb.ChatRequest(**body)):
            text += chunk.text
            reason = chunk.finish_reason or reason
        assert reason in ("stop", "length")
        return text

    async def metrics(self) -> dict[str, float]:
        """Samples by name; a reason, if it has one, comes behind a blank."""
        async with self.http.get("/metrics") as reply:
            families = text_string_to_metric_families(await reply.text())
        return {
            " ".join([sample.name, *(v for k, v in sample.labels.items() if k.endswith("reason"))]): sample.value
            for family in families
            for sample in family.samples
            if "le" not in sample.labels
        }

    async def until(self, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """Poll the metrics until they are as wished."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition(found := await self.metrics()):
                await asyncio.sleep(0.01)
        return found


def busy(metrics: dict[str, float]) -> float:
    return metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]


def idle(metrics: dict[str, float]) -> bool:
    return busy(metrics) == 0


@asynccontextmanager
async def clients(server: Server) -> AsyncIterator[Clients]:
    timeout = aiohttp.ClientTimeout(total=60)
    async with (
        aiohttp.ClientSession(server.http_url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http,
        openai.AsyncOpenAI(base_url=f"{server.http_url}/v1", api_key="none", max_retries=0) as official,
        grpc.aio.insecure_channel(server.grpc_address) as channel,
    ):
        yield Clients(server, http, official, stubs.InferenceStub(channel), health_pb2_grpc.HealthStub(channel))


@contextmanager
def own_server(artifact: Path, tmp_path: Path, *flags: str) -> Iterator[Server]:
    """A server for one test, which may end it as it likes."""
    server = start_server(artifact, tmp_path / "records.sqlite", *flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()


def chats(count: int = 32, max_tokens: int = 16) -> list[dict[str, Any]]:
    """Requests of different lengths and ways of sampling, in words that both protocols understand."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.9},
        {"temperature": 1.2, "top_k": 30},
        {"temperature": 1, "top_p": 0.9, "frequency_penalty": 0.5},
    ]
    return [
        {
            "messages": [{"role": "user", "content": TEXT[31 * i : 31 * i + 10 + 3 * i]}],
            "max_tokens": max_tokens + i % 5,
            "seed": 1000 + i,
            "ignore_eos": True,
        }
        | ways[i % len(ways)]
        for i in range(count)
    ]


# -- the same answer by every way -------------------------------------------------------------------------------


def test_same_text_streamed_or_not_over_both_protocols_alone_and_in_company(server: Server) -> None:
    async def main() -> None:
        async with clients(server) as api:
            ways = [api.whole, api.streamed, api.over_grpc]
            bodies = chats()
            alone = [[await way(body) for way in ways] for body in bodies]
            assert all(len(set(texts)) == 1 for texts in alone)
            assert len({texts[0] for texts in alone}) > 24, "the answers differ too little to prove anything"
            for turn in range(len(ways)):
                together = await asyncio.gather(*(ways[(i + turn) % len(ways)](b) for i, b in enumerate(bodies)))
                assert together == [texts[0] for texts in alone]

    run(main, 60)


def test_the_official_client_sees_the_same_text(server: Server) -> None:
    async def main() -> None:
        async with clients(server) as api:
            fields: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Who may copy?"}]}
            fields |= {"seed": 5, "max_tokens": 12, "model": (await api.openai.models.list()).data[0].id}
            whole = await api.openai.chat.completions.create(**fields)
            stream = await api.openai.chat.completions.create(
                **fields, stream=True, stream_options={"include_usage": True}
            )
            text, usage = "", None
            async for event in stream:
                text += "".join(choice.delta.content or "" for choice in event.choices)
                usage = event.usage or usage
            assert text == whole.choices[0].message.content
            assert whole.usage is not None
            assert usage is not None
            assert usage.completion_tokens == whole.usage.completion_tokens
            assert usage.prompt_tokens == whole.usage.prompt_tokens

    run(main)


def test_copies_equal_requests_with_their_seeds(server: Server) -> None:
    async def main() -> None:
        async with clients(server) as api:
            fields: dict[str, Any] = {"model": "", "prompt": "This License", "max_tokens": 12, "temperature": 1.0}
            both = await api.openai.completions.create(**fields, n=2, seed=70)
            singles = [await api.openai.completions.create(**fields, seed=70 + i) for i in range(2)]
            assert [choice.text for choice in both.choices] == [single.choices[0].text for single in singles]
            assert both.choices[0].text != both.choices[1].text
            assert both.usage is not None
            assert both.usage.prompt_tokens == singles[0].usage.prompt_tokens  # type: ignore[union-attr]

    run(main)


# -- what a request can ask for ---------------------------------------------------------------------------------


def test_logprobs_usage_and_stop(server: Server) -> None:
    async def main() -> None:
        async with clients(server) as api:
            fields: dict[str, Any] = {"model": "", "messages": [{"role": "user", "content": "Define"}]}
            fields |= {"temperature": 0, "max_tokens": 20, "extra_body": {"ignore_eos": True}}
            answer = await api.openai.chat.completions.create(**fields, logprobs=True, top_logprobs=3)
            choice = answer.choices[0]
            assert choice.logprobs is not None
            assert choice.logprobs.content is not None
            assert len(choice.logprobs.content) == 20
            for entry in choice.logprobs.content:
                assert entry.logprob <= 0
                assert len(entry.top_logprobs) == 3
                assert entry.top_logprobs[0].logprob == entry.logprob, "greedy takes the most probable"
            spelled = b"".join(bytes(e.bytes or ()) for e in choice.logprobs.content if e.token not in SPECIAL)
            # A character that the limit cuts in half is not sent.
            told = choice.message.content or ""
            assert spelled.decode(errors="replace").rstrip("\ufffd") == told.rstrip("\ufffd")
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 20
            assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20
            assert choice.finish_reason == "length"

            stop = next(told[i : i + 3] for i in range(4, len(told)) if told.index(told[i : i + 3]) == i)
            stopped = await api.openai.chat.completions.create(**fields, stop=[stop])
            assert stopped.choices[0].message.content == told[: told.index(stop)]
            assert stopped.choices[0].finish_reason == "stop"

    run(main)


def test_prompt_log_probabilities_by_every_way(server: Server) -> None:
    async def main() -> None:
        async with clients(server) as api:
            before = await api.until(idle)
            prompts = [TEXT[:90], TEXT[200:420]]
            fields: dict[str, Any] = {"model": "", "echo": True, "logprobs": 1, "max_tokens": 0}
            whole = await api.openai.completions.create(prompt=prompts, **fields)
            after = await api.until(idle)
            assert whole.usage is not None
            assert whole.usage.completion_tokens == 0
            grown = {name: value - before.get(name, 0) for name, value in after.items()}
            assert grown["vllm:prompt_tokens_total"] == whole.usage.prompt_tokens
            assert grown["vllm:prefix_cache_queries_total"] == whole.usage.prompt_tokens
            assert grown["vllm:generation_tokens_total"] == grown["vllm:time_to_first_token_seconds_count"] == 0
            assert grown["vllm:request_success_total length"] == grown["vllm:request_inference_time_seconds_count"] == 2
            ids = []
            for choice, prompt in zip(whole.choices, prompts, strict=True):
                logprobs: Any = choice.logprobs
                assert (choice.text, choice.finish_reason) == (prompt, "length")
                assert "".join(logprobs.tokens) == prompt
                places = [*logprobs.text_offset, len(prompt)]
                assert [prompt[a:b] for a, b in itertools.pairwise(places)] == logprobs.tokens
                assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
                for own, top in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True):
                    assert own <= max(top.values()) <= 0
                ids.append(list((await api.grpc.Tokenize(pb.TokenizeRequest(prompt=prompt))).tokens))
            by_ids = await api.openai.completions.create(prompt=ids, **fields)
            assert by_ids.choices == whole.choices

            streamed = await api.openai.completions.create(prompt=prompts[0], stream=True, **fields)
            (event,) = [event async for event in streamed]
            assert event.choices == whole.choices[:1]
            request = pb.CompletionRequest(prompt=prompts[:1], echo=True, logprobs=1, max_tokens=0)
            (chunk,) = [chunk async for chunk in api.grpc.Complete(request)]
            found = [entry.logprob if entry.HasField("logprob") else None for entry in chunk.logprobs]
            assert found == whole.choices[0].logprobs.token_logprobs  # type: ignore[union-attr]
            assert (chunk.text, list(chunk.token_ids), chunk.finish_reason) == (prompts[0], ids[0], "length")

            more = fields | {"max_tokens": 5, "temperature": 0, "extra_body": {"ignore_eos": True}}
            answer = (await api.openai.completions.create(prompt=prompts[0], **more)).choices[0]
            plain = (await api.openai.completions.create(prompt=prompts[0], **more | {"echo": False})).choices[0]
            assert answer.text == prompts[0] + plain.text
            for name in ("tokens", "token_logprobs", "top_logprobs"):
                begun = getattr(whole.choices[0].logprobs, name)
                assert getattr(answer.logprobs, name) == begun + getattr(plain.logprobs, name)

    run(main)


def test_lm_evaluation_harness_scores_texts(server: Server) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        completions = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI

    async def main() -> None:
        async with clients(server) as api:
            prompts = [TEXT[300:400], TEXT[20:60]]
            tokens = [list((await api.grpc.Tokenize(pb.TokenizeRequest(prompt=text))).tokens) for text in prompts]
            # What the model itself goes on with is greedy.
            body: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": 0}
            request = pb.CompletionRequest(prompt_token_ids=[pb.TokenIds(ids=tokens[0])], **body)
            own = [chunk async for chunk in api.grpc.Complete(request)]
            tokens.append(tokens[0] + [id for chunk in own for id in chunk.token_ids])
            context = [10, 1, len(tokens[0])]
            harness = completions.__new__(completions)
            harness.model = (await api.openai.models.list()).data[0].id
            payload = harness._create_payload(tokens, generate=False, seed=1234)
            async with api.http.post("/v1/completions", json=payload) as reply:
                assert reply.status == 200, await reply.text()
                scored = completions.parse_logprobs(await reply.json(), tokens=tokens, ctxlens=context)
            assert [greedy for _, greedy in scored] == [False, False, True]
            values = [entry.logprob for chunk in own for entry in chunk.logprobs]
            assert scored[2][0] == pytest.approx(sum(values), abs=0.05)
            for (value, _), ids, start in zip(scored, tokens, context, strict=True):
                request = pb.CompletionRequest(
                    prompt_token_ids=[pb.TokenIds(ids=ids)], echo=True, logprobs=0, max_tokens=0
                )
                (chunk,) = [chunk async for chunk in api.grpc.Complete(request)]
                assert value == pytest.approx(sum(entry.logprob for entry in chunk.logprobs[start:]))

    run(main)


def test_token_ids_tokenize_and_detokenize(server: Server) -> None:
    async def main() -> None:
        async with clients(server) as api:
            text = "You may reproduce and distribute copies — grüß dich 🙂\n"
            async with api.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}) as reply:
                found = await reply.json()
            assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
            assert found["max_model_len"] == CAPACITY
            assert all(0 <= token < VOCABULARY for token in found["tokens"])
            async with api.http.post("/detokenize", json={"tokens": found["tokens"]}) as reply:
                assert (await reply.json())["prompt"] == text
            over_grpc = await api.grpc.Tokenize(pb.TokenizeRequest(prompt=text))
            assert list(over_grpc.tokens) == found["tokens"]
            assert (await api.grpc.Detokenize(pb.DetokenizeRequest(tokens=over_grpc.tokens))).prompt == text

            fields: dict[str, Any] = {"model": "", "max_tokens": 8, "temperature": 0}
            by_text = await api.openai.completions.create(prompt=text, **fields)
            by_ids = await api.openai.completions.create(prompt=found["tokens"], **fields)
            assert by_ids.choices[0].text == by_text.choices[0].text
            assert by_ids.usage is not None
            assert by_ids.usage.prompt_tokens == found["count"]

    run(main)


def test_embeddings_are_the_same_over_both_protocols(server: Server) -> None:
    async def main() -> None:
        async with clients(server) as api:
            texts = ["Apache License", TEXT[:200]]
            over_grpc = await api.grpc.Embed(pb.EmbeddingRequest(input=texts))
            for form in ("float", openai.NOT_GIVEN):  # not given: the client asks for base64 and decodes it
                answer = await api.openai.embeddings.create(model="", input=texts, encoding_format=form)
                for mine, theirs in zip(answer.data, over_grpc.data, strict=True):
                    assert sum(x * x for x in mine.embedding) == pytest.approx(1, abs=1e-5)
                    assert struct.pack("<64f", *mine.embedding) == struct.pack("<64f", *theirs.embedding)
            assert answer.usage.prompt_tokens == over_grpc.usage.prompt_tokens

    run(main)


def test_models_show_the_gate(server: Server, manifest: Manifest) -> None:
    async def main() -> None:
        async with clients(server) as api:
            async with api.http.get("/v1/models") as reply:
                (model,) = (await reply.json())["data"]
            assert manifest.gate is not None
            assert (model["id"], model["digest"]) == (manifest.name, manifest.digest)
            assert model["gate"] == msgspec.to_builtins(manifest.gate)
            (same,) = (await api.grpc.ListModels(pb.ListModelsRequest())).data
            assert (same.id, same.digest, same.max_model_len) == (model["id"], model["digest"], CAPACITY)
            assert same.gate.passed == manifest.gate.passed
            assert same.gate.forced == manifest.gate.forced
            assert dict(same.gate.metrics) == manifest.gate.metrics
            shown = json_format.MessageToDict(
                same.gate, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
            assert shown["intervals"] == model["gate"]["intervals"] != {}
            assert shown["machine"] == manifest.gate.machine != ""
            assert {form: cost["tokens_per_second"] for form, cost in shown["serving"].items()} == {
                form: cost.tokens_per_second for form, cost in manifest.gate.serving.items()
            }

    run(main)


def test_counters_count_what_was_sent(server: Server) -> None:
    async def main() -> None:
        async with clients(server) as api:
            before = await api.until(idle)
            answers = [
                await api.openai.completions.create(model="", prompt=TEXT[:length], max_tokens=tokens)
                for length, tokens in [(40, 1), (300, 7), (300, 13), (10, 30)]
            ]
            after = await api.until(idle)
            grown = {name: value - before.get(name, 0) for name, value in after.items()}
            usages = [answer.usage for answer in answers if answer.usage]
            assert grown["vllm:prompt_tokens_total"] == sum(usage.prompt_tokens for usage in usages)
            assert grown["vllm:generation_tokens_total"] == sum(usage.completion_tokens for usage in usages)
            assert grown["vllm:request_prompt_tokens_sum"] == grown["vllm:prompt_tokens_total"]
            assert grown["vllm:request_generation_tokens_sum"] == grown["vllm:generation_tokens_total"]
            assert grown["vllm:time_to_first_token_seconds_count"] == len(answers)
            for reason in ("stop", "length"):
                expected = sum(answer.choices[0].finish_reason == reason for answer in answers)
                assert grown[f"vllm:request_success_total {reason}"] == expected
            cached = sum(u.prompt_tokens_details.cached_tokens or 0 for u in usages if u.prompt_tokens_details)
            assert grown["vllm:prefix_cache_hits_total"] == cached > 0
            assert grown["vllm:prefix_cache_queries_total"] == grown["vllm:prompt_tokens_total"]

    run(main)


# -- clients that leave, come in crowds, and a server that must go ----------------------------------------------


async def leave_http(server: Server, body: dict[str, Any]) -> None:
    """Reset the connection when the first event is there."""
    address = urlsplit(server.http_url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    data = json.dumps(body | {"stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    await reader.readuntil(b"data: {")
    linger = struct.pack("ii", 1, 0)  # closing sends a reset
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def leave_grpc(api: Clients, body: dict[str, Any]) -> None:
    call = api.grpc.Chat(pb.ChatRequest(**body))
    await anext(aiter(call))
    call.cancel()


def test_200_disconnects_leave_every_slot_free(server: Server) -> None:
    async def main() -> None:
        async with clients(server) as api:
            body = chats(1)[0]
            expected = await api.whole(body)
            before = await api.until(idle)
            at_once = asyncio.Semaphore(40)
            long = body | {"max_tokens": 150}

            async def leave(number: int) -> None:
                async with at_once:
                    await (leave_http(server, long) if number % 2 else leave_grpc(api, long))

            await asyncio.gather(*(leave(number) for number in range(200)))
            after = await api.until(idle)
            assert after["vllm:kv_cache_usage_perc"] == 0
            aborted = "vllm:request_success_total abort"
            assert 100 <= after[aborted] - before[aborted] <= 200
            assert await api.whole(body) == await api.over_grpc(body) == expected

    run(main, 60)


def test_a_crowd_is_answered_correctly_or_refused(server: Server, artifact: Path, tmp_path: Path) -> None:
    bodies = chats(64, max_tokens=40)

    async def singles() -> list[str]:
        async with clients(server) as api:
            return list(await asyncio.gather(*(api.over_grpc(body) for body in bodies)))

    async def crowd(small: Server, expected: list[str]) -> None:
        async with clients(small) as api:

            async def by_http(body: dict[str, Any]) -> str | None:
                async with api.http.post("/v1/chat/completions", json=body) as reply:
                    if reply.status == 200:
                        return str((await reply.json())["choices"][0]["message"]["content"])
                    assert reply.status == 503
                    assert int(reply.headers["Retry-After"]) >= 1
                    assert (await reply.json())["error"]["type"] == "overloaded_error"
                    return None

            async def by_grpc(body: dict[str, Any]) -> str | None:
                try:
                    return await api.over_grpc(body)
                except grpc.aio.AioRpcError as error:
                    refused = error
                assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert int(dict(refused.trailing_metadata() or ())["retry-after"]) >= 1
                return None

            found = await asyncio.gather(*((by_grpc, by_http)[i % 2](body) for i, body in enumerate(bodies)))
            answered = [i for i, text in enumerate(found) if text is not None]
            assert [found[i] for i in answered] == [expected[i] for i in answered]
            assert 12 <= len(answered) < 64
            metrics = await api.until(idle)
            assert metrics["vllm:admission_rejections_total queue_full"] == 64 - len(answered)

    expected: list[str] = []

    async def main() -> None:
        expected.extend(await singles())

    run(main, 60)
    with own_server(artifact, tmp_path, "--slots", "4", "--max-queue", "8") as small:
        run(lambda: crowd(small, expected), 60)
        assert stop_server(small) == 0


def test_sigterm_finishes_16_in_flight_and_refuses_new_ones(artifact: Path, tmp_path: Path) -> None:
    async def main(server: Server) -> None:
        async with clients(server) as api:
            body = chats(1)[0] | {"max_tokens": 200}
            ways = [api.whole, api.streamed, api.over_grpc, api.streamed]
            answers = [asyncio.create_task(ways[i % 4](body)) for i in range(16)]
            await api.until(lambda metrics: busy(metrics) == 16)
            server.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(DEADLINE_SECONDS):
                while True:
                    async with api.http.get("/ready") as reply:
                        if reply.status == 503:
                            break
            assert not all(task.done() for task in answers), "nothing was left to drain"
            async with api.http.post("/v1/chat/completions", json=body) as reply:
                assert reply.status == 503
                assert "Retry-After" in reply.headers
                assert "shutting down" in (await reply.json())["error"]["message"]
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await api.over_grpc(body)
            assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE
            health = await api.health.Check(health_pb2.HealthCheckRequest(service="readiness"))
            assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
            async with api.http.get("/health") as reply:
                assert reply.status == 200, "alive while it drains"
            assert len(set(await asyncio.gather(*answers))) == 1  # each checked for its finish_reason

    with own_server(artifact, tmp_path, "--slots", "2", "--max-context", "256") as server:
        run(lambda: main(server), 60)
        assert server.process.wait(DEADLINE_SECONDS) == 0
    with closing(sqlite3.connect(tmp_path / "records.sqlite")) as db:
        reasons = [json.loads(record)["finish_reason"] for (record,) in db.execute("SELECT record FROM interactions")]
    assert reasons == ["length"] * 16


def test_a_request_that_runs_into_its_time_limit_is_a_504(artifact: Path, tmp_path: Path) -> None:
    async def main(server: Server) -> None:
        async with clients(server) as api:
            body = chats(1)[0] | {"max_tokens": 150}  # no machine computes so many in a millisecond
            async with api.http.post("/v1/chat/completions", json=body) as reply:
                assert reply.status == 504
                error = (await reply.json())["error"]
            assert (error["type"], error["code"]) == ("timeout_error", "request_timeout")
            assert "timed out after 0.001 s" in error["message"]
            async with api.http.post("/v1/chat/completions", json=body | {"stream": True}) as reply:
                events = (await reply.text()).split("\n\n")
            assert json.loads(events[-3].removeprefix("data: ")) == {"error": error}
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await api.over_grpc(body)
            assert refusal.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert refusal.value.details() == error["message"]
            metrics = await api.until(idle)
            assert metrics["vllm:request_success_total error"] == 3

    with own_server(artifact, tmp_path, "--request-timeout-seconds", "0.001") as server:
        run(lambda: main(server), 60)
        assert stop_server(server) == 0


# -- feedback ---------------------------------------------------------------------------------------------------


def test_feedback_survives_a_kill(artifact: Path, tmp_path: Path) -> None:
    stored: dict[str, Any] = {}

    async def main(server: Server) -> None:
        async with clients(server) as api:
            answer = await api.openai.chat.completions.create(
                model="", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
            )
            judgement: dict[str, Any] = {"inference_id": answer.id, "metric_name": "thumbs", "value": True}
            async with api.http.post("/v1/feedback", json=judgement) as reply:
                assert reply.status == 200
                stored[(await reply.json())["feedback_id"]] = (answer.id, "thumbs", True)
            text = Value(string_value="Good day to you.")
            correction = pb.FeedbackRequest(inference_id=answer.id, metric_name="demonstration", value=text)
            reply_id = (await api.grpc.SendFeedback(correction)).feedback_id
            stored[reply_id] = (answer.id, "demonstration", "Good day to you.")

            async with api.http.post("/v1/feedback", json=judgement | {"inference_id": "chatcmpl-0"}) as reply:
                assert reply.status == 404
                assert (await reply.json())["error"]["param"] == "inference_id"
            correction.inference_id = "chatcmpl-0"
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await api.grpc.SendFeedback(correction)
            assert refusal.value.code() == grpc.StatusCode.NOT_FOUND
            stored["completion"] = answer.choices[0].message.content
            server.process.kill()
            server.process.wait()

    with own_server(artifact, tmp_path) as server:
        run(lambda: main(server), 60)
    completion = stored.pop("completion")
    judged = list(open_store(str(tmp_path / "records.sqlite")).scan())
    found = {j.feedback.id: (j.feedback.inference_id, j.feedback.metric_name, j.feedback.value) for j in judged}
    assert found == stored
    assert all(j.interaction.completion == completion for j in judged)
    assert all(j.interaction.messages == [{"role": "user", "content": "Hello"}] for j in judged)


# -- what it refuses to serve -----------------------------------------------------------------------------------


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def make_newer(path: Path) -> None:
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))


def refusal_of(*arguments: str) -> list[str]:
    """The lines that a server which must not start says."""
    command = [sys.executable, "-m", "serve", "--http-port", "0", "--grpc-port", "0", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    return ended.stderr.splitlines()


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda a: flip_bit(a / WEIGHTS), "model.onnx.data has SHA-256"),
    "truncated": (lambda a: os.truncate(a / WEIGHTS, 1000), "model.onnx.data has 1000 bytes"),
    "not listed": (lambda a: (a / "more").write_bytes(b"x"), "more is not listed"),
    "symbolic link": (
        lambda a: ((a / TOKENIZER).rename(a.parent / "t"), (a / TOKENIZER).symlink_to(a.parent / "t")),
        "tokenizer.json is a link",
    ),
    "newer format": (lambda a: make_newer(a / MANIFEST), "format version 2"),
    "no graph": (lambda a: (a / GRAPH).unlink(), "model.onnx is listed"),
}


@pytest.mark.parametrize("case", HARM)
def test_a_bad_artifact_is_refused_in_one_line(artifact: Path, tmp_path: Path, case: str) -> None:
    harm, message = HARM[case]
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    harm(copy)
    (line,) = refusal_of("--model", str(copy), "--records", str(tmp_path / "records.sqlite"))
    assert line.startswith("serve: ")
    assert message in line


BAD_FLAGS = {
    "--slots -2": "--slots: -2 is out of range; give a number 0 or more",
    "--http-port 70000": "--http-port: 70000 is out of range; give a number from 0 to 65535",
    "--drain-seconds nan": "--drain-seconds: nan is out of range",
    "--threads two": "--threads: invalid int value: 'two'",
    "--no-such-flag 1": "unrecognized arguments: --no-such-flag 1",
    "--max-context 100000": "serve: --max-context 100000 is beyond the model's 256 tokens",
    "--records LICENSE": "serve: LICENSE cannot be opened",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_refused_by_name(artifact: Path, flags: str) -> None:
    assert BAD_FLAGS[flags] in refusal_of("--model", str(artifact), *flags.split())[-1]
