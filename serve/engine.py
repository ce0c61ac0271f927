"""The engine: one thread that owns the model. `step()` is schedule, run, sample, emit, whatever the runner.

With a runner that guesses, what is sampled and emitted is the run before: the device computes meanwhile.

Requests come in through `submit`, from any thread, and leave through their own channels: each step's answers are
handed to `deliver` in one list, so that crossing to the event loop costs one wake-up per step. A closed channel is a
cancellation in whatever state. An error in one request ends that request; a failed run ends the requests in it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from serve.engine_metrics import EngineMetrics
from serve.errors import Draining, InternalError, InvalidRequest, Overloaded, TimedOut
from serve.generation import Generation
from serve.landing import Landing, failed
from serve.plan import Output, Runner
from serve.request import Channel, Chunk, FinishReason, Request
from serve.scheduler import Scheduler, Step
from serve.tokenizer import Tokenizer

log = logging.getLogger("pawl.engine")

Deliver = Callable[[list[tuple[Channel, Chunk]]], None]


@dataclass(frozen=True, slots=True)
class Flight:
    """A run that was launched at `began`, monotonic seconds; `wait` gives its results."""

    step: Step
    wait: Callable[[], Output]
    began: float


class Engine:
    """Runs requests on a runner. `start` makes the thread; tests may call `step` themselves instead."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        metrics: EngineMetrics,
        deliver: Deliver,
        *,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        request_timeout_seconds: float,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.deliver = deliver
        self.eos_token_ids = eos_token_ids
        self.vocab_size = vocab_size
        self.request_timeout_seconds = request_timeout_seconds
        self._arrivals: deque[Request] = deque()
        self._wake = threading.Condition()
        self._draining = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._generations: dict[Request, Generation] = {}
        self._landing = Landing(scheduler, self._generations, metrics, self._emit, self._finish)
        self._flight: Flight | None = None  # the run that the next step will sample, if the runner guesses
        self._outbox: list[tuple[Channel, Chunk]] = []

    # -- from any thread ----------------------------------------------------------------------------------------

    def submit(self, *requests: Request) -> None:
        """Queue `requests`, all or none; whatever is accepted is answered.

        Raises InvalidRequest, Draining or Overloaded.
        """
        capacity = self.scheduler.cache.capacity
        for request in requests:
            if len(request.prompt) + request.generates > capacity:
                raise InvalidRequest(
                    f"the prompt has {len(request.prompt)} tokens and a request can have {capacity}, completion "
                    "included; shorten it, or start the server with a larger --max-context or --kv-budget-mib"
                )
        with self._wake:
            if self._draining:
                self.metrics.admission_rejected("draining")
                raise Draining("the server is shutting down; send the request to another replica")
            if len(self._arrivals) + len(requests) > self.scheduler.room:
                self.metrics.admission_rejected("queue_full")
                waiting = len(self._arrivals) + len(self.scheduler.waiting)
                raise Overloaded(
                    f"{waiting} requests are waiting and the queue is limited to {self.scheduler.max_queue}; "
                    "try again shortly, or start the server with a larger --max-queue"
                )
            self._arrivals.extend(requests)
            self._wake.notify()

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def idle(self) -> bool:
        return not self._arrivals and self.scheduler.idle and self._flight is None

    @property
    def load(self) -> int:
        return len(self._arrivals) + len(self.scheduler.waiting) + len(self.scheduler.running)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="pawl-engine", daemon=True)
        self._thread.start()

    def drain(self, timeout_seconds: float) -> bool:
        """Refuse new requests, finish the accepted ones, stop. False if some had to be aborted at the timeout."""
        with self._wake:
            self._draining = True
            finished = self._wake.wait_for(lambda: self.idle, timeout_seconds)
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        return finished

    # -- the engine thread --------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            self.runner.prepare()
        except Exception:
            log.exception("the runner could not be prepared; its first run will try again")
        while True:
            with self._wake:
                if self.idle:
                    self.scheduler.cache.check()
                    self._wake.notify_all()  # drain waits for this
                self._wake.wait_for(lambda: not self.idle or self._stopping)
                if self._stopping:
                    break
            self.step()
        self._abort_all()
        del self._landing  # it knows this engine: else the KV cache would stay until garbage is collected

    def step(self) -> None:
        """One turn: take arrivals, drop the cancelled, then schedule, run, sample and emit."""
        now = time.monotonic()
        self._accept()
        self._sweep(now)
        step = self.scheduler.schedule(now)
        flight = self._launch(step, now) if step.requests else None
        if self.runner.guesses:
            flight, self._flight = self._flight, flight
        if flight is not None:
            self._land(flight)
        self._observe(step)
        self._flush()

    def _launch(self, step: Step, now: float) -> Flight | None:
        try:
            if self.runner.guesses:
                self._landing.foretell(step)
            wait = self.runner.launch(step.plan)
        except Exception:
            self._fail(step)
            return None
        self.scheduler.advance(step)
        return Flight(step, wait, now)

    def _land(self, flight: Flight) -> None:
        step = flight.step
        try:
            output = flight.wait()
        except Exception:
            self._fail(step)
            if self._flight is not None:  # what it computes may rest on what failed
                self._fail(self._flight.step)
            return
        self._landing.land(step, output, self._flight.step if self._flight else None)
        seconds = time.monotonic() - flight.began
        self.scheduler.cost.observe(len(step.plan.tokens), seconds, step.num_prompt_tokens, step.scored)

    def _accept(self) -> None:
        while self._arrivals:
            request = self._arrivals.popleft()
            try:
                capacity = self.scheduler.cache.capacity
                self._generations[request] = Generation(
                    request, self.tokenizer, self.vocab_size, self.eos_token_ids, capacity
                )
                self.scheduler.waiting.append(request)
            except Exception as error:
                log.exception("could not prepare a request", extra={"request_id": request.id})
                self._emit(request, Chunk(finish_reason="error", error=failed(error), usage=request.usage))

    def _sweep(self, now: float) -> None:
        for request in list(self.scheduler.requests()):
            if request.channel.closed:
                self._finish(request, "abort", Chunk())
            elif now - request.arrival > self.request_timeout_seconds:
                message = (
                    f"the request timed out after {self.request_timeout_seconds:g} s; ask for fewer tokens, try again "
                    "later, or start the server with a larger --request-timeout-seconds"
                )
                self._finish(request, "error", Chunk(error=TimedOut(message)))

    def _fail(self, step: Step) -> None:
        """End the requests of a run that failed; some may have ended since it began."""
        log.exception("a run failed; ending its %d requests", len(step.requests))
        for request in step.requests:
            if request.finish_reason is not None:
                continue
            if request.table is not None:
                self.scheduler.cache.forget(request.table)
            error = InternalError("the model failed on this batch; see the server's log")
            self._finish(request, "error", Chunk(error=error))

    def _finish(self, request: Request, reason: FinishReason, chunk: Chunk) -> None:
        request.finish_reason = reason
        self.scheduler.remove(request)
        self._generations.pop(request, None)
        self.metrics.request_finished(request, time.monotonic())
        chunk.finish_reason = reason
        chunk.usage = request.usage
        self._emit(request, chunk)

    def _abort_all(self) -> None:
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._land(flight)
        self._accept()
        for request in list(self.scheduler.requests()):
            error = Draining("the server shut down before this request was finished")
            self._finish(request, "abort", Chunk(error=error))
        self._flush()

    def _emit(self, request: Request, chunk: Chunk) -> None:
        self._outbox.append((request.channel, chunk))

    def _flush(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self.deliver(outbox)

    def _observe(self, step: Step) -> None:
        for request in step.admitted:
            self.metrics.prefix_cache(len(request.prompt), request.cached)
        if step.num_preempted:
            self.metrics.preempted(step.num_preempted)
        self.metrics.step(
            tokens=len(step.plan.tokens),
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_usage=self.scheduler.cache.usage,
        )
