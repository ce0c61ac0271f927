"""The curves of a run as one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from train.tracker import read_metrics

PLOT_FILE = "curves.png"
SMOOTHING_SHARE = 1 / 80  # of the run, on either side
BLUE, ORANGE, GRAY = "#1f5fa8", "#d95f0e", "#5a5a5a"


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a window around each value, narrower towards the ends: unlike an exponential average, no lag."""
    most, last = int(len(values) * SMOOTHING_SHARE), len(values) - 1
    sums = list(accumulate(values, initial=0.0))
    halves = [min(most, i, last - i) for i in range(len(values))]
    return [(sums[i + half + 1] - sums[i - half]) / (2 * half + 1) for i, half in enumerate(halves)]


def draw(folder: Path) -> Path:
    """`curves.png` from the run's metrics: the losses over tokens (over steps, where tokens are not logged), and below
    the learning rate. Replaces the one that is there as a whole."""
    rows = read_metrics(folder)
    across = "tokens" if any("tokens" in row for row in rows) else "step"
    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    x, y = _series(rows, across, "loss")
    losses.plot(x, y, color=BLUE, alpha=0.22, linewidth=0.8)
    losses.plot(x, smoothed(y), color=BLUE, linewidth=1.8, label="training, smoothed")
    held_x, held_y = _series(rows, across, "held_out_loss")
    if held_y:
        losses.plot(held_x, held_y, color=ORANGE, linewidth=1, marker="o", markersize=4.5, label="held out")
        losses.annotate(
            f"{held_y[-1]:.3f}", (held_x[-1], held_y[-1]), (6, 0), textcoords="offset points", color=ORANGE, va="center"
        )
    _limit(losses, y + held_y)
    losses.set_ylabel("loss")
    losses.set_title(folder.resolve().name, loc="left", fontsize=11)
    if y:
        losses.legend(frameon=False, loc="upper right")
    rates.plot(*_series(rows, across, "learning_rate"), color=GRAY, linewidth=1.4)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.yaxis.set_major_locator(MaxNLocator(3))
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rates.xaxis.set_major_formatter(EngFormatter(sep=""))
    rates.set_xlabel({"tokens": "tokens", "step": "steps"}[across])
    for axes in (losses, rates):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    path = folder / PLOT_FILE
    new = path.with_suffix(".new.png")
    figure.savefig(new, format="png")
    os.replace(new, path)
    return path


def _series(rows: Sequence[dict[str, Any]], across: str, name: str) -> tuple[list[float], list[float]]:
    """(x, y) of the rows that have both; a figure that was not finite is none."""
    points = [(row[across], row[name]) for row in rows if row.get(across) is not None and row.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _limit(axes: Axes, values: list[float]) -> None:
    """Single spikes may leave the picture; all else is in it."""
    if not values:
        return
    ordered = sorted(values)
    low, high = ordered[0], ordered[int(0.995 * (len(ordered) - 1))]
    top = max(value for value in ordered if value <= 2 * high - low)
    room = 0.05 * (top - low) or 1.0
    axes.set_ylim(low - room, top + room)
