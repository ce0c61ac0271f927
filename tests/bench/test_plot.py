"""The plot of a result: what is in it, and that it is the same each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.plot import draw, panels


def row(system: str, part: str, context: int, streams: int, rate: float) -> dict[str, Any]:
    return {
        "system": system,
        "part": part,
        "input_len": context,
        "concurrency": streams,
        "output_throughput": rate,
    }


DOCUMENT = {
    "results": [
        row("pawl", "engine", 130, 8, 90.0),
        row("peer", "engine", 130, 8, 60.0),
        row("peer", "engine", 130, 1, 10.0),
        row("pawl", "engine", 130, 1, 20.0),
        row("pawl", "http", 130, 1, 15.0),
        row("only one stream", "engine", 1000, 1, 5.0),
    ]
}


def test_a_panel_per_context_and_ours_last() -> None:
    found = panels(DOCUMENT)
    assert found == {
        130: {"peer": [(1, 10.0), (8, 60.0)], "pawl": [(1, 20.0), (8, 90.0)]},
        1000: {"only one stream": [(1, 5.0)]},
    }
    assert list(found[130]) == ["peer", "pawl"]


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(DOCUMENT, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert {"peer", "pawl", "only one stream"} <= {part.partition("<")[0] for part in text.split(">")}
    assert len(text) < 40_000


def test_a_result_without_engines_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--parts engine"):
        draw({"results": [row("pawl", "http", 130, 1, 15.0)]}, tmp_path / "c.svg")
