"""What Prometheus scrapes, under vLLM's names, so that dashboards, routers and autoscalers made for it work unchanged.

Our own metrics begin with `pawl_`. All are listed in docs/metrics.md. No label ever names a user or a key.
The histograms and gauges are written by the engine thread alone; the counters by any thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from proto.manifest import Manifest
from proto.records import COMMENT, DEMONSTRATION
from serve.request import Request

if TYPE_CHECKING:
    from serve.choices import Choices

# vLLM's buckets; below them finer ones, since small models are faster.
TTFT_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
TOKEN_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
LATENCY_SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2),
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

FINISHED_REASONS = ("stop", "length", "abort", "error")
REJECTION_REASONS = ("queue_full", "draining")
FEEDBACK_METRICS = ("thumbs", COMMENT, DEMONSTRATION)  # clients choose names; others share the label "other"


class Histogram(Collector):
    """A histogram with one writer. prometheus_client's own takes 2.2 us per value, too slow for every token."""

    def __init__(
        self, name: str, help: str, labels: dict[str, str], bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self.name = name
        self.help = help
        self.labels = labels
        self.bounds = tuple(float(bound) for bound in bounds)
        self.edges = [floatToGoString(bound) for bound in (*self.bounds, "+Inf")]  # type: ignore[no-untyped-call]
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_all(self, values: Sequence[float]) -> None:
        """Many values in one go: 0.2 us each."""
        counts, bounds = self.counts, self.bounds
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self.sum += sum(values)

    def describe(self) -> Iterable[HistogramMetricFamily]:
        return [HistogramMetricFamily(self.name, self.help, labels=list(self.labels))]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        family = HistogramMetricFamily(self.name, self.help, labels=list(self.labels))
        totals = accumulate(list(self.counts))
        family.add_metric(list(self.labels.values()), list(zip(self.edges, totals, strict=True)), self.sum)
        return [family]


class Metrics:
    """One server's metrics, on a registry of their own."""

    def __init__(self, manifest: Manifest, model_name: str, choices: Choices) -> None:
        # They double the number of series and nobody reads them.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._define_engine_metrics(choices)
        self._define_request_metrics(choices.max_context)
        ProcessCollector(registry=registry)
        self._http = Counter(
            "http_requests_total", "Answered calls.", ["handler", "method", "status"], registry=registry
        )
        self._feedback = Counter("pawl_feedback_total", "Stored feedback.", ["metric_name", "value"], registry=registry)
        Gauge("pawl_kv_cache_bytes", "Memory of the KV cache.", registry=registry).set(choices.kv_bytes)
        Gauge("pawl_slots", "Requests that can be decoded together.", registry=registry).set(choices.num_slots)
        info = {
            "model_name": model_name,
            "model_digest": manifest.digest,
            "recipe": manifest.recipe.name,
            "kv_cache": manifest.kv_cache,
        }
        Gauge("pawl_info", "What is served; always 1.", list(info), registry=registry).labels(**info).set(1)

    # -- the engine thread --------------------------------------------------------------------------------------

    def step(self, tokens: int, running: int, waiting: int, kv_usage: float) -> None:
        """After each step: the tokens computed in it, if any, and how things stand. `kv_usage` is from 0 to 1."""
        if tokens:
            self._step_tokens.observe(tokens)
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_usage.set(kv_usage)

    def step_tokens(self, gaps: list[float]) -> None:
        """After each step: for every token but a request's first, the seconds since the one before."""
        if gaps:
            self._token_gap.observe_all(gaps)
            self._generation_tokens.inc(len(gaps))

    def prefix_cache(self, queried: int, hit: int) -> None:
        """A request was admitted: the tokens of its prompt, and how many of them the cache had."""
        self._prefix_queries.inc(queried)
        self._prefix_hits.inc(hit)

    def preempted(self, count: int) -> None:
        """So many requests went back into the queue."""
        self._preemptions.inc(count)

    def speculation(self, drafted: int, accepted: int) -> None:
        """A request's drafts of one step, and how many of them were right."""
        self._drafts.inc(drafted)
        self._accepted.inc(accepted)

    def request_finished(self, request: Request, now: float) -> None:
        """A request left the engine, in whatever state; `now` is monotonic."""
        self._finished[request.finish_reason or "error"].inc()
        self._e2e.observe(now - request.arrival)
        self._request_prompt_tokens.observe(len(request.prompt))
        # Whoever has answered had its prompt computed, even if it lost that when it was put back into the queue.
        self._prompt_tokens.inc(len(request.prompt) if request.output else min(request.computed, len(request.prompt)))
        if request.first_scheduled is None:
            return
        self._queue_time.observe(request.first_scheduled - request.arrival)
        if request.first_token is None or request.last_token is None:  # none was wanted, or ended in its prefill
            if not request.generates:
                self._inference_time.observe(now - request.first_scheduled)
            return
        num_tokens = len(request.output)
        self._generation_tokens.inc(min(num_tokens, 1))  # the first; `step_tokens` counts the others
        self._request_generation_tokens.observe(num_tokens)
        self._ttft.observe(request.first_token - request.arrival)
        self._prefill_time.observe(request.first_token - request.first_scheduled)
        self._decode_time.observe(request.last_token - request.first_token)
        self._inference_time.observe(request.last_token - request.first_scheduled)
        if num_tokens > 1:
            self._time_per_token.observe((request.last_token - request.first_token) / (num_tokens - 1))

    # -- any thread ---------------------------------------------------------------------------------------------

    def admission_rejected(self, reason: str) -> None:
        """A request was refused at the door."""
        self._rejections.labels(reason=reason, **self._labels).inc()

    def http(self, handler: str, method: str, status: int) -> None:
        """A call was answered. The adapters see to it that `handler` and `method` are of a bounded set."""
        self._http.labels(handler, method, f"{status // 100}xx").inc()

    def feedback(self, metric_name: str, value: bool | float | str) -> None:
        """A feedback was stored."""
        kind = str(value).lower() if isinstance(value, bool) else "text" if isinstance(value, str) else "number"
        self._feedback.labels(metric_name if metric_name in FEEDBACK_METRICS else "other", kind).inc()

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The body and the content type for a scraper's Accept header: Prometheus' text, or OpenMetrics if asked."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    # -- names --------------------------------------------------------------------------------------------------

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(name, help, list(self._labels), registry=self.registry).labels(**self._labels)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(name, help, list(self._labels), registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, help: str, bounds: Sequence[float]) -> Histogram:
        return Histogram(name, help, self._labels, bounds, self.registry)

    def _define_engine_metrics(self, choices: Choices) -> None:
        self._running = self._gauge("vllm:num_requests_running", "Requests that run.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait.")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.")
        # The product is what the cache holds in tokens, as vLLM's readers expect.
        shape = {"block_size": str(choices.block.tokens), "num_gpu_blocks": str(choices.num_blocks)} | self._labels
        Gauge(
            "vllm:cache_config_info",
            "Tokens per block of the KV cache and number of blocks; always 1.",
            list(shape),
            registry=self.registry,
        ).labels(**shape).set(1)
        self._prefix_queries = self._counter(
            "vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = self._counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.")
        self._preemptions = self._counter(
            "vllm:num_preemptions_total", "Requests put back into the queue, since the KV cache was full."
        )
        self._drafts = self._counter("vllm:spec_decode_num_draft_tokens_total", "Tokens drafted by prompt lookup.")
        self._accepted = self._counter("vllm:spec_decode_num_accepted_tokens_total", "Drafted tokens that were right.")
        self._step_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Tokens computed per step, prefill and decode.", STEP_TOKENS
        )
        self._rejections = Counter(
            "vllm:admission_rejections_total",
            "Requests refused at the door.",
            ["reason", *self._labels],
            registry=self.registry,
        )
        for reason in REJECTION_REASONS:
            self._rejections.labels(reason=reason, **self._labels)

    def _define_request_metrics(self, max_context: int) -> None:
        finished = Counter(
            "vllm:request_success_total",
            "Finished requests, by reason.",
            ["finished_reason", *self._labels],
            registry=self.registry,
        )
        self._finished = {
            reason: finished.labels(finished_reason=reason, **self._labels) for reason in FINISHED_REASONS
        }
        self._prompt_tokens = self._counter("vllm:prompt_tokens_total", "Prompt tokens computed or reused.")
        self._generation_tokens = self._counter("vllm:generation_tokens_total", "Tokens generated.")
        bounds = [step * 10**power for power in range(8) for step in (1, 2, 5) if step * 10**power <= max_context]
        self._request_prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Tokens of a request's prompt.", bounds
        )
        self._request_generation_tokens = self._histogram(
            "vllm:request_generation_tokens", "Tokens generated for a request.", bounds
        )
        self._ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token, queue included.", TTFT_SECONDS
        )
        self._token_gap = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a request.", TOKEN_SECONDS
        )
        self._time_per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "A request's mean time per token but the first.",
            TOKEN_SECONDS,
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to end.", LATENCY_SECONDS)
        self._queue_time = self._histogram(
            "vllm:request_queue_time_seconds", "Arrival to first scheduled.", LATENCY_SECONDS
        )
        self._prefill_time = self._histogram(
            "vllm:request_prefill_time_seconds", "First scheduled to first token.", LATENCY_SECONDS
        )
        self._decode_time = self._histogram(
            "vllm:request_decode_time_seconds", "First token to last token.", LATENCY_SECONDS
        )
        self._inference_time = self._histogram(
            "vllm:request_inference_time_seconds", "First scheduled to last token.", LATENCY_SECONDS
        )
