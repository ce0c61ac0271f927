"""`python -m bench.capacity_plot RESULT.json PROFILE.json -o PLOT.svg`: time to the first token by requests a minute.

Lines are what the plan says of one replica, dots what `bench.capacity` measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("svg")

from matplotlib.figure import Figure

from bench.plot import GREY, OTHERS, OURS, PANEL_INCHES, STYLE
from deploy.capacity_profile import Profile, load
from deploy.simulation import simulate
from deploy.workload import Lengths, Workload

STATISTICS = {"p50": OURS, "p95": OTHERS[0]}
POINTS = 10
REQUESTS = 600  # a point
REACH = 1.05  # times the highest rate that was measured


def curve(profile: Profile, workload: Workload, rates: list[float]) -> dict[str, list[float]]:
    """Milliseconds to the first token at each rate, requests a minute, by statistic."""
    found: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for rate in rates:
        visits = workload.visits(REQUESTS, rate / 60, profile.engine.capacity)
        outcome = simulate(profile, visits, skipped=REQUESTS // 10)
        for name, values in found.items():
            values.append(1000 * outcome.figure("ttft", name))
    return found


def draw(result: dict[str, Any], profile: Profile, path: Path) -> None:
    workload = Workload(Lengths.parse(result["prompt"]), Lengths.parse(result["output"]))
    levels = result["levels"]
    rates = np.linspace(0.1, 1, POINTS) * REACH * max(one["per_minute"] for one in levels)
    with mpl.rc_context(STYLE):
        width, height = PANEL_INCHES
        figure = Figure(figsize=(1.4 * width, height), layout="constrained")
        axis = figure.subplots()
        for name, values in curve(profile, workload, rates.tolist()).items():
            axis.plot(rates, values, color=STATISTICS[name], linewidth=1.6, label=f"{name}, planned")
            measured = [one["measured"][f"ttft_{name}_ms"] for one in levels]
            places = [one["per_minute"] for one in levels]
            axis.plot(places, measured, "o", color=STATISTICS[name], markersize=5, label=f"{name}, measured")
        axis.set_xlabel("requests a minute")
        axis.set_ylabel("time to first token, ms")
        axis.set_xlim(0)
        axis.set_ylim(0)
        axis.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        axis.legend(frameon=False)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.capacity_plot", description=__doc__)
    parser.add_argument("result", type=Path, help="what bench.capacity wrote with --out")
    parser.add_argument("profile", type=Path, help="and with --profile-out")
    parser.add_argument("-o", "--out", type=Path, required=True, help="SVG file to write")
    args = parser.parse_args()
    draw(json.loads(args.result.read_text()), load(args.profile), args.out)


if __name__ == "__main__":
    main()
