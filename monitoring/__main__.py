"""`python -m monitoring COMMAND`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from monitoring import textfile
from monitoring.drift import compare
from monitoring.drift_report import as_html, as_metrics
from monitoring.preview import PreviewError, draw_previews
from monitoring.prometheus_data import DASHBOARDS
from monitoring.window import WindowError, read_window

EXIT_DRIFTED, EXIT_USAGE = 1, 2
PREVIEWS = Path("docs/previews")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m monitoring", description="What is seen of a running model.")
    commands = top.add_subparsers(dest="command", required=True)
    text = "compare a window of traffic with a reference"
    drift = commands.add_parser("drift", help=text, description=f"{text}; the exit status is 1 if it has drifted")
    drift.add_argument("reference", type=Path, help="snapshot made by `python -m deploy snapshot --unjudged`")
    drift.add_argument("current", type=Path, help="another one, or the same with other dates")
    for window in ("reference", "current"):
        drift.add_argument(f"--{window}-since", default="", help="first moment of the window, as 2026-11-21T12:00 UTC")
        drift.add_argument(f"--{window}-until", default="", help="first moment after it")
    drift.add_argument("--html", type=Path, help="page to write")
    drift.add_argument("--textfile", type=Path, help="gauges to write, for node_exporter's textfile collector")
    text = "write Grafana's dashboards as JSON"
    dashboards = commands.add_parser("dashboards", help=text, description=f"{text}; needs requirements/dev.txt")
    dashboards.add_argument("-o", "--output", type=Path, default=DASHBOARDS, help="folder to write them into")
    text = "draw the dashboards with the data of a running Prometheus, without Grafana"
    preview = commands.add_parser("preview", help=text, description=f"{text}; needs Chromium")
    preview.add_argument("prometheus", help="URL, as http://127.0.0.1:9090")
    preview.add_argument("-o", "--output", type=Path, default=PREVIEWS, help="folder to write the pictures into")
    preview.add_argument("--minutes", type=float, default=15.0, help="how much of the latest time to show")
    return top


def run_drift(args: argparse.Namespace) -> int:
    reference = read_window(args.reference, args.reference_since, args.reference_until)
    current = read_window(args.current, args.current_since, args.current_until)
    for name, window in (("reference", reference), ("current", current)):
        if not len(window):
            raise WindowError(f"the {name} window holds no interaction; give other dates, or snapshot with --unjudged")
    drifts = compare(reference, current)
    for drift in drifts:
        shown = f"PSI {drift.distance:.3f}" if drift.kind == "psi" else f"{drift.distance:+.1%}"
        print(
            f"{drift.figure:20}{drift.reference:12.4g}{drift.current:12.4g}  {shown:>12}{'  drifted' * drift.drifted}"
        )
    if args.html:
        args.html.write_text(as_html(drifts, reference, current), encoding="utf-8")
    if args.textfile:
        textfile.write(args.textfile, as_metrics(drifts, current))
    return EXIT_DRIFTED if any(drift.drifted for drift in drifts) else 0


def run_dashboards(args: argparse.Namespace) -> int:
    from monitoring.boards import write_boards  # the SDK is for developers alone

    for path in write_boards(args.output):
        print(path)
    return 0


def run_preview(args: argparse.Namespace) -> int:
    for path in draw_previews(args.prometheus, args.output, 60 * args.minutes):
        print(path)
    return 0


def main() -> int:
    args = parser().parse_args()
    try:
        return {"drift": run_drift, "dashboards": run_dashboards, "preview": run_preview}[args.command](args)
    except (WindowError, PreviewError, OSError) as error:
        print(f"monitoring: {error}", file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
