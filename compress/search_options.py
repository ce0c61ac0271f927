"""Settings of a search, and its one failure, apart from the libraries that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.candidates import OBJECTIVES, Objective
from compress.quantize import Options
from train.flags import option

SHARED = Options()


class BudgetUnmet(Exception):
    """No recipe is within the budget; none was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Settings of `python -m compress search`."""

    budget: str = option("ppl<=+1%", "limits, as of the gate")
    objective: Objective = option("latency", "what to improve", choices=OBJECTIVES)
    builds: int = option(4, "searched recipes to build and judge, at most", least=1)
    measurements: Path | None = option(None, "file that keeps them (default: measurements.json beside it)", parse=Path)
    text: Path | None = option(SHARED.text, "text to calibrate on and choose by (default: Python's docs)", parse=Path)
    window: int = option(SHARED.window, "tokens of context", least=2)
    calibration_windows: int = option(SHARED.calibration_windows, "windows of text to calibrate on", least=1)
    validation_windows: int = option(SHARED.held_out_windows, "windows of text to choose by", least=2)
