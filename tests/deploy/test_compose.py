"""The compose file: what it runs is understood, confined, pinned, and open to this machine alone."""

from __future__ import annotations

import os
import re
import subprocess
from typing import Any

import pytest
import yaml

from deploy.assertions import PINNED
from deploy.render import ROOT
from serve.settings import parse_settings

COMPOSE = ROOT / "deploy/compose.yaml"
CONTENT = yaml.safe_load(COMPOSE.read_text())
SERVICES: dict[str, dict[str, Any]] = CONTENT["services"]


def test_the_server_is_as_it_must_be() -> None:
    server = SERVICES["server"]
    settings = parse_settings(server["command"])
    assert settings.drain_seconds < int(server["stop_grace_period"].removesuffix("s"))
    assert [port.rpartition(":")[2] for port in server["ports"]] == [str(settings.http_port), str(settings.grpc_port)]
    assert {volume.split(":")[-2 if volume.endswith(":ro") else -1] for volume in server["volumes"]} == {
        str(settings.model),
        str(settings.derived),
    }


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined_and_pinned(name: str) -> None:
    service = SERVICES[name]
    assert "no-new-privileges:true" in service["security_opt"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    (image,) = re.fullmatch(r"\$\{\w+:-(.+)\}", service["image"]).groups()  # type: ignore[union-attr]
    assert PINNED.fullmatch(image)
    assert (name == "postgres") or (service["read_only"] and service["cap_drop"] == ["ALL"])
    named = [v.split(":")[0] for v in service["volumes"] if not v.startswith((".", "$", "/"))]
    assert all(v.endswith(":ro") for v in service["volumes"] if v.startswith("/"))
    assert set(named) <= CONTENT["volumes"].keys()


def test_prometheus_finds_what_it_is_to_ask() -> None:
    config = yaml.safe_load((ROOT / "monitoring/prometheus.yml").read_text())
    groups = [*config["scrape_configs"], *config["alerting"]["alertmanagers"]]
    targets = [target for group in groups for each in group["static_configs"] for target in each["targets"]]
    assert (
        {target.split(":")[0] for target in targets} == {"server", "node-exporter", "alertmanager"} <= SERVICES.keys()
    )


@pytest.mark.system
def test_compose_reads_it_and_asks_for_the_passwords() -> None:
    words = ["docker-compose", "-f", str(COMPOSE), "--project-directory", str(ROOT), "config", "--quiet"]
    passwords = {"POSTGRES_PASSWORD": "a", "GRAFANA_PASSWORD": "b"}
    for given in ({}, passwords):
        done = subprocess.run(words, env={**os.environ, **given}, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == bool(given), done.stderr
        assert given or "give one" in done.stderr
