"""The server's life: load, start, serve, drain.

1 open the verified artifact's session; 2 start the engine and the records; 3 open both ports; 4 say so in one
line; 5 wait for SIGINT or SIGTERM; 6 refuse new work, finish the accepted, write the records, exit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from dataclasses import replace

from proto.manifest import Manifest
from serve.choices import MIB, Choices, choose
from serve.engine import Engine
from serve.forms import Form, pick
from serve.grpc_api import start_grpc
from serve.http_api import start_http
from serve.metrics import Metrics
from serve.records import Records
from serve.records_metrics import RecordsCollector
from serve.redactor import Redactor
from serve.request import Channel, Chunk
from serve.retention import Retention
from serve.service import Service
from serve.settings import Settings
from serve.store import open_store
from serve.tokenizer import Tokenizer

log = logging.getLogger("pawl.server")

GIL_SWITCH_SECONDS = 0.0005  # the engine's few microseconds between runs must not wait for the event loop's work


def make_engine(
    settings: Settings,
    manifest: Manifest,
    form: Form,
    choices: Choices,
    tokenizer: Tokenizer,
    metrics: Metrics,
    loop: asyncio.AbstractEventLoop,
) -> Engine:
    """The engine over the graph in this form, answering on `loop`."""

    def dispatch(batch: list[tuple[Channel, Chunk]]) -> None:
        for channel, chunk in batch:
            channel.send(chunk)

    def deliver(batch: list[tuple[Channel, Chunk]]) -> None:
        loop.call_soon_threadsafe(dispatch, batch)

    session = form.open(settings.model, choices.threads)
    runner, scheduler = form.build(session, manifest, settings, choices)
    return Engine(
        runner,
        scheduler,
        tokenizer,
        metrics,
        deliver,
        eos_token_ids=tuple(manifest.architecture.eos_token_ids),
        vocab_size=manifest.architecture.vocab_size,
        request_timeout_seconds=settings.request_timeout_seconds,
    )


def describe(manifest: Manifest, settings: Settings, form: Form, choices: Choices) -> str:
    """What is served and what was chosen, in one line."""
    return (
        f"{settings.model_name or manifest.name} (recipe {manifest.recipe.name}, {form.phrase}), "
        f"{choices.threads} threads ({choices.threads_why}), {choices.num_slots} slots ({choices.slots_why}) of "
        f"{choices.max_context} tokens, KV budget {choices.kv_bytes // MIB} MiB {choices.block.type}"
    )


async def run(settings: Settings, manifest: Manifest, began: float) -> int:
    """Serve a verified artifact until a signal comes; returns the exit status. `began` is on the monotonic clock."""
    sys.setswitchinterval(GIL_SWITCH_SECONDS)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    settings = replace(settings, api_key=settings.api_key or os.environ.get("PAWL_API_KEY", ""))

    form = pick(settings.form, manifest)
    choices = choose(settings, manifest, form)
    tokenizer = Tokenizer(settings.model)
    metrics = Metrics(manifest, settings.model_name or manifest.name, choices)
    records = Records(
        open_store(settings.records),
        Redactor(settings.redact),
        Retention(settings.keep_content_days, settings.keep_metadata_days, settings.derived),
    )
    metrics.registry.register(RecordsCollector(records))
    engine = make_engine(settings, manifest, form, choices, tokenizer, metrics, loop)
    service = Service(engine, tokenizer, records, metrics, manifest, settings, max_context=choices.max_context)
    records.start()
    engine.start()
    http = await start_http(service, settings)
    grpc = await start_grpc(service, settings)
    print(
        f"ready in {time.monotonic() - began:.1f} s: http://{settings.host}:{http.port} and "
        f"grpc://{settings.host}:{grpc.port} serve {describe(manifest, settings, form, choices)}",
        flush=True,
    )
    await stop.wait()

    log.info("draining: finishing what was accepted, refusing what comes")
    await grpc.set_draining()
    finished = await asyncio.to_thread(engine.drain, settings.drain_seconds)
    await asyncio.gather(http.stop(), grpc.stop())
    service.close()
    await records.close()
    print("drained" if finished else f"stopped after {settings.drain_seconds:g} s with requests unfinished", flush=True)
    return 0 if finished else 1
