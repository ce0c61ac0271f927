"""`python -m monitoring COMMAND`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from monitoring.drift import compare
from monitoring.drift_report import as_html, as_metrics
from monitoring.window import WindowError, read_window

EXIT_DRIFTED, EXIT_USAGE = 1, 2


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
        temporary = args.textfile.with_name(f".{args.textfile.name}.new")  # the collector must not see half of it
        temporary.write_bytes(as_metrics(drifts, current))
        temporary.replace(args.textfile)
    return EXIT_DRIFTED if any(drift.drifted for drift in drifts) else 0


def main() -> int:
    args = parser().parse_args()
    try:
        return run_drift(args)
    except (WindowError, OSError) as error:
        print(f"monitoring: {error}", file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
