"""Every alert: it fires when it must, it is silent when it must, and somebody who is called finds what to do."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitoring.exported import TARGET, exported, labels, names

ROOT = Path(__file__).parents[2]
RULES = ROOT / "monitoring/rules"
RUNBOOK = (ROOT / "docs/runbook.md").read_text()


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((RULES / name).read_text())["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yaml")}
RECORDED = {rule["record"]: rule for rule in rules("slo.yaml")}

Series = dict[str, str]  # values in promtool's notation
WHO = 'job="pawl",instance="a"'
SERVER = {"job": "pawl", "instance": "a"}


def slo(bad: float, requests: float, count: int) -> Series:
    """Counters of one objective of 99 %, on two replicas; `bad` and `requests` at each of `count` times, of both."""
    made = {'pawl_slo_target{model_name="m",slo="ttft"}': f"0.99x{count}"}
    for name, rate in (("good", requests - bad), ("requests", requests)):
        for instance in "ab":
            series = f'pawl_slo_{name}_total{{model_name="m",slo="ttft",instance="{instance}"}}'
            made[series] = f"0+{rate / 2:g}x{count}"
    return made


@dataclass(frozen=True)
class Case:
    """`at` is when both are looked at; `labels` those of the alert when it fires, but for its severity."""

    at: str
    firing: Series
    silent: tuple[Series, ...]
    labels: dict[str, str] = field(default_factory=dict)
    every: str = "1m"  # between two values, and two looks at the rules


BUDGET = {"model_name": "m", "slo": "ttft"}
WAITING = f"vllm:num_requests_waiting{{{WHO}}}"
DISK = f"pawl_records_disk_bytes{{{WHO}}}"
FREE = f"pawl_records_disk_free_bytes{{{WHO}}}"
CASES = {
    # 20 % bad is 20 times what may be; 10 % is 10 times, too slow for this one; and a night with 30 requests an hour
    "PawlErrorBudgetBurnsFast": Case("70m", slo(4, 20, 80), (slo(2, 20, 80), slo(0.5, 0.5, 80)), BUDGET),
    "PawlErrorBudgetBurns": Case("7h", slo(2, 20, 430), (slo(1, 20, 430), slo(0.5, 0.5, 430)), BUDGET),
    "PawlErrorBudgetBurnsSlowly": Case("74h", slo(4, 200, 450), (slo(1, 200, 450), slo(1, 1, 450)), BUDGET, "10m"),
    "PawlUnavailable": Case(
        "5m", {f"up{{{WHO}}}": "0x10"}, ({f"up{{{WHO}}}": "0x10", 'up{job="pawl-canary",instance="b"}': "1x10"},)
    ),
    "PawlServerDown": Case(
        "10m",
        {f"up{{{WHO}}}": "0x10"},
        ({f"up{{{WHO}}}": "0x3 1x7"}, {'up{job="node",instance="a"}': "0x10"}),
        SERVER,
    ),
    "PawlQueueGrows": Case("30m", {WAITING: "0+2x40"}, ({WAITING: "50x40"}, {WAITING: "0+0.1x40"}), SERVER),
    "PawlKvCacheFull": Case(
        "15m",
        {f"vllm:kv_cache_usage_perc{{{WHO}}}": "0.96x20"},
        ({f"vllm:kv_cache_usage_perc{{{WHO}}}": "0.95x20"},),
        SERVER,
    ),
    "PawlRegistryOutOfStep": Case(
        "15m",
        {f"pawl_registry_in_step{{{WHO}}}": "0x20"},
        ({f"pawl_registry_in_step{{{WHO}}}": "0x8 1x12"},),
        SERVER,
    ),
    "PawlRecordsFail": Case(
        "10m",
        {f"pawl_records_failing{{{WHO}}}": "0x20", f"pawl_feedback_refused_total{{{WHO}}}": "0x4 1x16"},
        ({f"pawl_records_failing{{{WHO}}}": "0x20", f"pawl_feedback_refused_total{{{WHO}}}": "3x20"},),
        SERVER,
    ),
    "PawlDiskLow": Case(
        "15m", {DISK: "1000x20", FREE: "99x20"}, ({DISK: "1000x20", FREE: "100x20"},), SERVER
    ),
    # The clock of these tests begins at 0, so what is before has negative times.
    "PawlRetrainingStale": Case(
        "2h", {"pawl_retrain_run_seconds": "-700000x130"}, ({"pawl_retrain_run_seconds": "-600000x130"},)
    ),
    "PawlGateRefused": Case(
        "5m",
        {'pawl_retrain_last_verdict{verdict="rejected"}': "1x10"},
        ({'pawl_retrain_last_verdict{verdict="rejected"}': "0x10"},),
    ),
    "PawlVersionWithdrawn": Case(
        "5m",
        {'pawl_last_decision_seconds{action="rollback"}': "-600x10"},
        (
            {'pawl_last_decision_seconds{action="rollback"}': "-3600x10"},
            {'pawl_last_decision_seconds{action="promote"}': "-600x10"},
        ),
        {"action": "rollback"},
    ),
    "PawlDrifted": Case(
        "5m",
        {'pawl_drift_drifted{figure="language"}': "1x10"},
        ({'pawl_drift_drifted{figure="language"}': "0x10"},),
        {"figure": "language"},
    ),
}  # fmt: skip


def unit_test(alert: str, case: Case, series: Series, *, fires: bool) -> dict[str, Any]:
    """As promtool reads it."""
    rule = ALERTS[alert]
    expected = {"exp_labels": rule["labels"] | case.labels, "exp_annotations": rule["annotations"]}
    return {
        "interval": case.every,
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"eval_time": case.at, "alertname": alert, "exp_alerts": [expected] if fires else []},
        ],
    }


def test_every_alert_has_its_cases() -> None:
    assert list(CASES) == list(ALERTS)
    assert all(case.silent for case in CASES.values())


@pytest.mark.system
@pytest.mark.parametrize("alert", CASES)
def test_alerts_fire_and_are_silent(alert: str, tmp_path: Path) -> None:
    case = CASES[alert]
    tests = [unit_test(alert, case, case.firing, fires=True)]
    tests += [unit_test(alert, case, series, fires=False) for series in case.silent]
    file = tmp_path / "alerts.yaml"
    files = [f"{RULES}/slo.yaml", f"{RULES}/alerts.yaml"]  # in the order of their evaluation
    file.write_text(yaml.safe_dump({"rule_files": files, "evaluation_interval": case.every, "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.system
@pytest.mark.parametrize(
    "command", [("promtool", "check", "config", "prometheus.yml"), ("amtool", "check-config", "alertmanager.yml")]
)
def test_the_configurations_are_understood(command: tuple[str, ...]) -> None:
    done = subprocess.run(command, cwd=ROOT / "monitoring", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_ask_for_metrics_and_labels_that_are_exported(tmp_path: Path) -> None:
    known = exported(tmp_path)
    for name, rule in RECORDED.items():
        assert names(rule["expr"]) <= known.keys()
        known[name] = {"model_name", "slo"}
    for rule in ALERTS.values():
        asked = names(rule["expr"])
        assert asked, rule["expr"]
        assert asked <= known.keys(), rule["expr"]
        assert set(labels(rule["expr"])) <= TARGET.union(*(known[name] for name in asked)), rule["expr"]


def test_the_runbook_has_a_section_for_each_alert() -> None:
    assert re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE) == list(ALERTS)
    for alert, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{alert.lower()}"
        section = RUNBOOK.split(f"## {alert}\n\n")[1]
        assert section.startswith(f"`{rule['labels']['severity']}`. "), alert
