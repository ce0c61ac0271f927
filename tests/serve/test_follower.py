"""What the registry's pointers name comes to answer, whatever state the registry is in meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proto.manifest import Manifest
from proto.registry import HISTORY
from serve import follower
from serve.follower import Follower
from serve.metrics import Metrics
from serve.registry import load_version
from serve.version import Version
from serve.versions import Versions
from tests.serve.fakes import CONTEXT, FakeEngine, FakeTokenizer, choices, run
from tests.serve.registries import Registry


@dataclass
class FakeLoader:
    """Loads at once what passed the checks, and keeps the digests."""

    metrics: Metrics
    loaded: list[str] = field(default_factory=list)

    def load(self, directory: Path, manifest: Manifest, *, warm: bool = False) -> Version:
        self.loaded.append(manifest.digest)

        def make_engine() -> Any:
            self.metrics.engine(manifest, choices())
            return FakeEngine()

        tokenizer: Any = FakeTokenizer()
        return Version(manifest, tokenizer, CONTEXT, make_engine)


@dataclass
class Rig:
    registry: Registry
    versions: Versions
    loader: FakeLoader
    follower: Follower

    async def turn(self) -> None:
        """One turn of the follower."""
        await self.follower.turn()

    async def settle(self) -> None:
        """Turns, until what it loads is loaded and who leaves is gone; then two more, since dropping waits for one."""
        await self.turn()
        while self.follower.busy or self.versions.leaving:
            await asyncio.sleep(0)
            await self.turn()
        await self.turn()
        await self.turn()

    def answers(self) -> dict[str, float]:
        return self.versions.shares

    def value(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.loader.metrics.render()[0].decode())
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


@asynccontextmanager
async def following(root: Path, *, published: int = 3) -> AsyncIterator[tuple[Rig, list[str]]]:
    """A rig that serves the first of the published versions."""
    registry = Registry(root)
    digests = [registry.publish(number) for number in range(published)]
    registry.point("current", digests[0])
    metrics = Metrics("echo")
    loader: Any = FakeLoader(metrics)
    versions = Versions("echo", loader.load(*load_version(root, digests[0])), metrics, 5.0)
    loader.loaded.clear()
    yield Rig(registry, versions, loader, Follower(root, loader, versions, metrics)), digests


def test_a_candidate_comes_is_promoted_and_rolled_back_without_another_load(tmp_path: Path) -> None:
    async def main() -> None:
        async with following(tmp_path) as (rig, (old, new, _)):
            rig.registry.point("candidate", new, 0.25)
            await rig.settle()
            assert rig.answers() == {old: 0.75, new: 0.25}
            rig.registry.point("candidate", new, 0.5)
            await rig.turn()
            assert rig.answers() == {old: 0.5, new: 0.5}
            engine = rig.versions.loaded[new].engine

            rig.registry.point("previous", old)
            rig.registry.point("current", new)
            rig.registry.point("candidate", None)
            await rig.turn()
            assert rig.answers() == {new: 1.0}
            assert rig.versions.current.engine is engine, "who was on trial goes on as it is"
            await rig.settle()
            assert rig.versions.idle == [rig.versions.loaded[old]], "kept for a rollback, without a KV cache"
            assert rig.value("pawl_slots") == choices().num_slots

            rig.registry.point("current", old)
            rig.registry.point("previous", None)
            await rig.turn()
            assert rig.answers() == {old: 1.0}
            await rig.settle()
            assert rig.loader.loaded == [new]
            assert rig.versions.loaded.keys() == {old}
            assert rig.value("vllm:request_success_total", version=new[:12]) == 0
            assert rig.value("pawl_registry_in_step") == 1

    run(main)


def test_a_candidate_that_is_taken_away_answers_no_more(tmp_path: Path) -> None:
    async def main() -> None:
        async with following(tmp_path) as (rig, (old, new, _)):
            rig.registry.point("candidate", new, 1.0)
            await rig.settle()
            assert rig.answers() == {old: 0.0, new: 1.0}
            rig.registry.point("candidate", None)
            await rig.turn()
            assert rig.answers() == {old: 1.0}
            await rig.settle()
            assert rig.versions.loaded.keys() == {old}

    run(main)


def test_a_movement_seen_between_two_of_its_files_loads_nothing_twice(tmp_path: Path) -> None:
    async def main() -> None:
        async with following(tmp_path) as (rig, (old, new, _)):
            rig.registry.point("candidate", new, 0.5)
            await rig.settle()
            rig.registry.point("candidate", None)
            await rig.turn()
            assert rig.answers() == {old: 1.0}
            while rig.versions.leaving:
                await asyncio.sleep(0)
            rig.registry.point("current", new)
            await rig.turn()
            assert rig.answers() == {new: 1.0}
            assert rig.loader.loaded == [new]

    run(main)


@pytest.mark.parametrize("role", ["candidate", "current"])
def test_a_broken_version_is_reported_and_never_answers(
    tmp_path: Path, role: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with following(tmp_path) as (rig, (old, broken, other)):
            weights = rig.registry.weights(broken)
            weights.write_bytes(b"\1" + bytes(999))
            rig.registry.point(role, broken, 0.5 if role == "candidate" else 0.0)
            await rig.settle()
            await rig.settle()
            assert rig.answers() == {old: 1.0}
            assert rig.loader.loaded == []
            assert rig.value("pawl_version_load_failures_total") == 1, "it is tried once"
            assert rig.value("pawl_registry_in_step") == 0
            (line,) = (record.getMessage() for record in caplog.records if record.levelname == "ERROR")
            assert broken[:12] in line
            assert "it was changed" in line

            weights.write_bytes(bytes(1000))
            rig.registry.point(role, broken, 0.25 if role == "candidate" else 0.0)  # the pointer is written again
            await rig.settle()
            assert broken in rig.answers()
            assert rig.value("pawl_registry_in_step") == 1
            rig.registry.point("candidate", other, 0.5)
            await rig.settle()
            assert rig.answers()[other] == 0.5

    run(main)


def test_a_version_in_the_wrong_folder_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with following(tmp_path) as (rig, (old, new, other)):
            rig.registry.weights(other).parent.rename(tmp_path / "aside")
            rig.registry.weights(new).parent.rename(rig.registry.weights(other).parent)
            rig.registry.point("current", other)
            await rig.settle()
            assert rig.answers() == {old: 1.0}
            assert rig.value("pawl_version_load_failures_total") == 1

    run(main)


def test_a_registry_that_cannot_be_read_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with following(tmp_path) as (rig, (old, new, _)):
            rig.registry.point("candidate", new, 0.5)
            await rig.settle()
            task = asyncio.get_running_loop().create_task(rig.follower.run())
            for text in (b"{", b"", b'{"version": "x"}', None):
                if text is None:
                    rig.registry.point("current", None)
                else:
                    (tmp_path / "current").write_bytes(text)
                while rig.value("pawl_registry_in_step") == 1:
                    await asyncio.sleep(0.001)
                assert rig.answers() == {old: 0.5, new: 0.5}
                rig.registry.point("current", old)
                while rig.value("pawl_registry_in_step") == 0:
                    await asyncio.sleep(0.001)
            task.cancel()

    monkeypatch.setattr(follower, "POLL_SECONDS", 0.001)
    run(main)


def test_a_candidate_waits_until_the_last_one_has_left(tmp_path: Path) -> None:
    async def main() -> None:
        async with following(tmp_path, published=4) as (rig, (old, first, second, third)):
            rig.registry.point("candidate", first, 1.0)
            await rig.settle()
            with rig.versions.route("") as held:
                assert held.digest == first
                rig.registry.point("candidate", second, 0.5)
                for _ in range(5):
                    await rig.turn()
                    await asyncio.gather(*rig.follower.busy)
                assert rig.answers() == {old: 1.0}, "a third KV cache would be one too many"
                assert rig.value("pawl_slots") == 2 * choices().num_slots
            await rig.settle()
            assert rig.answers() == {old: 0.5, second: 0.5}
            with rig.versions.route(second):  # a rollback does not wait, were it for a version that is not loaded
                rig.registry.point("current", third)
                for _ in range(3):
                    await rig.turn()
                    await asyncio.gather(*rig.follower.busy)
                assert third in rig.answers()

    run(main)


def test_previous_makes_room_when_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with following(tmp_path) as (rig, (old, previous, new)):
            size = sum(path.stat().st_size for path in rig.registry.weights(new).parent.iterdir())
            free = 2 * size - 1
            monkeypatch.setattr(follower, "available_bytes", lambda: free)
            rig.registry.point("previous", previous)
            await rig.settle()
            assert rig.loader.loaded == [], "nobody waits for it, and it needs spare memory"
            free = 2 * size
            await rig.settle()
            assert rig.loader.loaded == [previous]
            free = size - 1
            rig.registry.point("candidate", new, 0.5)
            await rig.settle()
            assert rig.loader.loaded == [previous, new]
            assert rig.versions.loaded.keys() == {old, new}
            free = 2 * size
            await rig.settle()
            assert rig.loader.loaded == [previous, new, previous]

    run(main)


def test_the_history_is_counted_once_and_a_torn_line_when_it_is_whole(tmp_path: Path) -> None:
    async def main() -> None:
        async with following(tmp_path) as (rig, (old, new, _)):
            for action in ("publish", "canary", "promote"):
                rig.registry.tell(action, new)  # type: ignore[arg-type]
            await rig.turn()
            await rig.turn()
            history = tmp_path / HISTORY
            rig.registry.tell("rollback", old)
            whole = history.read_bytes()
            history.write_bytes(whole[:-10])
            await rig.turn()
            assert rig.value("pawl_decisions_total", action="rollback") == 0
            history.write_bytes(whole)
            await rig.turn()
            counts = {action: rig.value("pawl_decisions_total", action=action) for action in ("publish", "rollback")}
            assert counts == {"publish": 1, "rollback": 1}
            assert rig.value("pawl_decisions_total") == 4

    run(main)
