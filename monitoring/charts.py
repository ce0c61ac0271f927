"""Charts as SVG: enough of Grafana's panels to see what they would show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from monitoring.prometheus_data import Series

COLOURS = ("#3274d9", "#e0752d", "#37872d", "#a352cc", "#c4162a", "#8a6d00", "#008a8a", "#6e6e6e")
SCALES = {
    "s": ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")),
    "Bps": ((2**20, "MiB/s"), (2**10, "KiB/s"), (1, "B/s")),
    "percentunit": ((0.01, "%"),),
    "cps": ((1e3, "k/s"), (1, "/s")),
    "short": ((1e6, "M"), (1e3, "k"), (1, "")),
}
LEFT, FOOT = 62, 16  # for the axes, in pixels


def shown(value: float, unit: str) -> str:
    """A value as people read it."""
    scales = SCALES.get(unit, SCALES["short"])
    size, name = next(((s, n) for s, n in scales if abs(value) >= s), scales[-1])
    return f"{value / size:.3g} {name}".strip() if value else "0"


def lines(series: Sequence[Series], unit: str, width: int, height: int) -> str:
    """Over time, from 0."""
    found = [one for one in series if one.values]
    top = max((value for one in found for value in one.values if math.isfinite(value)), default=0.0) or 1.0
    low = min(0.0, *(value for one in found for value in one.values if math.isfinite(value)), 0.0)
    times = [at for one in found for at, _ in one.points]
    begin, span = min(times), max(times) - min(times) or 1.0
    foot = height - FOOT - 14 * min(len(found), 4)

    def place(at: float, value: float) -> str:
        x = LEFT + (width - LEFT - 8) * (at - begin) / span
        return f"{x:.1f},{6 + (foot - 12) * (1 - (value - low) / (top - low)):.1f}"

    parts = []
    for share in (0.0, 0.5, 1.0):
        level = low + share * (top - low)
        y = 6 + (foot - 12) * (1 - share)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{width - 8}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown(level, unit)}</text>')
    for number, one in enumerate(found):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(place(at, value) for at, value in one.points if math.isfinite(value))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if number < 4:
            text = f"{escape(one.name)}: {shown(one.values[-1], unit)}"
            y = foot + 14 * (number + 1)
            parts.append(f'<rect x="{LEFT}" y="{y - 8}" width="10" height="4" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + 16}" y="{y}">{text}</text>')
    return _svg(parts, width, height)


def heat(series: Sequence[Series], unit: str, width: int, height: int) -> str:
    """Buckets over time; a histogram's are cumulative, so each less the one below."""
    rows = sorted((one for one in series if "le" in one.labels), key=lambda one: float(one.labels["le"]))
    below: dict[float, float] = {}
    cells: list[tuple[int, float, float]] = []
    for number, one in enumerate(rows):
        here = {at: value for at, value in one.points if value == value}
        cells += [(number, at, max(0.0, value - below.get(at, 0.0))) for at, value in here.items()]
        below = here
    used = [number for number, _, count in cells if count > 0] or [0]
    first, last = min(used), max(used)
    times = sorted({at for _, at, _ in cells})
    step = (width - LEFT - 8) / (len(times) or 1)
    tall = (height - FOOT) / (last - first + 1)
    most = max((count for _, _, count in cells), default=0.0) or 1.0
    at_column = {at: column for column, at in enumerate(times)}
    parts = [
        f'<rect x="{LEFT + step * at_column[at]:.1f}" y="{height - FOOT - tall * (number - first + 1):.1f}" '
        f'width="{step + 0.5:.1f}" height="{tall:.1f}" fill="#e0752d" fill-opacity="{math.sqrt(count / most):.2f}"/>'
        for number, at, count in cells
        if count > 0
    ]
    for number in {first, last}:
        y = height - FOOT - tall * (number - first)
        edge = float(rows[number].labels["le"]) if rows else 0.0
        text = "∞" if math.isinf(edge) else shown(edge, unit)
        parts.append(f'<text x="{LEFT - 6}" y="{y - tall / 2 + 4:.1f}" text-anchor="end">≤ {text}</text>')
    return _svg(parts, width, height)


def bars(series: Sequence[Series], unit: str, width: int, height: int) -> str:
    """The last value of each, from 0."""
    last = [(one.name, one.values[-1]) for one in series if one.values]
    most = max((abs(value) for _, value in last), default=0.0) or 1.0
    tall = min(22.0, (height - 4) / (len(last) or 1))
    names = width * 0.52
    parts = []
    for number, (name, value) in enumerate(last):
        y = tall * number
        long = (width - names - 66) * abs(value) / most
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<text x="{names - 6:.0f}" y="{y + tall * 0.7:.1f}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect x="{names:.0f}" y="{y + 2:.1f}" width="{long:.1f}" height="{tall - 4:.1f}" fill="{colour}"/>'
        )
        parts.append(f'<text x="{names + long + 5:.1f}" y="{y + tall * 0.7:.1f}">{shown(value, unit)}</text>')
    return _svg(parts, width, height)


def numbers(series: Sequence[Series], unit: str, width: int, height: int) -> str:
    """The last value of each, large."""
    last = [(one.name, one.values[-1]) for one in series if one.values]
    step = width / (len(last) or 1)
    parts = []
    for number, (name, value) in enumerate(last):
        middle = step * (number + 0.5)
        text = shown(value, "s") + " ago" if unit == "dateTimeFromNow" else shown(value, unit)
        parts.append(f'<text class="large" x="{middle:.0f}" y="{height / 2:.0f}" text-anchor="middle">{text}</text>')
        parts.append(f'<text x="{middle:.0f}" y="{height - 10}" text-anchor="middle">{escape(name)}</text>')
    return _svg(parts, width, height)


def _svg(parts: Sequence[str], width: int, height: int) -> str:
    return f'<svg width="{width}" height="{height}" role="img">{"".join(parts)}</svg>'
