"""The names are a contract with other people's dashboards, the documentation with our readers; both are checked."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from proto.manifest import Architecture, Lineage, Manifest, Precision, Recipe
from proto.records import utc_now
from proto.registry import Movement
from serve.engine_metrics import LATENCY_SECONDS, TOKEN_SECONDS, TTFT_SECONDS, EngineMetrics
from serve.metrics import Metrics
from serve.records import Records
from serve.records_metrics import RecordsCollector
from serve.request import FinishReason, Request, SamplingParams
from serve.slo import SLOS, Objectives
from serve.store import open_store
from tests.serve.fakes import choices
from tests.serve.stores import during, feedback, interaction

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
COMMON = {"model_name", "engine"}  # of all; counters and histograms have `version` too

# vLLM's names, as its dashboards, llm-d's router and the usual KEDA triggers query them.
VLLM = {
    "gauge": {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
    },
    "counter": {
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "vllm:admission_rejections_total",
    },
    "histogram": {
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:request_time_per_output_token_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "vllm:request_prefill_time_seconds",
        "vllm:request_decode_time_seconds",
        "vllm:request_inference_time_seconds",
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
        "vllm:request_max_num_generation_tokens",
        "vllm:iteration_tokens_total",
    },
}


def manifest(checkpoint: str = "0") -> Manifest:
    """Of another version for another checkpoint."""
    return Manifest(
        format_version=1,
        name="tiny",
        architecture=Architecture(
            family="llama",
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_size=4,
            hidden_size=4,
            vocab_size=8,
            max_context=64,
        ),
        recipe=Recipe(name="w8a8", default=Precision(weight_bits=8, activation_bits=8)),
        kv_cache="int8",
        target="cpu",
        files={},
        lineage=Lineage(checkpoint=checkpoint * 64),
    )


@pytest.fixture
def metrics() -> Metrics:
    return Metrics('ti"ny')


@pytest.fixture
def engine(metrics: Metrics) -> EngineMetrics:
    return metrics.engine(manifest(), choices())


@pytest.fixture
def records(metrics: Metrics, tmp_path: Path) -> Records:
    log = Records(open_store(str(tmp_path / "records.sqlite")))
    metrics.registry.register(RecordsCollector(log))
    return log


def families(metrics: Metrics) -> dict[str, Metric]:
    """By full name; the parser drops a counter's `_total`."""
    found = text_string_to_metric_families(metrics.render()[0].decode())
    return {family.name + "_total" * (family.type == "counter"): family for family in found}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """The sum of the samples of that name which have these labels."""
    samples = [s for family in families(metrics).values() for s in family.samples if s.name == name]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


def request(reason: FinishReason = "stop", *, tokens: int = 5) -> Request:
    """Arrived at 100 s, scheduled 1 s later, first token after 2 s more, then one every 0.5 s."""
    channel = SimpleNamespace(closed=False, send=lambda chunk: None)
    made = Request(id="r", prompt=[1, 2, 3], params=SamplingParams(), channel=channel, arrival=100.0)
    made.finish_reason = reason
    made.first_scheduled = 101.0
    made.computed = 3
    if tokens:
        made.output = list(range(tokens))
        made.first_token = 103.0
        made.last_token = 103.0 + 0.5 * (tokens - 1)
    return made


def test_vllm_names_types_and_labels(metrics: Metrics, engine: EngineMetrics) -> None:
    found = families(metrics)
    for kind, names in VLLM.items():
        assert {name for name in found if name.startswith("vllm:") and found[name].type == kind} == names
        for name in names:
            assert found[name].samples, f"{name} is absent until something happens"
            for sample in found[name].samples:
                assert sample.labels["model_name"] == 'ti"ny'
                assert sample.labels["engine"] == "0"
                assert (sample.labels.get("version") == manifest().digest[:12]) == (kind != "gauge")


def test_docs_list_exactly_what_exists(metrics: Metrics, engine: EngineMetrics, records: Records) -> None:
    metrics.http("/v1/models", "GET", 200)
    metrics.feedback("thumbs", True, manifest().digest[:12])
    metrics.roles({manifest().digest: 1.0})
    exposed = {}
    for name, family in families(metrics).items():
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        common = COMMON if family.type == "gauge" else COMMON | {"version"}
        exposed[name] = (family.type, labels - common if name.startswith("vllm:") else labels)
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \|([^|]*)\|[^|]+\|$", DOCS.read_text(), re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert documented == exposed
    assert len(rows) == len(documented), "a metric is listed twice"


