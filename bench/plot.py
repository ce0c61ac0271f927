"""`python -m bench.plot RESULT.json -o PLOT.svg`: decode tokens per second by batch, a panel per context.

The same result gives the same bytes. Text is grey and the ground is clear, so that it can be read on light and on dark.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

GREY = "#767676"  # contrast of more than 4 with white and with near-black
OURS, OTHERS = "#e4572e", ("#3a86c8", "#2a9d8f", "#a06cd5", "#b8860b", "#d1495b", "#6b8e23")
PANEL_INCHES = (3.6, 3.2)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text as text: small, and of the reader's own font
    "svg.hashsalt": "pawl",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Series = dict[str, list[tuple[int, float]]]


def panels(document: dict[str, Any]) -> dict[int, Series]:
    """Per context, per system: (streams, tokens/s) of the engine rows, in the order of streams; ours last."""
    found: dict[int, Series] = {}
    rows = [row for row in document["results"] if row["part"] == "engine"]
    for row in sorted(rows, key=lambda row: (row["input_len"], row["system"] == "pawl", row["concurrency"])):
        series = found.setdefault(row["input_len"], {})
        series.setdefault(row["system"], []).append((row["concurrency"], row["output_throughput"]))
    return found


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the SVG. Raises ValueError for a result without engine rows."""
    found = panels(document)
    if not found:
        raise ValueError("the result has no engine rows; measure with `--parts engine`")
    systems = list(dict.fromkeys(system for series in found.values() for system in series))
    others = [system for system in systems if system != "pawl"]
    colours = {system: OTHERS[i % len(OTHERS)] for i, system in enumerate(others)} | {"pawl": OURS}
    with matplotlib.rc_context(STYLE):
        width, height = PANEL_INCHES
        figure = Figure(figsize=(width * len(found), height), layout="constrained")
        axes = figure.subplots(1, len(found), squeeze=False)[0]
        for axis, (context, series) in zip(axes, found.items(), strict=True):
            panel(axis, context, series, colours)
        axes[0].set_ylabel("decode, tokens/s in all")
        lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
        figure.legend(
            [lines[system] for system in systems], systems, loc="outside lower center", ncols=3, frameon=False
        )
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def panel(axis: Axes, context: int, series: Series, colours: dict[str, str]) -> None:
    for system, points in series.items():
        streams, rates = zip(*points, strict=True)
        width = 2.4 if system == "pawl" else 1.3
        axis.plot(streams, rates, marker="o", markersize=3.5, linewidth=width, color=colours[system], label=system)
    ticks = sorted({streams for points in series.values() for streams, _ in points})
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylim(0, 1.05 * max(rate for points in series.values() for _, rate in points))
    if len(ticks) == 1:
        axis.set_xlim(ticks[0] / math.sqrt(2), ticks[0] * math.sqrt(2))
    axis.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    axis.set_xlabel("streams")
    axis.set_title(f"prompts of {context:,} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description="Draw a result's engine rows.")
    parser.add_argument("result", type=Path, help="what `python -m bench --out` wrote")
    parser.add_argument("-o", "--out", type=Path, required=True, help="SVG file to write")
    args = parser.parse_args()
    draw(json.loads(args.result.read_text()), args.out)


if __name__ == "__main__":
    main()
