"""What Prometheus scrapes, under vLLM's names, so that dashboards, routers and autoscalers made for it work unchanged.

Our own metrics begin with `pawl_`. All are listed in docs/metrics.md. No label ever names a user or a key. The series
of a version vanish when it leaves the memory.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, get_args

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics

from proto.manifest import Manifest
from proto.records import COMMENT, DEMONSTRATION
from proto.registry import ROLES, Action, Movement
from serve.engine_metrics import EngineGauges, EngineMetrics, Families
from serve.slo import SLOS, Objectives

if TYPE_CHECKING:
    from serve.choices import Choices

FEEDBACK_METRICS = ("thumbs", COMMENT, DEMONSTRATION)  # clients choose names; others share the label "other"
GONE = "gone"  # the label of a version that is not in memory
LABEL_DIGITS = 12


def version_name(digest: str) -> str:
    """A version's short name: the label `version`, and `system_fingerprint` in answers."""
    return digest[:LABEL_DIGITS]


class Metrics:
    """One server's metrics, on a registry of their own. Everything here but `interactions_lost` is the loop's."""

    def __init__(self, model_name: str, objectives: Objectives | None = None) -> None:
        objectives = objectives or Objectives()
        # They double the number of series and nobody reads them.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        self.model_name = model_name
        self._engines: dict[tuple[str, int], EngineMetrics] = {}
        labels = {"model_name": model_name, "engine": "0"}
        self._families = Families(labels, objectives, registry)
        EngineGauges(labels, self._engines, registry)
        ProcessCollector(registry=registry)
        self._http = Counter(
            "http_requests_total", "Answered calls.", ["handler", "method", "status"], registry=registry
        )
        self._feedback = Counter(
            "pawl_feedback_total", "Stored feedback.", ["metric_name", "value", "version"], registry=registry
        )
        names = ["model_name", "version", "model_digest", "recipe", "kv_cache"]
        self._info = Gauge("pawl_info", "Versions in memory; always 1.", names, registry=registry)
        self._shares = Gauge(
            "pawl_version_share", "Share of the traffic that a version gets.", ["version", "role"], registry=registry
        )
        self._in_step = Gauge(
            "pawl_registry_in_step", "1 if the versions that answer are those that are to.", registry=registry
        )
        self._load_failures = Counter(
            "pawl_version_load_failures_total", "Versions that could not be loaded.", registry=registry
        )
        self._decisions = Counter(
            "pawl_decisions_total", "Movements in the registry's history.", ["action"], registry=registry
        )
        self._last_decisions = Gauge(
            "pawl_last_decision_seconds", "When the last of them was made, in Unix time.", ["action"], registry=registry
        )
        for action in get_args(Action):
            self._decisions.labels(action)
            self._last_decisions.labels(action)
        self._in_step.set(1)
        target = Gauge(
            "pawl_slo_target", "Share of the requests that are to be good.", ["model_name", "slo"], registry=registry
        )
        for slo in SLOS:
            target.labels(model_name, slo).set(objectives.target)

    # -- versions -----------------------------------------------------------------------------------------------

    def engine(self, manifest: Manifest, choices: Choices, number: int = 0) -> EngineMetrics:
        """For an engine that begins, one of those of its version."""
        version = version_name(manifest.digest)
        made = self._engines.setdefault((version, number), EngineMetrics(self._families, version, number))
        made.begin(choices)
        self._info.labels(self.model_name, version, manifest.digest, manifest.recipe.name, manifest.kv_cache).set(1)
        for value in ("true", "false"):
            self._feedback.labels("thumbs", value, version)  # from 0, so that the first one is a rise
        return made

    def engine_ended(self, digest: str) -> None:
        """The version's engines are gone; the version may be called back."""
        for engine in self._of(version_name(digest)).values():
            engine.end()

    def _of(self, version: str) -> dict[tuple[str, int], EngineMetrics]:
        return {key: engine for key, engine in self._engines.items() if key[0] == version}

    def forget(self, digest: str) -> None:
        """A version left the memory: so do its series."""
        version = version_name(digest)
        if found := self._of(version):
            for key in found:
                del self._engines[key]
            self._families.forget(version)
            self._info.remove_by_labels({"version": version})
            self._feedback.remove_by_labels({"version": version})

    def roles(self, shares: dict[str, float]) -> None:
        """The share of the traffic, 0 to 1, of each version that answers, by digest; the current one first."""
        self._shares.clear()
        for (digest, share), role in zip(shares.items(), ROLES, strict=False):
            self._shares.labels(version_name(digest), role).set(share)

    def in_step(self, whether: bool) -> None:
        """Whether what the registry names is what answers."""
        self._in_step.set(whether)

    def load_failed(self) -> None:
        """A version could not be loaded."""
        self._load_failures.inc()

    def moved(self, movement: Movement) -> None:
        """A line of the registry's history."""
        self._decisions.labels(movement.action).inc()
        self._last_decisions.labels(movement.action).set(datetime.fromisoformat(movement.time).timestamp())

    # -- any thread ---------------------------------------------------------------------------------------------

    def http(self, handler: str, method: str, status: int) -> None:
        """A call was answered. The adapters see to it that `handler` and `method` are of a bounded set."""
        self._http.labels(handler, method, f"{status // 100}xx").inc()

    def feedback(self, metric_name: str, value: bool | float | str, version: str) -> None:
        """A feedback was stored, on an answer of `version`, a short name."""
        kind = str(value).lower() if isinstance(value, bool) else "text" if isinstance(value, str) else "number"
        name = metric_name if metric_name in FEEDBACK_METRICS else "other"
        self._feedback.labels(name, kind, version if self._of(version) else GONE).inc()

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The body and the content type for a scraper's Accept header: Prometheus' text, or OpenMetrics if asked."""
        encode, content_type = choose_encoder(accept)
        if "openmetrics" in content_type:
            # Any other escaping of prometheus_client 0.26 makes `vllm_` of samples' `vllm:`. Our names need none.
            body: bytes = openmetrics.generate_latest(self.registry, openmetrics.ALLOWUTF8)  # type: ignore[no-untyped-call]
            return body, openmetrics.CONTENT_TYPE_LATEST
        return encode(self.registry), content_type
