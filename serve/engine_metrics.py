"""What one version's engine tells of itself and of the requests that it answered, under vLLM's names.

The histograms are written by the engine thread alone, the counters by any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.histogram import Histogram, Series
from serve.request import Request
from serve.slo import SLOS, Objectives, Slo

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


class Families:
    """The families of all versions' counters and histograms, each made when its first series is."""

    def __init__(self, labels: dict[str, str], objectives: Objectives, registry: CollectorRegistry) -> None:
        """`labels` are those that every series has, before `version`."""
        self.labels = labels
        self.objectives = objectives
        self.registry = registry
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}

    def counter(self, name: str, help: str, version: str, engine: int, **more: str) -> Counter:
        labels = more | self._labels(version, engine)
        if name not in self._counters:
            self._counters[name] = Counter(name, help, list(labels), registry=self.registry)
        return self._counters[name].labels(**labels)

    def histogram(self, name: str, help: str, version: str, engine: int, bounds: Sequence[float]) -> Series:
        if name not in self._histograms:
            self._histograms[name] = Histogram(name, help, [*self.labels, "version"], self.registry)
        return self._histograms[name].series([*self._labels(version, engine).values()], bounds)

    def _labels(self, version: str, engine: int) -> dict[str, str]:
        return self.labels | {"engine": str(engine), "version": version}

    def forget(self, version: str) -> None:
        """Remove the version's series."""
        for counter in self._counters.values():
            counter.remove_by_labels({"version": version})
        for histogram in self._histograms.values():
            histogram.remove("version", version)


class EngineMetrics:
    """One version's. Its state counts in the server's gauges while `choices` are those of a running engine."""

    def __init__(self, families: Families, version: str, number: int = 0) -> None:
        self.choices: Choices | None = None
        self.running = 0
        self.waiting = 0
        self.kv_usage = 0.0
        self.families = families
        self._version = version
        self._number = number

    def begin(self, choices: Choices) -> None:
        """An engine was made. Series that an earlier one of this version left are continued."""
        self.choices = choices
        self._define_engine_metrics()
        self._define_request_metrics(choices.max_context)

    def end(self) -> None:
        """The engine is gone, its series stay."""
        self.choices = None
        self.running, self.waiting, self.kv_usage = 0, 0, 0.0

    # -- the engine thread --------------------------------------------------------------------------------------

    def step(self, tokens: int, running: int, waiting: int, kv_usage: float) -> None:
        """After each step: the tokens computed in it, if any, and how things stand. `kv_usage` is from 0 to 1."""
        if tokens:
            self._step_tokens.observe(tokens)
        self.running, self.waiting, self.kv_usage = running, waiting, kv_usage

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
        for slo, good in self.families.objectives.judge(request, now):
            self._judged(slo, good)
        self._e2e.observe(now - request.arrival, request.id)
        self._request_prompt_tokens.observe(len(request.prompt))
        # Whoever has answered had its prompt computed, even if it lost that when it was put back into the queue.
        self._prompt_tokens.inc(len(request.prompt) if request.output else min(request.computed, len(request.prompt)))
        if request.first_scheduled is None:
            return
        self._queue_time.observe(request.first_scheduled - request.arrival, request.id)
        if request.first_token is None or request.last_token is None:  # none was wanted, or ended in its prefill
            if not request.generates:
                self._inference_time.observe(now - request.first_scheduled)
            return
        num_tokens = len(request.output)
        self._generation_tokens.inc(min(num_tokens, 1))  # the first; `step_tokens` counts the others
        self._request_generation_tokens.observe(num_tokens)
        self._request_max_generation_tokens.observe(num_tokens)
        self._ttft.observe(request.first_token - request.arrival, request.id)
        self._prefill_time.observe(request.first_token - request.first_scheduled)
        self._decode_time.observe(request.last_token - request.first_token)
        self._inference_time.observe(request.last_token - request.first_scheduled)
        if num_tokens > 1:
            self._time_per_token.observe((request.last_token - request.first_token) / (num_tokens - 1), request.id)

    # -- any thread ---------------------------------------------------------------------------------------------

    def admission_rejected(self, reason: str) -> None:
        """A request was refused at the door."""
        self._rejections[reason].inc()
        if reason == "queue_full":
            self._judged("availability", False)

    def _judged(self, slo: Slo, good: bool) -> None:
        self._slo_requests[slo].inc()
        self._slo_good[slo].inc(good)

    # -- names --------------------------------------------------------------------------------------------------

    def _counter(self, name: str, help: str, **more: str) -> Counter:
        return self.families.counter(name, help, self._version, self._number, **more)

    def _histogram(self, name: str, help: str, bounds: Sequence[float]) -> Series:
        return self.families.histogram(name, help, self._version, self._number, bounds)

    def _define_engine_metrics(self) -> None:
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
        self._rejections = {
            reason: self._counter("vllm:admission_rejections_total", "Requests refused at the door.", reason=reason)
            for reason in REJECTION_REASONS
        }
        text = "Requests that count for a service level objective."
        self._slo_requests = {slo: self._counter("pawl_slo_requests_total", text, slo=slo) for slo in SLOS}
        self._slo_good = {slo: self._counter("pawl_slo_good_total", "Those that were good.", slo=slo) for slo in SLOS}

    def _define_request_metrics(self, max_context: int) -> None:
        self._finished = {
            reason: self._counter("vllm:request_success_total", "Finished requests, by reason.", finished_reason=reason)
            for reason in FINISHED_REASONS
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
        self._request_max_generation_tokens = self._histogram(
            "vllm:request_max_num_generation_tokens", "The same; each answer is a request of its own.", bounds
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


class EngineGauges(Collector):
    """How the running engines stand, summed up: routers and autoscalers look at one number per server."""

    def __init__(
        self, labels: dict[str, str], engines: Mapping[tuple[str, int], EngineMetrics], registry: CollectorRegistry
    ) -> None:
        self._labels = labels
        self._engines = engines
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        running = [(engine, engine.choices) for engine in self._engines.values() if engine.choices is not None]
        tokens = [choices.num_blocks * choices.block.tokens for _, choices in running]
        used = sum(engine.kv_usage * held for (engine, _), held in zip(running, tokens, strict=True))
        yield self._gauge("vllm:num_requests_running", "Requests that run.", sum(e.running for e, _ in running))
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait.", sum(e.waiting for e, _ in running))
        help = "Share of the KV cache in use, 0 to 1."
        yield self._gauge("vllm:kv_cache_usage_perc", help, used / (sum(tokens) or 1))
        if running:
            # The product is what the cache holds in tokens, as vLLM's readers expect.
            size = running[0][1].block.tokens
            shape = {"block_size": str(size), "num_gpu_blocks": str(sum(tokens) // size)}
            help = "Tokens per block of the KV cache and number of blocks; always 1."
            yield self._gauge("vllm:cache_config_info", help, 1, shape | self._labels)
        for name, help, total in (
            ("pawl_kv_cache_bytes", "Memory of the KV cache.", sum(choices.kv_bytes for _, choices in running)),
            ("pawl_slots", "Requests that can be decoded together.", sum(choices.num_slots for _, choices in running)),
        ):
            yield self._gauge(name, help, total, {})

    def _gauge(self, name: str, help: str, value: float, labels: dict[str, str] | None = None) -> Metric:
        labels = self._labels if labels is None else labels
        family = GaugeMetricFamily(name, help, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family
