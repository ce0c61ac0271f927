"""A steady stream of real clients while the versions behind them change: nobody is lost, nobody is given a mixture."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proto import inference_pb2 as pb
from proto import manifest as artifacts
from proto.manifest import MANIFEST, load
from serve.loader import Loader
from serve.metrics import Metrics
from serve.settings import Settings
from tests.serve.fakes import run
from tests.serve.registries import Registry
from tests.serve.test_server import Clients, chats, clients, refusal_of
from tests.serve.tiny import CAPACITY, SLOTS, Server, quantize_tiny, start_server, stop_server

CLIENTS = 9
DEADLINE_SECONDS = 60


@pytest.fixture(scope="module")
def second(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights: it answers otherwise."""
    target = tmp_path_factory.mktemp("second") / "tiny"
    return quantize_tiny(artifact.parent / "checkpoint", target, recipe="w4a8", calibration_windows=2, measure=True)


def publish(registry: Registry, artifact: Path, number: int = 0) -> str:
    """A copy of the artifact as a version; another one for another number."""
    copy = registry.root / "copy"
    shutil.copytree(artifact, copy)
    manifest = load(copy)
    if number:
        lineage = msgspec.structs.replace(manifest.lineage, command=f"test {number}")
        manifest = msgspec.structs.replace(manifest, lineage=lineage)
        (copy / MANIFEST).write_bytes(artifacts.encode(manifest))
    return registry.take(copy)


@dataclass
class Crowd:
    """Clients of all kinds that ask without a pause, and what they were told."""

    api: Clients
    allowed: list[set[str]]  # the versions that may answer, by their short names; the last one now
    answers: list[tuple[int, int, str, int, str]] = field(default_factory=list)  # began, ended, version, body, text
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    leaving: bool = False

    async def come(self) -> None:
        bodies = chats(12, max_tokens=10)
        ways = [self.whole, self.streamed, self.over_grpc]
        for number in range(CLIENTS):
            self.tasks.append(asyncio.create_task(self.ask(ways[number % 3], bodies, number)))

    async def ask(self, way: Callable[[dict[str, Any]], Any], bodies: list[dict[str, Any]], number: int) -> None:
        count = 0
        while not self.leaving:
            count += 1
            chosen = (number + count) % len(bodies)
            began = len(self.allowed) - 1
            version, text = await way(bodies[chosen] | {"user": f"user {number} {count}"})
            self.answers.append((began, len(self.allowed), version, chosen, text))

    async def leave(self) -> None:
        """Every call must have ended well: what a task raises is raised here."""
        self.leaving = True
        await asyncio.gather(*self.tasks)

    async def whole(self, body: dict[str, Any]) -> tuple[str, str]:
        async with self.api.http.post("/v1/chat/completions", json=body) as reply:
            assert reply.status == 200, await reply.text()
            answer = await reply.json()
        assert answer["choices"][0]["finish_reason"] == "length"
        return answer["system_fingerprint"], answer["choices"][0]["message"]["content"]

    async def streamed(self, body: dict[str, Any]) -> tuple[str, str]:
        text, reasons, versions = "", [], set()
        async with self.api.http.post("/v1/chat/completions", json=body | {"stream": True}) as reply:
            assert reply.status == 200, await reply.text()
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    event = msgspec.json.decode(line[6:])
                    versions.add(event["system_fingerprint"])
                    text += event["choices"][0]["delta"].get("content") or ""
                    reasons.append(event["choices"][0]["finish_reason"])
        assert reasons[-1] == "length"
        (version,) = versions
        return version, text

    async def over_grpc(self, body: dict[str, Any]) -> tuple[str, str]:
        chunks = [chunk async for chunk in self.api.grpc.Chat(pb.ChatRequest(**body))]
        assert chunks[-1].finish_reason == "length"
        (version,) = {chunk.system_fingerprint for chunk in chunks}
        return version, "".join(chunk.text for chunk in chunks)

    async def until(self, shares: dict[str, float]) -> None:
        """After a pointer was moved: wait until the traffic is split so, and each of them has answered."""
        names = {version[:12]: share for version, share in shares.items()}
        self.allowed.append(self.allowed[-1] | {name for name, share in names.items() if share})
        async with asyncio.timeout(DEADLINE_SECONDS):
            while await self.split() != names:
                await asyncio.sleep(0.01)
            self.allowed.append({name for name, share in names.items() if share})
            seen = len(self.answers)
            while {answer[2] for answer in self.answers[seen:]} < self.allowed[-1]:
                await asyncio.sleep(0.01)

    async def split(self) -> dict[str, float]:
        async with self.api.http.get("/v1/models") as reply:
            return {model["digest"][:12]: model["share"] for model in (await reply.json())["data"]}

    def check(self) -> None:
        """Each answer by a version that was to answer, and the same request the same text from the same version."""
        texts: dict[tuple[str, int], set[str]] = {}
        for began, ended, version, body, text in self.answers:
            assert version in set().union(*self.allowed[began:ended])
            texts.setdefault((version, body), set()).add(text)
        assert all(len(found) == 1 for found in texts.values())


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    (tmp_path / "registry").mkdir()
    return Registry(tmp_path / "registry")


