"""What Prometheus is told of the cycles, from folders as they leave them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.comparison import Figure, Verdict
from deploy.cycle import VERDICT
from deploy.cycle_metrics import as_metrics
from deploy.retrain import Turn, find_turns
from deploy.stages import Marker, write


def told(work: Path) -> dict[tuple[str, ...], float]:
    """By name and the values of the labels, in the order of their names."""
    families = text_string_to_metric_families(as_metrics(find_turns(work), VERDICT).decode())
    return {
        (s.name, *(s.labels[name] for name in sorted(s.labels))): s.value for family in families for s in family.samples
    }


def end_cycle(work: Path, number: int, *, passed: bool) -> None:
    turn = Turn(work / f"{number:04}")
    for at, stage in enumerate(("begin", "snapshot", "gate"), 1):
        finished = f"2026-01-01T00:0{at * at}:00.000Z"
        write(
            turn.folder / "stages" / f"{at:02}-{stage}.json",
            Marker(stage=stage, inputs={}, outputs={}, finished=finished),
        )
    figure = Figure(value=0.5, low=0.25, high=0.75, limit="at least 0.5", passed=passed)
    verdict = Verdict(
        passed=passed, figures={"feedback_gain": figure}, counts={}, regressions=[], candidate={}, current={}
    )
    write(turn.folder / "03-gate" / VERDICT, verdict)
    turn.end("published" if passed else "rejected", "a test")


def test_before_the_first_cycle(tmp_path: Path) -> None:
    found = told(tmp_path)
    assert found["pawl_retrain_run_seconds",] == pytest.approx(time.time(), abs=60)
    assert found["pawl_retrain_cycles", "rejected"] == found["pawl_retrain_last_verdict", "rejected"] == 0
    assert ("pawl_retrain_last_end_seconds",) not in found


def test_the_last_cycle_that_ended_counts(tmp_path: Path) -> None:
    end_cycle(tmp_path, 1, passed=True)
    end_cycle(tmp_path, 2, passed=False)
    (tmp_path / "0003").mkdir()  # begun
    found = told(tmp_path)
    assert [found["pawl_retrain_cycles", name] for name in ("published", "rejected", "abandoned")] == [1, 1, 0]
    assert [found["pawl_retrain_last_verdict", name] for name in ("published", "rejected")] == [0, 1]
    assert found["pawl_retrain_last_end_seconds",] == pytest.approx(time.time(), abs=60)
    assert found["pawl_retrain_stage_seconds", "snapshot"] == 180
    assert found["pawl_retrain_stage_seconds", "gate"] == 300
    assert [found["pawl_retrain_gate_value", b, "feedback_gain"] for b in ("low", "value", "high")] == [0.25, 0.5, 0.75]
    assert found["pawl_retrain_gate_passed", "feedback_gain"] == 0
