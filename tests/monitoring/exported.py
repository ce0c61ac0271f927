"""Every metric that Pawl exports, with its labels; and the metrics and labels that a query names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from deploy.cycle import VERDICT
from deploy.cycle_metrics import as_metrics as cycle_metrics
from deploy.retrain import find_turns
from monitoring.drift import rate_drift
from monitoring.drift_report import as_metrics as drift_metrics
from monitoring.window import Window
from serve.metrics import Metrics
from serve.records import Records
from serve.records_metrics import RecordsCollector
from serve.store import open_store
from tests.deploy.test_cycle_metrics import end_cycle
from tests.serve.fakes import choices
from tests.serve.test_metrics import manifest

TARGET = {"job", "instance"}  # Prometheus gives them to everything
WORDS = {"and", "or", "unless", "offset", "bool", "by", "on", "without", "ignoring", "group_left", "group_right", "inf"}


def cycle_gauges(work: Path) -> bytes:
    """What the retrain command leaves for node_exporter after a cycle."""
    end_cycle(work, 1, passed=True)
    return cycle_metrics(find_turns(work), VERDICT)


def drift_gauges() -> bytes:
    """What the drift report leaves for it."""
    window = Window([1], [1], [], [], [], [], [False], [False], [False], [])
    drift = rate_drift("refusals", [True, False], [False, False])
    return drift_metrics([drift], window)


def exported(folder: Path) -> dict[str, set[str]]:
    """The labels of each series, by its name; of a server that has seen all there is, and of the textfiles."""
    metrics = Metrics("tiny")
    metrics.registry.register(RecordsCollector(Records(open_store(str(folder / "records.sqlite")))))
    metrics.engine(manifest(), choices())
    metrics.http("/v1/models", "GET", 200)
    metrics.roles({manifest().digest: 1.0})
    found: dict[str, set[str]] = {"up": set()}
    for text in (metrics.render()[0], cycle_gauges(folder / "cycles"), drift_gauges()):
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def bare(query: str) -> str:
    """Without texts, windows and Grafana's variables."""
    return re.sub(r'"[^"]*"|\[[^\]]*\]', "", query)


def names(query: str) -> set[str]:
    """The metrics that a query names."""
    text = re.sub(
        r"\{[^}]*\}|\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)|offset \w+", " ", bare(query)
    )
    return set(re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\s*\(|[\w:])", text)) - WORDS


def labels(query: str) -> Iterator[str]:
    """The labels that a query chooses or groups by."""
    for inside in re.findall(r"\{([^}]*)\}", bare(query)):
        yield from re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside)
    for inside in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query):
        yield from re.findall(r"\w+", inside)
