"""Pictures of the dashboards from a running Prometheus, for the documentation: our own drawing, not Grafana's."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from html import escape
from pathlib import Path

from monitoring import charts
from monitoring.prometheus_data import DASHBOARDS, Panel, Prometheus, PrometheusError, Series, read_board

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
COLUMN, ROW, HEAD = 48, 26, 46  # pixels of the grid's columns and rows, and of the title
DRAW = {"timeseries": charts.lines, "heatmap": charts.heat, "bargauge": charts.bars, "stat": charts.numbers}
TIMEOUT_SECONDS = 120
STYLE = """
body { margin: 0; font: 12px system-ui, "DejaVu Sans", sans-serif; color: #1c1c1c; background: #f4f5f5 }
h1 { font-size: 18px; margin: 0; padding: 12px 10px } h1 small { color: #6e6e6e; font-weight: 400 }
div { position: absolute; box-sizing: border-box }
.panel { background: #fff; border: 1px solid #e0e0e0; border-radius: 2px; padding: 4px 6px; overflow: hidden }
.row { font-weight: 600; padding: 6px 4px }
h2 { font-size: 12px; font-weight: 600; margin: 0 0 2px } p { color: #6e6e6e; text-align: center; margin-top: 30px }
svg text { font-size: 11px; fill: #555 } svg text.large { font-size: 22px; fill: #37872d }
"""


class PreviewError(Exception):
    """The pictures cannot be drawn; the message says why and the cure."""


def draw_previews(url: str, folder: Path, seconds: float, boards: Path = DASHBOARDS) -> list[Path]:
    """A PNG of each dashboard, of the last `seconds`; returns the files. Raises PreviewError."""
    browser = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if browser is None:
        raise PreviewError(f"none of {', '.join(CHROMIUM)} is installed; install one, as with `apt install chromium`")
    prometheus = Prometheus(url, seconds=seconds)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    try:
        for path in sorted(boards.glob("*.json")):
            title, panels = read_board(path)
            drawn.append(folder / f"{path.stem}.png")
            _shoot(browser, page(title, panels, prometheus), _height(panels), drawn[-1])
    except PrometheusError as error:
        raise PreviewError(str(error)) from error
    return drawn


def page(title: str, panels: list[Panel], prometheus: Prometheus) -> str:
    """A page that needs nothing else. Raises PrometheusError."""
    boxes = "".join(_box(panel, [s for query in panel.queries for s in prometheus.read(*query)]) for panel in panels)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><style>{STYLE}</style>'
        f"<h1>{escape(title)} <small>preview: the dashboard's queries, not Grafana's drawing</small></h1>{boxes}</html>"
    )


def _box(panel: Panel, series: list[Series]) -> str:
    x, y, width, height = panel.place
    place = (
        f'style="left:{x * COLUMN + 3}px;top:{HEAD + y * ROW + 3}px;width:{width * COLUMN - 6}px;'
        f'height:{height * ROW - 6}px"'
    )
    if panel.kind == "row":
        return f'<div class="row" {place}>{escape(panel.title)}</div>'
    if any(one.values for one in series):
        inside = DRAW[panel.kind](series, panel.unit, width * COLUMN - 20, height * ROW - 34)
    else:
        inside = "<p>no data</p>"
    return f'<div class="panel" {place}><h2>{escape(panel.title)}</h2>{inside}</div>'


def _height(panels: list[Panel]) -> int:
    return HEAD + ROW * max(panel.place[1] + panel.place[3] for panel in panels) + 8


def _shoot(browser: str, html: str, height: int, target: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "page.html"
        source.write_text(html, encoding="utf-8")
        command = [browser, "--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={work}/profile"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # it has none for root
        command += [f"--window-size={24 * COLUMN},{height}", f"--screenshot={target.resolve()}", source.as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise PreviewError(f"{browser} did not draw {target.name} within {TIMEOUT_SECONDS} s") from error
    if done.returncode or not target.exists():
        raise PreviewError(f"{browser} could not draw {target.name}: {done.stderr[-500:]}")
