"""The drain, rehearsed: a server is told to stop while requests are in flight, and every one must be finished.

What a rolling update does to a pod. Half of the requests come by HTTP, half by gRPC; each has begun to answer when the
signal is sent.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from deploy.container import Ports, ready, tail
from deploy.errors import DeployError
from proto import inference_pb2 as pb
from proto import inference_pb2_grpc

PROMPT = "Once upon a time"
SECONDS = 300.0  # for one request, and for the container to end
POLL_SECONDS = 0.005


class Stoppable(Protocol):
    """A container of the docker SDK, as far as the rehearsal goes."""

    def kill(self, signal: str) -> None: ...

    def wait(self, *, timeout: float) -> dict[str, Any]: ...

    def logs(self, *, tail: int) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """`refused_seconds`: from the signal until readiness was off. `seconds`: until the process had ended."""

    finished: int
    refused_seconds: float
    seconds: float

    def text(self) -> str:
        return (
            f"told to stop with {self.finished} requests in flight: all finished, not ready any more after "
            f"{1000 * self.refused_seconds:.0f} ms, ended with status 0 after {self.seconds:.1f} s"
        )


def rehearse(container: Stoppable, ports: Ports, streams: int, tokens: int) -> Rehearsal:
    """Raises DeployError if a request was lost, if readiness stayed on, or if the exit status was not 0."""
    begun = threading.Semaphore(0)
    together = threading.Barrier(streams)
    ask: list[Callable[[], int]] = [
        lambda: by_http(ports.http, tokens, together, begun.release),
        lambda: by_grpc(ports.grpc_address, tokens, together, begun.release),
    ]
    with ThreadPoolExecutor(streams) as pool:
        futures = [pool.submit(ask[number % 2]) for number in range(streams)]
        waiting = streams
        while waiting:
            if begun.acquire(timeout=POLL_SECONDS):
                waiting -= 1
            elif any(future.done() and future.exception() for future in futures):
                raise DeployError(f"a request failed before the server was told to stop: {first_error(futures)}")
        in_flight = sum(not future.done() for future in futures)
        if in_flight < streams:
            raise DeployError(
                f"only {in_flight} of {streams} requests were in flight at once: {first_error(futures)}; "
                "give fewer --streams or more --tokens"
            )
        signalled = time.monotonic()
        container.kill("SIGTERM")
        while ready(ports.http_url):
            time.sleep(POLL_SECONDS)
        refused = time.monotonic() - signalled
    status = container.wait(timeout=SECONDS)["StatusCode"]
    seconds = time.monotonic() - signalled
    lost = [future for future in futures if future.exception() is not None or future.result() != tokens]
    if lost:
        raise DeployError(f"{len(lost)} of {streams} requests were lost: {first_error(lost)}")
    if status != 0:
        raise DeployError(f"the server ended with status {status}; it said: {tail(container)}")
    return Rehearsal(finished=streams, refused_seconds=refused, seconds=seconds)


def first_error(futures: list[Future[int]]) -> str:
    """What the first of them that failed says, or else the first that ended."""
    ended = sorted((future for future in futures if future.done()), key=lambda future: future.exception() is None)
    return str(ended[0].exception() or f"{ended[0].result()} tokens came") if ended else "none has ended"


def by_http(port: int, tokens: int, together: threading.Barrier, begun: Callable[[], None]) -> int:
    """The completion tokens of a stream that ended as it should; connected, it waits for the others to be so too.

    `begun` is called at the first event.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.connect()
        together.wait(SECONDS)
        body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise DeployError(f"HTTP {answer.status}: {answer.read().decode(errors='replace')}")
        counted, done = 0, False
        for number, line in enumerate(line for line in answer if line.startswith(b"data: ")):
            if number == 0:
                begun()
            done = line.strip() == b"data: [DONE]"
            if not done and (usage := json.loads(line[6:]).get("usage")):
                counted = usage["completion_tokens"]
        if not done:
            raise DeployError("a stream broke off")
        return counted
    finally:
        connection.close()


def by_grpc(address: str, tokens: int, together: threading.Barrier, begun: Callable[[], None]) -> int:
    """The same over gRPC."""
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(SECONDS)
        together.wait(SECONDS)
        request = pb.CompletionRequest(prompt=[PROMPT], max_tokens=tokens, ignore_eos=True)
        counted = 0
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        for number, chunk in enumerate(stub.Complete(request, timeout=SECONDS)):
            if number == 0:
                begun()
            counted = chunk.usage.completion_tokens or counted
        return counted
