"""A real Prometheus and a real node_exporter beside a real server of two versions that has some traffic."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from deploy.snapshot import Snapshot, snapshot
from monitoring import textfile
from monitoring.drift import compare
from monitoring.drift_report import as_metrics as drift_metrics
from monitoring.prometheus_data import Prometheus, PrometheusError
from monitoring.window import read_window
from proto import manifest as artifacts
from proto.manifest import MANIFEST, load
from serve.store import open_store
from tests.monitoring.exported import cycle_gauges
from tests.serve.registries import Registry
from tests.serve.tiny import Server, make_artifact, start_server, stop_server

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 240
CLIENTS = 4
LEAST = 20  # judgements
T = TypeVar("T")


def until(found: Callable[[], T]) -> T:
    """What it gives, as soon as that is something."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not (value := found()):
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.2)
    return value


def make_registry(root: Path) -> Path:
    """A current version, and a candidate of the same weights with a share of the traffic."""
    shutil.copytree(make_artifact(root, measure=True), root / "other")
    manifest = load(root / "other")
    lineage = msgspec.structs.replace(manifest.lineage, command="another")
    (root / "other" / MANIFEST).write_bytes(artifacts.encode(msgspec.structs.replace(manifest, lineage=lineage)))
    registry = Registry(root / "registry")
    current, candidate = registry.take(root / "tiny"), registry.take(root / "other")
    for action, version in (("publish", current), ("promote", current), ("publish", candidate), ("canary", candidate)):
        registry.tell(action, version)  # type: ignore[arg-type]
    registry.point("current", current)
    registry.point("candidate", candidate, share=0.4)
    return registry.root


class Crowd:
    """Clients of a server, each asking without a pause until they are told to leave, and judging what they got."""

    def __init__(self, server: Server) -> None:
        self._url = server.http_url
        self._leaving = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        for count in itertools.count():
            if self._leaving.is_set():
                return
            said = "one two three four five six seven eight " * (1 + count % 3)
            body = {
                "messages": [{"role": "system", "content": "Count."}, {"role": "user", "content": said}],
                "max_tokens": 4 + 5 * (count % 9),
                "temperature": 0,
                "user": f"user {number} {count}",
            }
            answer = self._post("/v1/chat/completions", body)
            judgement: dict[str, Any] = {"metric_name": "thumbs", "value": count % 4 > 0}
            if count % 5 == 4:
                judgement = {"metric_name": "demonstration", "value": "one two"}
            self._post("/v1/feedback", {"inference_id": answer["id"], **judgement})

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def program(*words: object) -> Iterator[None]:
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def watched(root: Path) -> Iterator[tuple[Server, Prometheus]]:
    """The server and its Prometheus, which asks every three seconds, both under load until the end."""
    registry = make_registry(root)
    gauges = root / "gauges"
    gauges.mkdir()
    textfile.write(gauges / "retrain.prom", cycle_gauges(root / "cycles"))
    server = start_server(registry, root / "records.sqlite", "--model-name", "tiny", how="--registry")
    with ExitStack() as stack:
        stack.callback(stop_server, server)
        crowd = Crowd(server)
        stack.callback(crowd.leave)
        node, port = f"127.0.0.1:{free_port()}", free_port()
        stack.enter_context(
            program(
                "prometheus-node-exporter", f"--web.listen-address={node}", f"--collector.textfile.directory={gauges}"
            )
        )
        config = yaml.safe_load((ROOT / "monitoring/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "3s", "scrape_timeout": "3s", "evaluation_interval": "3s"}
        config["rule_files"] = [str(ROOT / "monitoring/rules/*.yaml")]
        config["alerting"] = {}
        targets = {"pawl": server.http_url.removeprefix("http://"), "node": node}
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
        (root / "prometheus.yml").write_text(yaml.safe_dump(config))
        stack.enter_context(
            program(
                "prometheus",
                f"--config.file={root / 'prometheus.yml'}",
                f"--storage.tsdb.path={root / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            )
        )
        prometheus = Prometheus(f"http://127.0.0.1:{port}", window="30s", seconds=180)
        until(lambda: judged(root) and reachable(prometheus))
        snapshot(Snapshot(output=root / "snapshot", records=str(server.records), unjudged=True))
        window = read_window(root / "snapshot")
        textfile.write(gauges / "drift.prom", drift_metrics(compare(window, window), window))
        until(lambda: prometheus.read("pawl_drift_drifted"))
        yield server, prometheus


def judged(root: Path) -> bool:
    """Whether enough was said to compare."""
    return len(list(itertools.islice(open_store(str(root / "records.sqlite")).scan(), LEAST))) == LEAST


def reachable(prometheus: Prometheus) -> bool:
    try:
        return len(prometheus.read("up == 1")) == 2
    except PrometheusError:
        return False