def test_buckets_hold_vllms() -> None:
    ttft = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
    token = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
    latency = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
    for ours, theirs in [(TTFT_SECONDS, ttft), (TOKEN_SECONDS, token), (LATENCY_SECONDS, latency)]:
        assert {float(bound) for bound in theirs.split()} <= set(ours)
        assert list(ours) == sorted(set(ours))


def test_a_finished_request_is_observed_once_with_its_times(metrics: Metrics, engine: EngineMetrics) -> None:
    engine.request_finished(request(), now=106.0)
    sums = {
        "vllm:time_to_first_token_seconds": 3.0,
        "vllm:e2e_request_latency_seconds": 6.0,
        "vllm:request_queue_time_seconds": 1.0,
        "vllm:request_prefill_time_seconds": 2.0,
        "vllm:request_decode_time_seconds": 2.0,
        "vllm:request_inference_time_seconds": 4.0,
        "vllm:request_time_per_output_token_seconds": 0.5,
        "vllm:request_prompt_tokens": 3,
        "vllm:request_generation_tokens": 5,
        "vllm:request_max_num_generation_tokens": 5,
    }
    for name, expected in sums.items():
        assert value(metrics, f"{name}_sum") == expected, name
        assert value(metrics, f"{name}_count") == 1, name
        assert value(metrics, f"{name}_bucket", le="+Inf") == 1, name
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(metrics, "vllm:prompt_tokens_total") == 3


def test_tokens_counted_are_tokens_sent(metrics: Metrics, engine: EngineMetrics) -> None:
    for tokens in (1, 2, 5):
        engine.step_tokens([0.5] * (tokens - 1))
        engine.request_finished(request("length", tokens=tokens), now=106.0)
    assert value(metrics, "vllm:generation_tokens_total") == 8
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 5
    assert value(metrics, "vllm:request_time_per_output_token_seconds_count") == 2  # not of a single token


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_request_that_ends_early_has_only_the_times_it_had(
    metrics: Metrics, engine: EngineMetrics, reason: FinishReason
) -> None:
    queued, prefilling = request(reason, tokens=0), request(reason, tokens=0)
    queued.first_scheduled, queued.computed, prefilling.computed = None, 0, 2
    engine.request_finished(queued, now=101.0)
    engine.request_finished(prefilling, now=102.0)
    assert value(metrics, "vllm:request_success_total", finished_reason=reason) == 2
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 2
    assert value(metrics, "vllm:request_queue_time_seconds_count") == 1
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 0
    assert value(metrics, "vllm:request_inference_time_seconds_count") == 0
    assert value(metrics, "vllm:prompt_tokens_total") == 2


def test_an_embedding_has_inference_time_and_no_tokens(metrics: Metrics, engine: EngineMetrics) -> None:
    embedding = request(tokens=0)
    embedding.embed = True
    engine.request_finished(embedding, now=104.0)
    assert value(metrics, "vllm:request_inference_time_seconds_sum") == 3.0
    assert value(metrics, "vllm:generation_tokens_total") == 0
    assert value(metrics, "vllm:prompt_tokens_total") == 3


def test_a_request_for_no_token_has_inference_time_and_none_of_a_token(metrics: Metrics, engine: EngineMetrics) -> None:
    scored = request("length", tokens=0)
    scored.params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    engine.request_finished(scored, now=104.0)
    assert value(metrics, "vllm:request_inference_time_seconds_sum") == 3.0
    assert value(metrics, "vllm:generation_tokens_total") == 0
    assert value(metrics, "vllm:prompt_tokens_total") == 3
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 0


def test_step_and_prefix_cache(metrics: Metrics, engine: EngineMetrics) -> None:
    engine.step(tokens=33, running=3, waiting=2, kv_usage=0.25)
    engine.step(tokens=3, running=2, waiting=0, kv_usage=0.125)
    engine.prefix_cache(queried=10, hit=8)
    engine.preempted(2)
    engine.speculation(drafted=8, accepted=3)
    assert value(metrics, "vllm:num_preemptions_total") == 2
    assert value(metrics, "vllm:spec_decode_num_draft_tokens_total") == 8
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total") == 3
    assert value(metrics, "vllm:num_requests_running") == 2
    assert value(metrics, "vllm:num_requests_waiting") == 0
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.125
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 36
    assert value(metrics, "vllm:iteration_tokens_total_bucket", le="8.0") == 1
    assert value(metrics, "vllm:prefix_cache_queries_total") == 10
    assert value(metrics, "vllm:prefix_cache_hits_total") == 8


