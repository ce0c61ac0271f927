"""`deploy plan` from end to end, on profiles whose answer is known by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploy.__main__ import EXIT_USAGE, main
from deploy.errors import DeployError
from deploy.objectives import Objective
from deploy.simulation import simulate
from deploy.sizing import Demand, best_size, fleets
from deploy.workload import Lengths, Visit, Workload
from tests.deploy.capacity_profiles import make_profile

Plan = Callable[..., tuple[int, str, str]]
TURN = {"turn": 0.1}  # so a replica with 4 slots can do 40 requests of one token a second


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    """Run the command on a profile: (exit status, stdout, stderr)."""
    make_profile(TURN, max_running=4, prefill_chunk=8).save(tmp_path / "slow.json")
    make_profile({"turn": 0.05}, max_running=4).save(tmp_path / "fast.json")

    def run(*words: str, profile: str = "slow.json") -> tuple[int, str, str]:
        given = [word.replace("TMP", str(tmp_path)) for word in words]
        monkeypatch.setattr(sys, "argv", ["deploy", "plan", str(tmp_path / profile), *given])
        return main(), *capsys.readouterr()

    return run


QUICK = ("--prompt", "8", "--output", "1", "--requests", "150", "--slo", "ttft:p95:400")


def test_the_replicas_of_a_stream_and_their_cost(plan: Plan) -> None:
    code, out, _ = plan(*QUICK, "--rate", "60", "1M", "--cost-per-hour", "0.5", "--json")
    assert code == 0
    document = json.loads(out)
    (size,) = document["sizes"]
    assert 0 < size["holds_per_minute"] <= 0.9 * size["saturated_per_minute"]
    assert size["ttft_p95_ms"] <= 400
    assert size["cost_per_million_requests"] == pytest.approx(0.5 / (60 * size["holds_per_minute"]) * 1e6)
    fleets = {(row["per_minute"], row["balance"]): row for row in document["fleets"]}
    assert len(fleets) == 6
    assert {row["replicas"] for (rate, _), row in fleets.items() if rate == 60} == {1}
    for balance in ("random", "round-robin", "least"):
        row = fleets[1e6, balance]
        assert row["ttft_p95_ms"] <= 400
        assert row["cost_per_hour"] == 0.5 * row["replicas"]
        assert row["replicas"] >= 1e6 / (0.9 * size["saturated_per_minute"])
    assert fleets[1e6, "random"]["replicas"] == pytest.approx(1e6 / size["holds_per_minute"], abs=1)
    assert fleets[1e6, "least"]["replicas"] <= fleets[1e6, "random"]["replicas"]


def test_for_people_and_with_several_sizes(plan: Plan) -> None:
    code, out, _ = plan(*QUICK, "--others", "TMP/fast.json", "--cost-per-hour", "1", "2", "--slots", "1")
    assert code == 0
    assert "TTFT p95 of 400 ms at most" in out
    assert out.count("with 1 slots holds") == 2
    assert out.count("round-robin") == 2


def test_objectives_that_nothing_meets(plan: Plan) -> None:
    code, out, err = plan(*QUICK[:-1], "ttft:p95:99")
    assert code == EXIT_USAGE
    assert "TTFT p95 of 99 ms at most, but it is" in out
    assert "no size meets the objectives at any rate" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rate", "0"], "--rate 0 is out of range"),
        (["--rate", "many"], "'many' is no quantity"),
        (["--prompt", "8-4"], "'8-4' is no length"),
        (["--output", "exp:0"], "'exp:0' is no length"),
        (["--slo", "ttft:p95"], "'ttft:p95' is no objective"),
        (["--slo", "speed:p95:3"], "'speed:p95:3' is no objective"),
        (["--slots", "5"], "--slots 5 is beyond the 4"),
        (["--cost-per-hour", "1", "2"], "2 values for 1 profiles"),
        (["--requests", "2"], "at least 100"),
        (["--others", "TMP/missing.json"], "cannot be read as a profile"),
    ],
)
def test_what_cannot_be_planned_is_told(words: list[str], told: str, plan: Plan) -> None:
    code, out, err = plan(*words)
    assert (code, out) == (EXIT_USAGE, "")
    assert told in err


@pytest.mark.parametrize(
    ("change", "told"),
    [({"format": 9}, "has format 9"), ({"model": {}}, "missing required"), ({"more": 1}, "unknown field")],
)
def test_a_file_that_is_no_profile(change: dict[str, object], told: str, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    code, _, err = plan()
    assert code == EXIT_USAGE
    assert told in err


def test_more_slots_are_taken_only_if_they_hold_more() -> None:
    """Rows cost so much that two together miss the limit between tokens."""
    profile = make_profile({"token, up": 0.04, "token, beyond": 0.0001}, max_running=4)
    workload = Workload(Lengths.parse("4"), Lengths.parse("8"))
    demand = Demand(workload, (Objective.parse("itl:p99:90"),), 100, 0.9)
    one = best_size(profile, demand)
    assert one.slots < 4
    assert one.rate > 0
    assert best_size(profile, demand, slots=4).rate < one.rate


def test_a_fleet_meets_the_objectives_with_the_fewest() -> None:
    profile = make_profile(TURN, max_running=1, max_queue=1000)
    demand = Demand(Workload(Lengths.parse("8"), Lengths.parse("1")), (Objective.parse("ttft:mean:130"),), 1200, 0.9)
    one = best_size(profile, demand)
    assert one.rate == pytest.approx(3.75, rel=0.25)  # M/D/1: load / (2 (1 - load)) = 0.3
    by = {fleet.balance: fleet.replicas for _, fleet in fleets(one, demand, [15.0])}
    assert by["least"] <= by["round-robin"] + 1 <= by["random"] + 1
    assert by["random"] == pytest.approx(4, abs=1.1)


@pytest.mark.parametrize(
    ("text", "mean", "low", "high"),
    [
        ("40", 40, 40, 40),
        ("10-30", 20, 10, 30),
        ("exp:50", 50, 1, 500),
        ("lognormal:50:0.5", 50 * np.exp(0.125), 1, 500),
    ],
)
def test_lengths(text: str, mean: float, low: int, high: int) -> None:
    drawn = Lengths.parse(text).draw(20_000, 500, np.random.default_rng(0))
    assert np.mean(drawn) == pytest.approx(mean, rel=0.03)
    assert low <= min(drawn) <= max(drawn) <= high


def test_the_same_requests_come_at_any_rate() -> None:
    workload = Workload(Lengths.parse("exp:300"), Lengths.parse("exp:300"), seed=1)
    slow, fast = workload.visits(500, 2.0, 1024), workload.visits(500, 4.0, 1024)
    assert [(v.prompt, v.output) for v in slow] == [(v.prompt, v.output) for v in fast]
    assert [v.arrival for v in slow] == pytest.approx([2 * v.arrival for v in fast])
    assert all(v.prompt >= 1 <= v.output and v.prompt + v.output <= 1024 for v in slow)
    assert slow[-1].arrival == pytest.approx(250, rel=0.1)


def test_objectives_of_an_outcome() -> None:
    outcome = simulate(make_profile(TURN), [Visit(0.0, 8, 3), Visit(0.0, 8, 1)])
    assert Objective.parse("e2e:mean:1").measured(outcome) == pytest.approx(200)
    assert Objective.parse("itl:p99.9:1").measured(outcome) == pytest.approx(100)
    with pytest.raises(DeployError, match="METRIC:STATISTIC:MILLISECONDS"):
        Objective.parse("ttft:p100:5")
