"""The dashboards as Grafana reads them: classic JSON in `monitoring/dashboards`, written from code and committed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from monitoring.engine_board import engine_board
from monitoring.host_board import host_board
from monitoring.loop_board import loop_board
from monitoring.panels import TITLES
from monitoring.quality_board import quality_board
from monitoring.service_board import service_board

FOLDER = Path(__file__).parent / "dashboards"
BOARDS = {
    "service": service_board,
    "engine": engine_board,
    "quality": quality_board,
    "loop": loop_board,
    "host": host_board,
}


def encoded() -> Iterator[tuple[str, str]]:
    """The name and the JSON of each dashboard."""
    for name, make in BOARDS.items():
        made = make().build()
        for number, panel in enumerate(made.panels or [], 1):
            panel.id_val = number  # so that links to a panel stay
        plain = json.loads(JSONEncoder().encode(made))
        for annotation in plain["annotations"]["list"]:
            annotation["titleFormat"] = TITLES[annotation["name"]]
        yield name, json.dumps(plain, indent=1, sort_keys=True) + "\n"


def write_boards(folder: Path) -> list[Path]:
    """Write them all; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in encoded():
        written.append(folder / f"{name}.json")
        written[-1].write_text(text, encoding="utf-8")
    return written
