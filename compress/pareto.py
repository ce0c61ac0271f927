"""What a search found, as a table and as a picture: size, perplexity, and tokens/s at 1 and at 16 streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compress.candidates import OBJECTIVES, STREAMS, Objective
from train.plot import BLUE, GRAY, ORANGE

TITLES = {
    "size": "size, MB",
    "latency": "tokens/s, 1 stream",
    "throughput": f"tokens/s, {STREAMS['throughput']} streams",
}
MARKS = {"hand-made": ("s", GRAY), "tried": ("o", BLUE), "chosen": ("*", ORANGE)}


Kind = Literal["predicted", "hand-made", "tried", "chosen"]


@dataclass(frozen=True, slots=True)
class Point:
    """A recipe: costs in bytes and seconds of a step, and its perplexity."""

    name: str
    kind: Kind
    costs: Mapping[Objective, float]
    perplexity: float

    def shown(self, objective: Objective) -> float:
        """MB, or tokens/s."""
        if objective == "size":
            return self.costs["size"] / 1e6
        return STREAMS[objective] / self.costs[objective]


@dataclass(frozen=True, slots=True)
class Row:
    """A recipe that was built, beside what was predicted of it."""

    point: Point
    predicted: Point
    kl: float
    predicted_kl: float
    fits: bool


def table(rows: Sequence[Row]) -> str:
    """For people; of each pair the first is predicted, the second measured."""
    lines = [
        f"{'recipe':<16} {'size MB':>8} {'perplexity':>17} {'KL':>17} {'tokens/s at 1':>15} {'at 16':>15}  in budget",
        *(
            f"{row.point.name:<16} {row.point.shown('size'):8.1f} "
            f"{row.predicted.perplexity:8.3f} {row.point.perplexity:8.3f} {row.predicted_kl:8.5f} {row.kl:8.5f} "
            f"{row.predicted.shown('latency'):7.0f} {row.point.shown('latency'):7.0f} "
            f"{row.predicted.shown('throughput'):7.0f} {row.point.shown('throughput'):7.0f}  "
            f"{'yes' if row.fits else 'no'}{', chosen' if row.point.kind == 'chosen' else ''}"
            for row in sorted(rows, key=lambda row: row.point.costs["size"])
        ),
    ]
    return "\n".join(lines)


def draw(path: Path, title: str, fronts: Mapping[Objective, Sequence[Point]], built: Sequence[Point]) -> None:
    """A panel for each objective: the predicted front, and the recipes that were built."""
    figure = Figure(figsize=(13, 4.5), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for axes, objective in zip(figure.subplots(1, 3, sharey=True), OBJECTIVES, strict=True):
        line = sorted((point.shown(objective), point.perplexity) for point in fronts[objective])
        axes.plot(*zip(*line, strict=True), color=BLUE, alpha=0.5, linewidth=1.4, label="front, predicted")
        for kind, (marker, color) in MARKS.items():
            points = [point for point in built if point.kind == kind]
            places = [(point.shown(objective), point.perplexity) for point in points]
            axes.scatter(
                *(zip(*places, strict=True) if places else ([], [])),
                marker=marker,
                color=color,
                s=120 if kind == "chosen" else 30,
                zorder=3,
                label=f"{kind}, measured",
            )
            for point, place in zip(points, places, strict=True):
                if kind != "tried":
                    axes.annotate(point.name, place, (5, 5), textcoords="offset points", color=color, fontsize=8)
        axes.set_xlabel(TITLES[objective])
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if objective == OBJECTIVES[0]:
            axes.set_ylabel("perplexity, validation text")
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