@pytest.fixture
def followed(registry: Registry, artifact: Path, tmp_path: Path) -> Iterator[tuple[Server, str]]:
    """A server that follows the registry, and the version that it begins with."""
    old = publish(registry, artifact)
    registry.point("current", old)
    server = start_server(registry.root, tmp_path / "records.sqlite", how="--registry")
    yield server, old
    if server.process.poll() is None:
        server.process.kill()
        server.process.wait()
    assert server.process.stdout is not None
    server.process.stdout.close()


def test_no_request_is_lost_while_versions_come_and_go(
    registry: Registry, followed: tuple[Server, str], artifact: Path, second: Path
) -> None:
    server, old = followed
    new, broken = publish(registry, second), publish(registry, artifact, 1)
    weights = registry.weights(broken)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)

    async def main() -> None:
        async with clients(server) as api:
            crowd = Crowd(api, [{old[:12]}])
            await crowd.come()
            registry.point("candidate", new, 0.5)
            await crowd.until({old: 0.5, new: 0.5})
            registry.point("candidate", None)
            await crowd.until({old: 1.0})
            registry.point("candidate", new, 0.25)
            await crowd.until({old: 0.75, new: 0.25})
            registry.point("previous", old)
            registry.point("current", new)
            registry.point("candidate", None)
            await crowd.until({new: 1.0})
            registry.point("candidate", broken, 0.5)
            await api.until(lambda metrics: metrics["pawl_version_load_failures_total"] == 1)
            await crowd.until({new: 1.0})
            registry.point("current", old)  # the rollback, from a version that was never loaded again
            registry.point("candidate", None)
            await crowd.until({old: 1.0})
            await crowd.leave()
            crowd.check()
            answered = {answer[2] for answer in crowd.answers}
            assert answered == {old[:12], new[:12]}
            own = {version: {(a[3], a[4]) for a in crowd.answers if a[2] == version} for version in answered}
            assert own[old[:12]] != own[new[:12]], "the versions answer alike, which proves little"
            async with api.http.get("/metrics") as reply:
                lines = (await reply.text()).splitlines()
            for line in lines:
                name, _, value = line.rpartition(" ")
                failed = any(
                    f'="{what}"' in name for what in ("error", "abort", "queue_full", "draining", "5xx", "4xx")
                )
                assert not (failed and float(value)), line

    run(main, 240)
    assert stop_server(server) == 0


def test_a_request_that_was_begun_survives_its_version(
    registry: Registry, followed: tuple[Server, str], second: Path
) -> None:
    """Long streams over both protocols, and more that wait for their turn: all of them end as they would have."""
    server, _ = followed
    new = publish(registry, second)
    body = chats(1)[0] | {"max_tokens": CAPACITY - 60}

    async def main() -> None:
        async with clients(server) as api:
            expected = await api.whole(body)
            ways = [api.whole, api.streamed, api.over_grpc]
            # More than run at once, so that some are still in the queue when the version is left.
            begun = [asyncio.create_task(ways[i % 3](body)) for i in range(SLOTS * 4)]
            await api.until(lambda metrics: metrics["vllm:num_requests_waiting"] > SLOTS)
            registry.point("current", new)
            async with asyncio.timeout(DEADLINE_SECONDS):
                while (await api.openai.models.list()).data[0].model_dump()["digest"] != new:
                    await asyncio.sleep(0.001)
            assert set(await asyncio.gather(*begun)) == {expected}
            assert await api.whole(body) != expected
            async with api.http.get("/ready") as reply:
                assert reply.status == 200

    run(main, 120)
    assert stop_server(server) == 0


def test_a_version_gives_back_its_kv_cache_and_shares_its_tokenizer(artifact: Path, second: Path) -> None:
    async def main() -> None:
        metrics = Metrics("tiny")
        loader = Loader(Settings(model=artifact, max_context=CAPACITY), metrics, asyncio.get_running_loop())
        version = loader.load(artifact, load(artifact))
        assert loader.load(second, load(second)).tokenizer is version.tokenizer
        version.start()
        runner = weakref.ref(version.engine.runner)
        await version.stop(5)
        gc.collect()
        assert runner() is None
        version.start()
        await version.stop(5)

    run(main)


def test_a_server_without_a_current_version_says_what_is_missing(registry: Registry, second: Path) -> None:
    (line,) = refusal_of("--registry", str(registry.root))
    assert line.startswith(f"serve: {registry.root} has no current version; publish an artifact and promote it")
    assert "give one of --model DIR and --registry ROOT" in refusal_of()[-1]
    assert "give one of" in refusal_of("--registry", str(registry.root), "--model", str(second))[-1]
