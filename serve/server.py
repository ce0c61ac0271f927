"""The server's life: load, start, serve, drain.

1 load the verified artifact; 2 start its engine and the records; 3 open both ports; 4 say so in one line; 5 wait for
SIGINT or SIGTERM, and follow the registry if there is one; 6 refuse new work, finish the accepted, write the records,
exit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from proto.manifest import Manifest
from serve.follower import Follower
from serve.grpc_api import start_grpc
from serve.http_api import start_http
from serve.loader import Loader
from serve.metrics import Metrics
from serve.records import Records
from serve.records_metrics import RecordsCollector
from serve.redactor import Redactor
from serve.retention import Retention
from serve.service import Service
from serve.settings import Settings
from serve.slo import Objectives
from serve.store import open_store
from serve.versions import Versions

log = logging.getLogger("pawl.server")

GIL_SWITCH_SECONDS = 0.0005  # the engine's few microseconds between runs must not wait for the event loop's work


async def run(settings: Settings, directory: Path, manifest: Manifest, began: float) -> int:
    """Serve a verified artifact, and what its registry names later, until a signal comes; returns the exit status.

    `began` is on the monotonic clock.
    """
    sys.setswitchinterval(GIL_SWITCH_SECONDS)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    settings = replace(settings, api_key=settings.api_key or os.environ.get("PAWL_API_KEY", ""))

    objectives = Objectives(settings.slo_target, settings.slo_ttft_seconds, settings.slo_tpot_seconds)
    metrics = Metrics(settings.model_name or manifest.name, objectives)
    records = Records(
        open_store(settings.records),
        Redactor(settings.redact),
        Retention(settings.keep_content_days, settings.keep_metadata_days, settings.derived),
    )
    metrics.registry.register(RecordsCollector(records))
    loader = Loader(settings, metrics, loop)
    current = loader.load(directory, manifest)
    versions = Versions(metrics.model_name, current, metrics, settings.drain_seconds)
    service = Service(versions, records, metrics, settings)
    records.start()
    http = await start_http(service, settings)
    grpc = await start_grpc(service, settings)
    print(
        f"ready in {time.monotonic() - began:.1f} s: http://{settings.host}:{http.port} and "
        f"grpc://{settings.host}:{grpc.port} serve {versions.name} {current.about}",
        flush=True,
    )
    following = None
    if settings.registry is not None:
        following = loop.create_task(Follower(settings.registry, loader, versions, metrics).run())
    await stop.wait()

    log.info("draining: finishing what was accepted, refusing what comes")
    await grpc.set_draining()
    if following is not None:
        following.cancel()
    finished = await versions.drain()
    await asyncio.gather(http.stop(), grpc.stop())
    service.close()
    await records.close()
    print("drained" if finished else f"stopped after {settings.drain_seconds:g} s with requests unfinished", flush=True)
    return 0 if finished else 1
