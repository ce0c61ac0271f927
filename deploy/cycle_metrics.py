"""What Prometheus sees of the retrain cycle: when it last ran, how the cycles ended, and what the gate found."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec

from deploy.comparison import Verdict
from monitoring.textfile import Textfile

if TYPE_CHECKING:
    from deploy.retrain import Turn

VERDICTS = ("published", "rejected", "abandoned")


def as_metrics(turns: Sequence[Turn], verdict_file: str) -> bytes:
    """In Prometheus' text format, as the command ends; `turns` are all cycles, the latest last."""
    file = Textfile()
    file.gauge("pawl_retrain_run_seconds", "When the command last ended without an error, in Unix time.").set(
        time.time()
    )
    ended = [(turn, outcome) for turn in turns if (outcome := turn.outcome) is not None]
    counts: Counter[str] = Counter(outcome.verdict for _, outcome in ended)
    cycles = file.gauge("pawl_retrain_cycles", "Cycles that ended so.", "verdict")
    last = file.gauge("pawl_retrain_last_verdict", "1 for the verdict of the last cycle, 0 for others.", "verdict")
    for verdict in VERDICTS:
        cycles.labels(verdict).set(counts[verdict])
        last.labels(verdict).set(bool(ended) and ended[-1][1].verdict == verdict)
    if not ended:
        return file.encode()
    turn, outcome = ended[-1]
    file.gauge("pawl_retrain_last_end_seconds", "When the last cycle ended, in Unix time.").set(
        unix_time(outcome.finished)
    )
    stages = file.gauge(
        "pawl_retrain_stage_seconds", "In the last cycle, from the end of the stage before to a stage's own.", "stage"
    )
    for before, marker in pairwise(turn.markers):
        stages.labels(marker.stage).set(unix_time(marker.finished) - unix_time(before.finished))
    gate = turn.stage("gate")
    if gate is not None:
        found = msgspec.json.decode((gate / verdict_file).read_bytes(), type=Verdict)
        value = file.gauge("pawl_retrain_gate_value", "What the last gate found, with its interval.", "figure", "bound")
        passed = file.gauge("pawl_retrain_gate_passed", "1 if the figure kept its limit.", "figure")
        for name, figure in found.figures.items():
            value.labels(name, "value").set(figure.value)
            value.labels(name, "low").set(figure.low)
            value.labels(name, "high").set(figure.high)
            passed.labels(name).set(figure.passed)
    return file.encode()


def unix_time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
