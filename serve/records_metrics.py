"""What Prometheus sees of the records, read from their counts when it asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.records import Records


class RecordsCollector(Collector):
    """To be registered beside the server's other metrics."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def collect(self) -> Iterable[Metric]:
        records, counts = self._records, self._records.counts
        written = CounterMetricFamily("pawl_records_written", "Records that are durable.", labels=["kind"])
        written.add_metric(["interaction"], counts.interactions)
        written.add_metric(["feedback"], counts.feedback)
        yield written
        for name, help, value in (
            ("pawl_interactions_lost", "Interactions that could not be recorded.", counts.lost),
            ("pawl_feedback_refused", "Feedback that could not be stored.", counts.refused),
            ("pawl_records_failures", "Batches that the store did not take.", counts.failures),
            ("pawl_records_expired", "Rows deleted or emptied because of their age.", counts.expired),
        ):
            yield CounterMetricFamily(name, help, value=value)
        gauges: tuple[tuple[str, str, float], ...] = (
            ("pawl_records_queue", "Records that wait for the store.", records.queued),
            ("pawl_records_queue_bytes", "Their size.", records.queue_bytes),
            ("pawl_records_bytes", "The store's size, log included.", counts.store_bytes),
            ("pawl_records_last_write_seconds", "When records were last written, in Unix time.", counts.last_write),
            ("pawl_records_failing", "1 if the last batch could not be written, else 0.", counts.failing),
        )
        for name, help, level in (*gauges, *self._disk()):
            yield GaugeMetricFamily(name, help, value=level)

    def _disk(self) -> Iterator[tuple[str, str, float]]:
        with suppress(OSError):
            if (found := self._records.store.disk()) is not None:
                yield "pawl_records_disk_free_bytes", "Free space of the disk that the records are on.", found[0]
                yield "pawl_records_disk_bytes", "The size of that disk.", found[1]
