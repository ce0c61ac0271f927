"""Who answers: the split is stable and fair, and nobody who has begun is lost in a switch."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import grpc
import msgspec
import pytest

from proto import inference_pb2 as pb
from proto import inference_pb2_grpc as stubs
from proto.manifest import Lineage
from serve.errors import NotFound
from serve.version import Version
from serve.versions import Versions
from tests.serve.fakes import CONTEXT, FakeEngine, FakeMetrics, FakeTokenizer, manifest, run, serving


def version(number: int, engine: FakeEngine | None = None) -> Version:
    of: Any = msgspec.structs.replace(manifest(), lineage=Lineage(checkpoint=f"{number:064x}"))
    parts: list[Any] = [FakeTokenizer(), CONTEXT, lambda: engine or FakeEngine()]
    return Version(of, *parts)


def versions() -> Versions:
    metrics: Any = FakeMetrics()
    return Versions("echo", version(0), metrics, 5.0)


def chosen(among: Versions, model: str, key: str) -> Version:
    with among.route(model, key) as found:
        return found


USERS = [f"user-{number}" for number in range(4000)]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_the_candidate_gets_its_share(share: float) -> None:
    among, candidate = versions(), version(1)
    among.assign(among.current, candidate, share)
    for name in ("", "echo"):
        got = sum(chosen(among, name, user) is candidate for user in USERS)
        assert abs(got - share * len(USERS)) <= 4 * (share * (1 - share) * len(USERS)) ** 0.5


def test_a_user_stays_where_he_is_when_the_share_grows_and_not_with_the_next_candidate() -> None:
    async def main() -> None:
        among, candidate = versions(), version(1)
        had: set[str] = set()
        for share in (0.1, 0.1, 0.3, 0.6):
            among.assign(among.current, candidate, share)
            now = {user for user in USERS if chosen(among, "", user) is candidate}
            assert had <= now
            had = now
        among.assign(among.current, other := version(2), 0.6)
        both = sum(chosen(among, "", user) is other for user in had)
        assert 0.5 < both / len(had) < 0.7, "another candidate has other users"

    run(main)


def test_a_version_can_be_named_and_no_other() -> None:
    among, candidate = versions(), version(1)
    among.assign(among.current, candidate, 0.0)
    for named in (among.current, candidate):
        for name in (named.digest, named.name):
            assert {chosen(among, name, user) for user in USERS[:50]} == {named}
    for name in (candidate.digest[:11], version(2).digest, "ECHO"):
        with pytest.raises(NotFound, match=f"{name!r} is not served here; this server serves 'echo', in version"):
            chosen(among, name, "x")


def test_what_was_begun_keeps_its_version_until_it_ends() -> None:
    async def main() -> None:
        among, new = versions(), version(1)
        old = among.current
        with among.route("", "a") as held:
            among.add(new)
            among.assign(new)
            for _ in range(20):
                await asyncio.sleep(0)
            assert (held, held.started) == (old, True)
            assert chosen(among, "", "a") is new
            assert (among.leaving, among.idle) == ({old}, [])
            with pytest.raises(NotFound):
                chosen(among, old.digest, "a")
        await until_alone(among)
        assert not old.started
        assert among.idle == [old]
        among.drop(old)
        assert list(among.loaded.values()) == [new]

    run(main)


def test_a_version_called_back_goes_on_with_its_engine() -> None:
    async def main() -> None:
        among, new = versions(), version(1)
        old = among.current
        engine = old.engine
        with among.route("", "a"):
            among.assign(new)
            among.assign(old)
            assert among.leaving == {new}
        await until_alone(among)
        assert (old.engine, new.started) == (engine, False)
        among.assign(new)
        await until_alone(among)
        among.assign(old)
        assert old.engine is not engine, "its cache was given back"

    run(main)


async def until_alone(among: Versions) -> None:
    while among.leaving:
        await asyncio.sleep(0)


def test_both_protocols_tell_which_version_answered_and_so_do_records_and_feedback() -> None:
    async def main() -> None:
        async with serving() as rig, aiohttp.ClientSession(rig.url) as http:
            among = rig.service.versions
            candidate = version(1, rig.engine)
            among.add(candidate)
            among.assign(among.current, candidate, 0.5)
            names = {among.current.name: among.current, candidate.name: candidate}
            sides: dict[str, list[str]] = {}
            async with grpc.aio.insecure_channel(rig.address) as channel:
                api = stubs.InferenceStub(channel)
                for user in USERS[:16]:
                    body: dict[str, Any] = {"prompt": ["ab"], "max_tokens": 3, "user": user}
                    async with http.post("/v1/completions", json=body) as reply:
                        whole = await reply.json()
                    chunks = [chunk async for chunk in api.Complete(pb.CompletionRequest(**body))]
                    sides[user] = [whole["system_fingerprint"], *(chunk.system_fingerprint for chunk in chunks)]
                    for id in (whole["id"], chunks[0].id):
                        kept = rig.records.kept[id]
                        assert (kept.model, kept.model_digest) == ("echo", names[sides[user][0]].digest)
                    judgement = {"inference_id": whole["id"], "metric_name": "thumbs", "value": True}
                    async with http.post("/v1/feedback", json=judgement) as reply:
                        assert reply.status == 200
                    assert rig.metrics.feedbacks[-1] == ("thumbs", True, sides[user][0])
                listed = list((await api.ListModels(pb.ListModelsRequest())).data)
            assert all(len(set(side)) == 1 for side in sides.values())
            assert {side[0] for side in sides.values()} == names.keys()
            async with http.get("/v1/models") as reply:
                models = (await reply.json())["data"]
            for found in (models, [{"id": m.id, "digest": m.digest, "role": m.role, "share": m.share} for m in listed]):
                told = [(model["id"], model["digest"], model["role"], model["share"]) for model in found]
                assert told == [
                    ("echo", among.current.digest, "current", 0.5),
                    (candidate.name, candidate.digest, "candidate", 0.5),
                ]
            for name in ("echo", candidate.name, candidate.digest):
                async with http.get(f"/v1/models/{name}") as reply:
                    assert reply.status == 200
            body = {"prompt": "ab", "model": candidate.digest}
            async with http.post("/v1/completions", json=body) as reply:
                assert (await reply.json())["system_fingerprint"] == candidate.name

    run(main)


def test_a_conversation_and_a_request_id_stay_on_their_side() -> None:
    async def main() -> None:
        async with serving() as rig, aiohttp.ClientSession(rig.url) as http:
            among = rig.service.versions
            among.assign(among.current, version(1, rig.engine), 0.5)

            async def side(messages: list[dict[str, str]], **headers: str) -> str:
                body = {"messages": messages, "max_tokens": 2}
                async with http.post("/v1/chat/completions", json=body, headers=headers) as reply:
                    return str((await reply.json())["system_fingerprint"])

            by_conversation, by_id = set(), set()
            for number in range(12):
                said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Hello {number}"}]
                turns = [await side(said)]
                for more in ("And?", "So?"):
                    said += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": more}]
                    turns.append(await side(said))
                assert len(set(turns)) == 1
                by_conversation.add(turns[0])
                ids = {
                    await side([{"role": "user", "content": text}], **{"X-Request-Id": f"r{number}"}) for text in "ab"
                }
                assert len(ids) == 1
                by_id |= ids
            assert len(by_conversation) == len(by_id) == 2

    run(main)


def test_an_answer_holds_its_version_as_long_as_it_lasts() -> None:
    async def main() -> None:
        async with serving(FakeEngine(step_seconds=0.005)) as rig, aiohttp.ClientSession(rig.url) as http:
            among = rig.service.versions
            old, new = among.current, version(1)
            body = {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 4000, "stream": True}
            async with http.post("/v1/completions", json=body) as reply:
                await reply.content.readline()
                among.add(new)
                among.assign(new)
                async with http.post("/v1/completions", json={"prompt": "x"}) as other:
                    assert (await other.json())["system_fingerprint"] == new.name
                assert (old.started, len(rig.engine.running)) == (True, 4)
            await until_alone(among)  # the client left, so nothing is left to finish
            await rig.engine.until(lambda: not rig.engine.running)
            assert (old.started, len(rig.engine.cancelled)) == (False, 4)

    run(main)
