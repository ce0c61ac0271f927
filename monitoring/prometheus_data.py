"""The queries of dashboards, and what a Prometheus answers to them: what Grafana does, without Grafana."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARDS = Path(__file__).parent / "dashboards"
MAX_POINTS = 240
TIMEOUT_SECONDS = 30


class PrometheusError(Exception):
    """Prometheus cannot be reached, or refuses a query; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Of a dashboard's JSON. The place is in columns of 24, and rows; `queries` are (query, legend)."""

    title: str
    kind: str
    unit: str
    place: tuple[int, int, int, int]  # x, y, width, height
    queries: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Series:
    """`points` are (Unix time, value); a value may be NaN."""

    name: str
    labels: dict[str, str]
    points: list[tuple[float, float]]

    @property
    def values(self) -> list[float]:
        """Those that are numbers."""
        return [value for _, value in self.points if value == value]


@dataclass(frozen=True, slots=True)
class Prometheus:
    """At `url`. A rate is taken over `window`, as `1m`; ranges are the last `seconds`."""

    url: str
    window: str = "1m"
    seconds: float = 900.0

    def read(self, query: str, legend: str = "") -> list[Series]:
        """A panel's query over the time shown. Raises PrometheusError."""
        end = time.time()
        step = max(1.0, self.seconds / MAX_POINTS)
        asked = {"query": self.filled(query), "start": end - self.seconds, "end": end, "step": step}
        return [
            Series(
                named(legend, found["metric"]),
                found["metric"],
                [(float(at), float(value)) for at, value in found["values"]],
            )
            for found in self.call("query_range", asked)["result"]
        ]

    def filled(self, query: str) -> str:
        """With Grafana's variables replaced: all servers, and our times."""
        for name, value in (
            ("$__rate_interval", self.window),
            ("$__range", f"{self.seconds:.0f}s"),
            ("$job", ".*"),
            ("$instance", ".*"),
        ):
            query = query.replace(name, value)
        return query

    def call(self, what: str, asked: dict[str, Any]) -> Any:
        """The `data` of an answer. Raises PrometheusError."""
        url = f"{self.url.rstrip('/')}/api/v1/{what}?{urllib.parse.urlencode(asked)}"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise PrometheusError(f"Prometheus refuses {asked}: {error.read().decode('utf-8', 'replace')}") from error
        except (OSError, ValueError, KeyError) as error:
            raise PrometheusError(f"{self.url} does not answer as Prometheus does: {error}") from error


def read_board(path: Path) -> tuple[str, list[Panel]]:
    """A dashboard's title and its panels; rows, whose kind is `row`, have no queries."""
    board = json.loads(path.read_text(encoding="utf-8"))
    return board["title"], list(_panels(board))


def _panels(board: dict[str, Any]) -> Iterator[Panel]:
    for panel in board["panels"]:
        place = panel["gridPos"]
        yield Panel(
            title=panel["title"],
            kind=panel["type"],
            unit=panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "short"),
            place=(place["x"], place["y"], place["w"], place["h"]),
            queries=tuple((target["expr"], target["legendFormat"]) for target in panel.get("targets", [])),
        )


def named(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend)
