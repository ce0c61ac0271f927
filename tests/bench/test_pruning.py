"""The curve of distilling: read from a run's metrics, and drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench.pruning import draw, learning_curve


def test_curve(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 2.0, "seconds": 10.0},
        {"step": 2, "loss": 1.5, "seconds": 11.0},
        {"step": 2, "held_out_loss": 1.2, "held_out_kl": 1.2, "held_out_cross_entropy": math.log(40)},
        {"step": 3, "loss": 1.0, "seconds": 9.0},
        {"step": 3, "held_out_loss": 0.7, "held_out_kl": 0.7, "held_out_cross_entropy": math.log(20)},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = learning_curve(tmp_path)
    assert [(row["step"], row["seconds"], row["kl"]) for row in curve] == [(2, 21.0, 1.2), (3, 30.0, 0.7)]
    assert [row["perplexity"] for row in curve] == pytest.approx([40, 20])
    draw(curve, tmp_path / "curve.svg")
    assert "minutes of distilling" in (tmp_path / "curve.svg").read_text()
