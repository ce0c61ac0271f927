"""Measuring a profile and holding the plan to a server, from end to end, on the tiny model."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from bench import capacity, capacity_plot, load, step_cost
from bench.capacity import Replay, compare, open_loop
from bench.connection import BadAnswer
from bench.load import HOST
from bench.score import Timing
from deploy.__main__ import main as deploy
from deploy.capacity_profile import load as load_profile
from deploy.workload import Visit
from tests.deploy.capacity_profiles import make_profile
from tests.serve.tiny import CAPACITY, VOCABULARY, make_artifact

EVENT = b'data: {"choices": [{"text": "x"}]}\n\n'


def test_the_plan_is_held_to_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_artifact(tmp_path)
    monkeypatch.setattr(load, "TOKEN_IDS", range(10, VOCABULARY))
    monkeypatch.setattr(step_cost, "LOADS", (((1, 4), (4, 60), (4, 20)),))
    monkeypatch.setattr(capacity, "CLIENTS", 4)
    monkeypatch.setattr(capacity, "SHARES", (0.2, 0.5))
    words = [
        "--model",
        str(model),
        "--prompt",
        "4-60",
        "--output",
        "4-20",
        "--seconds",
        "0.3",
        "--profile-seconds",
        "0.2",
    ]
    words += ["--out", str(tmp_path / "result.json"), "--profile-out", str(tmp_path / "profile.json")]
    monkeypatch.setattr(sys, "argv", ["capacity", *words])
    capacity.main()

    result = json.loads((tmp_path / "result.json").read_text())
    assert [one["share"] for one in result["levels"]] == [0.2, 0.5]
    for one in result["levels"]:
        assert len(one["raw"]) == one["requests"] >= 10
        assert one["measured"]["ttft_mean_ms"] > 0 < one["planned"]["ttft_mean_ms"]
        assert 0.2 < one["turns_over_profile"] < 5
        assert one["at_its_speed"]["ttft_mean_ms"] > 0
    assert str(tmp_path) not in json.dumps(result)
    profile = load_profile(tmp_path / "profile.json")
    assert profile.engine.capacity <= CAPACITY * 2
    assert profile.engine.max_running == 32
    assert profile.fit.turns > 100
    assert 0 < profile.front_seconds < 1
    assert "threads" in profile.about
    capsys.readouterr()

    plan = ["plan", str(tmp_path / "profile.json"), "--prompt", "4-60", "--output", "4-20", "--requests", "100"]
    monkeypatch.setattr(sys, "argv", ["deploy", *plan, "--slo", "ttft:p50:60000", "--rate", "1K", "--slots", "4"])
    assert deploy() == 0
    assert "requests a minute" in capsys.readouterr().out


def test_requests_are_sent_when_they_are_due_whatever_is_unanswered() -> None:
    waiting: list[asyncio.StreamWriter] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        waiting.append(writer)
        if len(waiting) == 3:  # nobody is answered before all have come
            for number, each in enumerate(waiting):
                usage = b'data: {"choices": [], "usage": {"prompt_tokens": %d, "completion_tokens": 1}}\n\n' % number
                each.write(b"HTTP/1.1 200 OK\r\n\r\n" + EVENT + usage)
                each.close()

    async def run() -> Replay:
        server = await asyncio.start_server(answer, HOST, 0)
        async with server:
            visits = [Visit(0.02 * number, 4, 1) for number in range(3)]
            return await open_loop(server.sockets[0].getsockname()[1], visits, [b"GET / HTTP/1.1\r\n\r\n"] * 3)

    replay = asyncio.run(run())
    assert [timing.prompt_tokens for timing in replay.timings] == [0, 1, 2]
    sent = [visit.arrival for visit in replay.visits]
    assert sent == sorted(sent)
    assert all(due <= when for due, when in zip((0.0, 0.02, 0.04), sent, strict=True))


def send_one(status: bytes) -> Replay:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def run() -> Replay:
        server = await asyncio.start_server(answer, HOST, 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await open_loop(port, [Visit(0.0, 4, 1)], [b"GET / HTTP/1.1\r\n\r\n"])

    return asyncio.run(run())


def test_a_refused_request_is_counted_and_a_failed_one_fails_the_run() -> None:
    replay = send_one(b"503 Service Unavailable")
    assert replay.timings == [None]
    assert replay.raw()[0].endswith("4 1 refused")
    with pytest.raises(BadAnswer, match="500"):
        send_one(b"500 Internal Server Error")


def test_errors_are_of_the_simulated_over_the_measured() -> None:
    """A turn takes 100 ms; the server's first token took 125 ms, its others 80 ms."""
    replay = Replay([Visit(5.0, 8, 3), Visit(5.0, 8, 3)], [Timing(8, 3, [0.125, 0.205, 0.285]), None])
    assert replay.figures()["refused"] == 1
    del replay.visits[1], replay.timings[1]
    found = compare(make_profile({"turn": 0.1}), replay, times=0.8)
    assert found["planned"]["error"]["ttft_mean_ms"] == pytest.approx(-0.2)
    assert found["planned"]["error"]["itl_p50_ms"] == pytest.approx(0.25)
    assert found["planned"]["error"]["tokens_per_second"] == pytest.approx(0.285 / 0.3 - 1)
    assert found["planned"]["utilisation"] == pytest.approx(1)
    assert found["at_its_speed"]["error"]["itl_p50_ms"] == pytest.approx(0)
    for times in (0.5, 2.0):
        slow = compare(make_profile({"turn": 0.1}), replay, times)
        for name in ("ttft_mean_ms", "itl_p50_ms"):
            assert slow["at_its_speed"][name] == pytest.approx(times * slow["planned"][name])
    assert found["at_its_speed"]["error"]["ttft_mean_ms"] == pytest.approx(0.08 / 0.125 - 1)


def test_the_plot_has_lines_and_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity_plot, "POINTS", 3)
    monkeypatch.setattr(capacity_plot, "REQUESTS", 40)
    level = {"per_minute": 120.0, "measured": {"ttft_p50_ms": 110.0, "ttft_p95_ms": 190.0}}
    result = {"prompt": "8", "output": "2", "levels": [level, level | {"per_minute": 240.0}]}
    first, again = tmp_path / "first.svg", tmp_path / "again.svg"
    for path in (first, again):
        capacity_plot.draw(result, make_profile({"turn": 0.1}), path)
    text = first.read_text()
    assert all(f"{name}, {kind}" in text for name in ("p50", "p95") for kind in ("planned", "measured"))
    assert "requests a minute" in text
    assert first.read_bytes() == again.read_bytes()
