"""The comparison of two windows, for people (a page that needs nothing else) and for Prometheus (a text file)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from monitoring.drift import PSI_LIMIT, RATE_LIMIT, Bar, Drift
from monitoring.textfile import Textfile
from monitoring.window import Window

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 2rem 0 .3rem } p { color: #555 }
table { border-collapse: collapse; width: 100% } th { text-align: left; font-weight: 500; color: #555 }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e4e4e4 } td { font-variant-numeric: tabular-nums }
.drifted { color: #b3261e; font-weight: 600 } .calm { color: #3b6e3b }
svg text { font: 11px system-ui, sans-serif; fill: #555 }
"""
BLUE, ORANGE = "#8fb3d9", "#d95f0e"
WIDTH, HEIGHT, FOOT = 720, 130, 18  # of a chart, in pixels


def as_html(drifts: Sequence[Drift], reference: Window, current: Window) -> str:
    drifted = [drift.figure for drift in drifts if drift.drifted]
    verdict = f"Drifted: {', '.join(drifted)}." if drifted else "No figure has drifted."
    charts = "".join(f"<h2>{name_of(drift.figure)}</h2>{chart(drift.bars)}" for drift in drifts if drift.bars)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Drift</title><style>{STYLE}</style>'
        f"<h1>{escape(verdict)}</h1>"
        f"<p>{len(current):,} answers now, {len(reference):,} in the reference. A figure has drifted if its PSI is "
        f"above {PSI_LIMIT}, or its rate has moved by more than {RATE_LIMIT:.0%}, and chance alone does that to less "
        "than one window in twenty.</p>"
        "<table><tr><th>figure<th>reference<th>now<th>distance<th>by chance<th></tr>"
        + "".join(map(row, drifts))
        + f'</table>{charts}<p><span style="color:{BLUE}">&#9632;</span> reference '
        f'<span style="color:{ORANGE}">&#9632;</span> now</p></html>\n'
    )


def row(drift: Drift) -> str:
    if drift.kind == "psi":
        shown = (f"{drift.reference:,.3g}", f"{drift.current:,.3g}", f"PSI {drift.distance:.3f}")
        chance = f"to {drift.low:.3f}"
    else:
        shown = (f"{drift.reference:.1%}", f"{drift.current:.1%}", f"{drift.distance:+.1%}")
        chance = f"{drift.low:+.1%} to {drift.high:+.1%}"
    verdict = '<td class="drifted">drifted' if drift.drifted else '<td class="calm">calm'
    cells = "".join(f"<td>{cell}" for cell in (name_of(drift.figure), *shown, chance))
    return f"<tr>{cells}{verdict}</tr>"


def name_of(figure: str) -> str:
    return escape(figure.replace("_", " "))


def chart(bars: Sequence[Bar]) -> str:
    """Two bars for each bin, as SVG."""
    most = max(max(bar.reference, bar.current) for bar in bars)
    step = WIDTH / len(bars)
    parts = []
    for number, bar in enumerate(bars):
        for place, (share, colour) in enumerate(((bar.reference, BLUE), (bar.current, ORANGE))):
            height = (HEIGHT - FOOT) * share / most
            x, y = number * step + step * (0.1 + 0.4 * place), HEIGHT - FOOT - height
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{step * 0.4:.1f}" height="{height:.1f}" fill="{colour}">'
                f"<title>{escape(bar.label)}: {share:.1%}</title></rect>"
            )
        middle = (number + 0.5) * step
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(bar.label)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img">{"".join(parts)}</svg>'


def as_metrics(drifts: Sequence[Drift], current: Window) -> bytes:
    """In Prometheus' text format, for node_exporter's textfile collector."""
    file = Textfile()
    gauge = file.gauge
    gauge("pawl_drift_interactions", "Answers in the window that was compared.").set(len(current))
    distance = gauge("pawl_drift_distance", "PSI, or change of a rate, against the reference window.", "figure", "kind")
    value = gauge("pawl_drift_value", "Mean or rate in a window.", "figure", "window")
    drifted = gauge("pawl_drift_drifted", "1 if the figure has moved beyond its limit, and not by chance.", "figure")
    for drift in drifts:
        distance.labels(drift.figure, drift.kind).set(drift.distance)
        value.labels(drift.figure, "reference").set(drift.reference)
        value.labels(drift.figure, "current").set(drift.current)
        drifted.labels(drift.figure).set(drift.drifted)
    return file.encode()
