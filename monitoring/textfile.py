"""Gauges of commands that end before Prometheus could ask them, for node_exporter's textfile collector."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import generate_latest


class Textfile:
    """What becomes a file. Its name must end in `.prom`, or the collector passes it over."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry)

    def encode(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


def write(path: Path, data: bytes) -> None:
    """The file appears whole: the collector must not see half of it."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)