def test_a_value_on_an_edge_falls_below_it(metrics: Metrics, engine: EngineMetrics) -> None:
    engine.step_tokens([0.01, 0.0100001, 1000.0])
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="0.01") == 1
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="0.025") == 2
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="80.0") == 2
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="+Inf") == 3


def test_labels_stay_bounded(metrics: Metrics) -> None:
    for number in range(50):
        metrics.feedback(f"made-up-{number}", 0.5, "made-up")
        metrics.http("/v1/models", "GET", 200 + number)
    metrics.feedback("thumbs", False, "")
    metrics.feedback("comment", "nice", "")
    assert value(metrics, "pawl_feedback_total", metric_name="other", value="number", version="gone") == 50
    assert value(metrics, "pawl_feedback_total", metric_name="thumbs", value="false") == 1
    assert value(metrics, "pawl_feedback_total", metric_name="comment", value="text") == 1
    assert len(families(metrics)["http_requests_total"].samples) == 1
    assert value(metrics, "http_requests_total", status="2xx") == 50


def test_rejections(metrics: Metrics, engine: EngineMetrics) -> None:
    engine.admission_rejected("queue_full")
    engine.admission_rejected("draining")
    for reason in ("queue_full", "draining"):
        assert value(metrics, "vllm:admission_rejections_total", reason=reason) == 1
    assert value(metrics, "pawl_slo_requests_total", slo="availability") == 1, "draining is planned"
    assert value(metrics, "pawl_slo_good_total") == 0


def test_objectives_are_counted_exactly() -> None:
    metrics = Metrics("tiny", Objectives(target=0.95, ttft_seconds=3.0, tpot_seconds=0.4))
    engine = metrics.engine(manifest(), choices())
    engine.request_finished(request(), now=106.0)
    engine.request_finished(request("error", tokens=0), now=106.0)
    counted = {
        slo: (value(metrics, "pawl_slo_good_total", slo=slo), value(metrics, "pawl_slo_requests_total", slo=slo))
        for slo in SLOS
    }
    assert counted == {"availability": (1, 2), "ttft": (1, 2), "tpot": (0, 1)}
    assert value(metrics, "pawl_slo_target", slo="tpot") == 0.95


def test_the_records_are_counted(metrics: Metrics, records: Records) -> None:
    records.max_queue = 1
    for number in range(3):
        records.interaction(interaction(f"chat-{number}"))
    assert value(metrics, "pawl_records_queue") == 1
    assert value(metrics, "pawl_records_queue_bytes") > 100
    assert value(metrics, "pawl_interactions_lost_total") == 2
    before = time.time()

    async def body(log: Records) -> None:
        log.max_queue = 9
        log.interaction(interaction("chat-9"))
        await log.feedback(feedback("chat-9"))

    during(records, body)
    assert value(metrics, "pawl_records_written_total", kind="interaction") == 2
    assert value(metrics, "pawl_records_written_total", kind="feedback") == 1
    assert value(metrics, "pawl_records_queue") == 0
    assert value(metrics, "pawl_records_bytes") > 4096
    assert 0 < value(metrics, "pawl_records_disk_free_bytes") < value(metrics, "pawl_records_disk_bytes")
    assert before <= value(metrics, "pawl_records_last_write_seconds") <= time.time()
    assert value(metrics, "pawl_records_failing") == value(metrics, "pawl_records_failures_total") == 0


