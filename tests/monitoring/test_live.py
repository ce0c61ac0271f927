"""A real Prometheus scrapes a real server under load: every panel has data, and so have the queries made for vLLM."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitoring.preview import draw_previews
from monitoring.prometheus_data import DASHBOARDS, Prometheus, read_board
from tests.monitoring.exported import cycle_gauges, drift_gauges
from tests.monitoring.live import DEADLINE_SECONDS, until, watched
from tests.serve.tiny import Server

pytestmark = [pytest.mark.system, pytest.mark.timeout(3 * DEADLINE_SECONDS)]

# Panels that have nothing to show while nothing is wrong.
MAY_BE_EMPTY = {
    "Drafts accepted": "the tiny model's text may foretell nothing, and stock operators draft nothing",
}

# The 27 queries of vLLM's own dashboard (vllm-project/vllm, examples/observability/prometheus_grafana/grafana.json of
# commit 4b5c627c23e6690b8987100d1cbf78e34ac14bf9), by their form; `{model_name="M"}` is how they choose a model.
CHOSEN = '{model_name="tiny"}'
QUANTILES = ("e2e_request_latency_seconds", "inter_token_latency_seconds", "time_to_first_token_seconds")
SUMS = (
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_max_num_generation_tokens",
)
FORMS = [
    *(
        f"histogram_quantile({q}, sum by(le) (rate(vllm:{name}_bucket{CHOSEN}[$__rate_interval])))"
        for name in QUANTILES
        for q in (0.5, 0.9, 0.95, 0.99)
    ),
    *(
        f"rate(vllm:{name}_sum{CHOSEN}[$__rate_interval]) / rate(vllm:{name}_count{CHOSEN}[$__rate_interval])"
        for name in QUANTILES
    ),
    *(f"rate(vllm:{name}_total{CHOSEN}[$__rate_interval])" for name in ("prompt_tokens", "generation_tokens")),
    *(f"vllm:{name}{CHOSEN}" for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")),
    *(
        f"sum by(le) (increase(vllm:request_{name}_tokens_bucket{CHOSEN}[$__rate_interval]))"
        for name in ("prompt", "generation")
    ),
    f"sum by(finished_reason) (increase(vllm:request_success_total{CHOSEN}[$__rate_interval]))",
    *(f"rate(vllm:{name}_sum{CHOSEN}[$__rate_interval])" for name in SUMS),
]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Prometheus]]:
    with watched(tmp_path_factory.mktemp("live")) as found:
        yield found


def empty(prometheus: Prometheus, queries: list[str]) -> list[str]:
    """Those without a single number."""
    return [query for query in queries if not any(series.values for series in prometheus.read(query))]


def test_every_panel_of_every_dashboard_has_data(live: tuple[Server, Prometheus]) -> None:
    _, prometheus = live
    for board in sorted(DASHBOARDS.glob("*.json")):
        for panel in read_board(board)[1]:
            queries = [query for query, _ in panel.queries]
            if panel.title in MAY_BE_EMPTY:
                empty(prometheus, queries)  # understood, at least
            else:
                assert until(lambda queries=queries: not empty(prometheus, queries)), f"{board.stem}: {panel.title}"


def test_vllms_queries_have_data(live: tuple[Server, Prometheus]) -> None:
    """All of them, and the variable that Grafana offers the models by, `label_values(model_name)`."""
    _, prometheus = live
    assert len(FORMS) == 27
    assert until(lambda: not empty(prometheus, FORMS))
    with urllib.request.urlopen(f"{prometheus.url}/api/v1/label/model_name/values", timeout=30) as answer:
        assert json.load(answer)["data"] == ["tiny"]


def test_no_alert_fires_for_a_server_that_is_well(live: tuple[Server, Prometheus]) -> None:
    _, prometheus = live
    assert until(lambda: prometheus.read("model_slo:pawl_slo_burn:rate5m")), "the rules are evaluated"
    alerts = {series.labels["alertname"] for series in prometheus.read('ALERTS{alertstate="firing"}')}
    assert alerts <= {"PawlErrorBudgetBurnsFast", "PawlQueueGrows", "PawlDiskLow"}, "what a busy host can cause"


def test_promtool_finds_only_vllms_names_odd(live: tuple[Server, Prometheus], tmp_path: Path) -> None:
    server, _ = live
    with urllib.request.urlopen(f"{server.http_url}/metrics", timeout=30) as answer:
        served = answer.read()
    for text in (served, cycle_gauges(tmp_path), drift_gauges()):
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
        told = (done.stdout + done.stderr).decode().splitlines()
        assert [line for line in told if not line.startswith("vllm:")] == []


def test_previews_are_drawn(live: tuple[Server, Prometheus], tmp_path: Path) -> None:
    _, prometheus = live
    drawn = draw_previews(prometheus.url, tmp_path, seconds=120)
    assert [path.stem for path in drawn] == sorted(path.stem for path in DASHBOARDS.iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert all(path.stat().st_size > 20_000 for path in drawn), "charts, not empty boxes"
