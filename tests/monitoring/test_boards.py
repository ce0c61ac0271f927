"""The dashboards are what the code says, and ask for nothing that is not exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from monitoring.boards import encoded
from monitoring.prometheus_data import DASHBOARDS, read_board
from tests.monitoring.exported import TARGET, exported, labels, names

BOARDS = dict(encoded())
PLAIN: dict[str, Any] = {name: json.loads(text) for name, text in BOARDS.items()}


def queries(board: dict[str, Any]) -> list[str]:
    """Of panels and annotations."""
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return asked + [annotation["expr"] for annotation in board["annotations"]["list"]]


def test_the_files_are_what_the_code_writes() -> None:
    """`python -m monitoring dashboards` sets them right."""
    assert {path.stem: path.read_text() for path in DASHBOARDS.iterdir()} == BOARDS


@pytest.mark.parametrize("name", BOARDS)
def test_queries_ask_for_metrics_and_labels_that_are_exported(name: str, tmp_path: Path) -> None:
    known = exported(tmp_path)
    for query in queries(PLAIN[name]):
        asked = names(query)
        assert asked, query
        if any(metric.startswith("node_") for metric in asked):
            assert all(metric.startswith("node_") for metric in asked)
            continue
        assert asked <= known.keys(), query
        allowed = TARGET.union(*(known[metric] for metric in asked))
        assert set(labels(query)) <= allowed, query


@pytest.mark.parametrize("name", BOARDS)
def test_quantiles_are_of_summed_buckets_and_averages_of_nothing(name: str) -> None:
    for query in queries(PLAIN[name]):
        assert query.count("histogram_quantile(") == query.count(", sum by (le") - query.count("(le, le")
        assert "avg(" not in query
        if "avg by" in query:
            assert "node_cpu_seconds_total" in query, "of processors, which weigh the same"


def test_each_dashboard_is_whole() -> None:
    assert len({board["uid"] for board in PLAIN.values()}) == len(PLAIN)
    for name, board in PLAIN.items():
        titles = [panel["title"] for panel in board["panels"]]
        assert len(set(titles)) == len(titles), name
        taken: set[tuple[int, int]] = set()
        for panel in read_board(DASHBOARDS / f"{name}.json")[1]:
            x, y, width, height = panel.place
            cells = {(column, row) for column in range(x, x + width) for row in range(y, y + height)}
            assert x + width <= 24, panel.title
            assert not cells & taken, panel.title
            taken |= cells
        for panel in board["panels"]:
            assert panel["type"] == "row" or panel["description"].endswith((".", "`.")), panel["title"]
        assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "job", "instance"}


def test_names_and_labels_are_found() -> None:
    query = 'sum by (le, version) (rate(vllm:a_bucket{job=~"x{y}", z!="1"}[$__rate_interval])) / on (b) up offset 1m'
    assert names(query) == {"vllm:a_bucket", "up"}
    assert sorted(labels(query)) == ["b", "job", "le", "version", "z"]
