"""Small charts as SVG, for pages that must stand alone: no script, no font, nothing to load.

Colours are the page's: an element has a class (`c0`, `c1`, ... for series), and follows light and dark with the text.
Every mark can carry a title, which browsers show when the pointer rests on it. matplotlib, which draws the figures of
`bench/`, does neither, and takes a second for a page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

MARGIN = {"left": 52.0, "right": 12.0, "top": 12.0, "bottom": 40.0}
TICKS = 5  # about so many on an axis

Point = tuple[float, float]
Write = Callable[[float], str]


def number(value: float) -> str:
    return f"{value:g}"


def percent(value: float) -> str:
    return f"{100 * value:g} %"


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`, both within the plot; `is_log` axes need positive ones."""

    low: float
    high: float
    label: str
    is_log: bool = False
    write: Write = number

    def share(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`."""
        low, high, at = (math.log(x) if self.is_log else x for x in (self.low, self.high, value))
        return (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values, on a short logarithmic axis too."""
        if self.is_log and self.high / self.low > 8:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1,) if self.high / self.low > 500 else (1, 2, 5)
            found = [step * 10.0**decade for decade in decades for step in steps]
            return [tick for tick in found if self.low <= tick <= self.high]
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next((nice for nice in (1, 2, 5) if nice * power >= rough), 10)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def axis_for(values: Sequence[float], label: str, *, is_log: bool = False, write: Write = number) -> Axis:
    """With some room around the values."""
    low, high = min(values), max(values)
    if is_log:
        room = (high / low) ** 0.06 if high > low else 2.0
        return Axis(low / room, high * room, label, is_log=True, write=write)
    room = 0.06 * (high - low) or abs(high) or 1.0
    return Axis(low - room, high + room, label, write=write)


@dataclass(slots=True)
class Plot:
    """Marks between two axes; drawn in the order in which they are added."""

    x: Axis
    y: Axis
    width: float = 460.0
    height: float = 260.0
    _marks: list[str] = field(default_factory=list)

    def points(self, points: Sequence[Point], style: str, titles: Sequence[str] = ()) -> None:
        for i, (x, y) in enumerate(points):
            title = f"<title>{escape(titles[i])}</title>" if titles else ""
            self._marks.append(f'<circle class="{style}" cx="{self._x(x)}" cy="{self._y(y)}" r="3.5">{title}</circle>')

    def line(self, points: Sequence[Point], style: str, title: str = "") -> None:
        path = " ".join(f"{self._x(x)},{self._y(y)}" for x, y in points)
        self._marks.append(f'<polyline class="{style}" points="{path}"><title>{escape(title)}</title></polyline>')

    def box(self, low: Point, high: Point, style: str, title: str = "") -> None:
        x, y = float(self._x(low[0])), float(self._y(high[1]))
        width, height = float(self._x(high[0])) - x, float(self._y(low[1])) - y
        self._marks.append(
            f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:.1f}">'
            f"<title>{escape(title)}</title></rect>"
        )

    def draw(self, label: str) -> str:
        """The whole; `label` says what it shows to those who cannot see it."""
        return _svg(self.width, self.height, label, [*self._frame(), *self._marks])

    def _frame(self) -> list[str]:
        left, right = MARGIN["left"], self.width - MARGIN["right"]
        top, bottom = MARGIN["top"], self.height - MARGIN["bottom"]
        parts = []
        for tick in self.y.ticks():
            y = self._y(tick)
            parts.append(f'<line class="rule" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
            parts.append(text(left - 7, float(y) + 4, self.y.write(tick), "end"))
        parts += [text(float(self._x(tick)), bottom + 16, self.x.write(tick), "middle") for tick in self.x.ticks()]
        parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(text((left + right) / 2, self.height - 6, self.x.label, "middle"))
        middle = (top + bottom) / 2
        turned = f' transform="rotate(-90 12 {middle:g})"'
        parts.append(text(12, middle, self.y.label, "middle", turned))
        return parts

    def _x(self, value: float) -> str:
        width = self.width - MARGIN["left"] - MARGIN["right"]
        return f"{MARGIN['left'] + self.x.share(value) * width:.1f}"

    def _y(self, value: float) -> str:
        height = self.height - MARGIN["top"] - MARGIN["bottom"]
        return f"{self.height - MARGIN['bottom'] - self.y.share(value) * height:.1f}"


@dataclass(frozen=True, slots=True)
class Cell:
    """A square of a grid: a style, or a strength from 0 to 1, and what it tells."""

    title: str
    style: str = "heat"
    strength: float = 1.0


def grid(rows: Sequence[tuple[str, Sequence[Cell]]], label: str, caption: str, width: float = 940.0) -> str:
    """A row of cells for each name; the columns are numbered from 0."""
    left, gap, high = 74.0, 2.0, 22.0
    columns = max(len(cells) for _, cells in rows)
    step = min(40.0, (width - left) / columns)
    parts = []
    for number_of_row, (name, cells) in enumerate(rows):
        y = number_of_row * high
        parts.append(text(left - 8, y + high / 2 + 4, name, "end"))
        for column, cell in enumerate(cells):
            place = f'x="{left + column * step:.1f}" y="{y:g}" width="{step - gap:.1f}" height="{high - gap:g}" rx="2"'
            style = f'class="{cell.style}" fill-opacity="{cell.strength:.2f}"'
            parts.append(f"<rect {style} {place}><title>{escape(cell.title)}</title></rect>")
    bottom = len(rows) * high
    every = max(1, round(columns / 16))
    parts += [text(left + (i + 0.5) * step, bottom + 14, str(i), "middle") for i in range(0, columns, every)]
    parts.append(text(left + columns * step / 2, bottom + 32, caption, "middle"))
    return _svg(left + columns * step, bottom + 38, label, parts)


def bars(rows: Sequence[tuple[str, float, str]], label: str, width: float = 460.0) -> str:
    """A bar for each (name, value, how the value is written)."""
    left, right, high = 84.0, 168.0, 26.0
    most = max(value for _, value, _ in rows) or 1.0
    parts = []
    for i, (name, value, written) in enumerate(rows):
        y, long = i * high, value / most * (width - left - right)
        parts.append(text(left - 8, y + 16, name, "end"))
        parts.append(f'<rect class="c0" x="{left:g}" y="{y + 3:g}" width="{long:.1f}" height="{high - 8:g}" rx="2"/>')
        parts.append(text(left + long + 7, y + 16, written, "start"))
    return _svg(width, len(rows) * high, label, parts)


def text(x: float, y: float, content: str, anchor: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attributes}>{escape(content)}</text>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    size = f'viewBox="0 0 {width:g} {height:g}" style="max-width: {1.25 * width:g}px"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">\n{inside}\n</svg>'