def test_openmetrics_when_asked(metrics: Metrics, engine: EngineMetrics) -> None:
    engine.request_finished(request(), now=106.0)
    body, content_type = metrics.render("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    samples = {sample.name for family in parse_openmetrics(body.decode()) for sample in family.samples}
    assert samples == {sample.name for family in families(metrics).values() for sample in family.samples}
    assert "vllm:time_to_first_token_seconds_bucket" in samples
    assert metrics.render()[1].startswith("text/plain; version=0.0.4")


def test_exemplars_tell_which_request_it_was(metrics: Metrics, engine: EngineMetrics) -> None:
    before = time.time()
    for id, first_token in (("chat-1", 100.6), ("chat-2", 100.61), ("chat-3", 102.0)):
        one = request()
        one.id, one.first_token = id, first_token
        engine.request_finished(one, now=106.0)
    body, _ = metrics.render("application/openmetrics-text;version=1.0.0")
    found = {
        (sample.name, sample.labels["le"]): sample.exemplar
        for family in parse_openmetrics(body.decode())
        for sample in family.samples
        if sample.exemplar is not None
    }
    ttft = {float(le): exemplar for (name, le), exemplar in found.items() if name.startswith("vllm:time_to_first")}
    assert [exemplar.labels["request_id"] for _, exemplar in sorted(ttft.items())] == ["chat-2", "chat-3"]
    assert all(exemplar.value <= le for le, exemplar in ttft.items())
    assert all(before - 1 <= float(exemplar.timestamp) <= time.time() + 1 for exemplar in ttft.values())
    assert {name.removesuffix("_bucket") for name, _ in found} == {
        "vllm:time_to_first_token_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "vllm:request_time_per_output_token_seconds",
    }
    assert b"chat-1" not in metrics.render()[0]  # Prometheus' own text has no room for them


def test_each_version_counts_for_itself_and_the_gauges_for_all(metrics: Metrics, engine: EngineMetrics) -> None:
    other = metrics.engine(manifest("1"), choices(num_blocks=48))
    first, second = manifest().digest[:12], manifest("1").digest[:12]
    for made, count in ((engine, 1), (other, 3)):
        for _ in range(count):
            made.request_finished(request(), now=106.0)
    for name in ("vllm:request_success_total", "vllm:time_to_first_token_seconds_count"):
        assert (value(metrics, name, version=first), value(metrics, name, version=second)) == (1, 3)
    engine.step(tokens=1, running=2, waiting=5, kv_usage=0.5)
    other.step(tokens=1, running=1, waiting=0, kv_usage=0.25)
    assert value(metrics, "vllm:num_requests_running") == 3
    assert value(metrics, "vllm:num_requests_waiting") == 5
    assert value(metrics, "vllm:kv_cache_usage_perc") == (0.5 * 16 + 0.25 * 48) / 64
    assert value(metrics, "vllm:cache_config_info", num_gpu_blocks="64") == 1
    assert value(metrics, "pawl_slots") == 8
    for name in ("vllm:num_requests_running", "vllm:cache_config_info", "pawl_kv_cache_bytes"):
        assert len(families(metrics)[name].samples) == 1, "a router reads one number"


def test_a_versions_series_outlive_its_engine_and_vanish_with_it(metrics: Metrics, engine: EngineMetrics) -> None:
    before = metrics.render()[0].count(b"\n")
    for number in "123":
        digest = manifest(number).digest
        made = metrics.engine(manifest(number), choices())
        made.request_finished(request(), now=106.0)
        made.step(tokens=1, running=2, waiting=1, kv_usage=0.5)
        metrics.feedback("thumbs", True, digest[:12])
        metrics.engine_ended(digest)
        assert value(metrics, "vllm:num_requests_running") == 0
        assert value(metrics, "pawl_slots") == 4
        metrics.engine(manifest(number), choices()).request_finished(request(), now=106.0)  # called back
        assert value(metrics, "vllm:request_success_total", version=digest[:12]) == 2
        metrics.forget(digest)
        assert digest[:12] not in metrics.render()[0].decode()
    assert metrics.render()[0].count(b"\n") == before


def test_roles_and_decisions(metrics: Metrics) -> None:
    metrics.roles({"a" * 64: 1.0})
    metrics.roles({"a" * 64: 0.75, "b" * 64: 0.25})
    assert value(metrics, "pawl_version_share", version="a" * 12, role="current") == 0.75
    assert value(metrics, "pawl_version_share", version="b" * 12, role="candidate") == 0.25
    metrics.roles({"b" * 64: 1.0})
    (sample,) = families(metrics)["pawl_version_share"].samples
    assert (sample.labels, sample.value) == ({"version": "b" * 12, "role": "current"}, 1.0)
    movement = Movement(time=utc_now(), action="rollback", version="a" * 64, by="me", why="slow")
    metrics.moved(movement)
    assert value(metrics, "pawl_decisions_total", action="rollback") == 1
    assert value(metrics, "pawl_decisions_total", action="promote") == 0
    assert 0 <= time.time() - value(metrics, "pawl_last_decision_seconds", action="rollback") < 60
    assert value(metrics, "pawl_last_decision_seconds", action="promote") == 0


@pytest.mark.system
def test_promtool_finds_only_vllms_names_odd(metrics: Metrics, engine: EngineMetrics) -> None:
    metrics.http("/v1/models", "GET", 200)
    metrics.feedback("thumbs", True, manifest().digest[:12])
    metrics.roles({manifest().digest: 1.0})
    done = subprocess.run(["promtool", "check", "metrics"], input=metrics.render()[0], capture_output=True)
    complaints = set((done.stdout + done.stderr).decode().splitlines())
    colons = {f"{name} metric names should not contain ':'" for names in VLLM.values() for name in names}
    assert complaints == colons | {'vllm:iteration_tokens_total non-counter metrics should not have "_total" suffix'}
