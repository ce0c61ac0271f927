"""The engine: one thread that owns the model. `step()` is schedule, run, sample, emit, whatever the runner.

Requests come in through `submit`, from any thread, and leave through their own channels: each step's answers are
handed to `deliver` in one list, so that crossing to the event loop costs one wake-up per step. A closed channel is a
cancellation in whatever state. An error in one request ends that request; a failed run ends the requests in it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from serve.engine_metrics import EngineMetrics
from serve.errors import Draining, InternalError, InvalidRequest, Overloaded, TimedOut
from serve.generation import Generation
from serve.plan import Floats, Output, Runner, Segment
from serve.request import Channel, Chunk, FinishReason, Request, TokenLogprob
from serve.sampler import draw, prompt_logprobs, token_logprob
from serve.scheduler import Scheduler, Step
from serve.tokenizer import Tokenizer

log = logging.getLogger("pawl.engine")

Deliver = Callable[[list[tuple[Channel, Chunk]]], None]


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
        return not self._arrivals and self.scheduler.idle

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

    def step(self) -> None:
        """One turn: take arrivals, drop the cancelled, then schedule, run, sample and emit."""
        now = time.monotonic()
        self._accept()
        self._sweep(now)
        step = self.scheduler.schedule(now)
        if step.requests:
            try:
                output = self.runner.run(step.plan)
            except Exception:
                log.exception("a run failed; ending its %d requests", len(step.requests))
                self._fail(step)
            else:
                self.scheduler.advance(step)
                self._sample(step, output)
                seconds = time.monotonic() - now
                self.scheduler.cost.observe(len(step.plan.tokens), seconds, step.num_prompt_tokens, step.scored)
        self._observe(step)
        self._flush()

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
                self._emit(request, Chunk(finish_reason="error", error=_failed(error), usage=request.usage))

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

    def _sample(self, step: Step, output: Output) -> None:
        """Turn wanted rows into tokens and scores. Wanted positions come in the order of the segments."""
        at = hidden_at = 0
        gaps: list[float] = []
        tokens, now, drawn = step.plan.tokens, time.monotonic(), self._draw(step, output)
        for request, segment in zip(step.requests, step.plan.segments, strict=True):
            try:
                if request.embed:
                    hidden_at += segment.count
                    self._embed(request, output.hidden[hidden_at - segment.count : hidden_at])
                    continue
                if segment.scored:
                    at += segment.scored
                    self._score(request, segment, output, output.rows[at - segment.scored : at])
                end = segment.start + segment.count
                num_drafts = segment.past + segment.count - request.length
                if num_drafts >= 0 and not request.generates:
                    self._finish(request, "length", Chunk(prompt_logprobs=request.prompt_logprobs))
                elif num_drafts >= 0:  # else there is more of the prompt to come
                    rows = output.rows[at : at + num_drafts + 1]
                    at += num_drafts + 1
                    self._extend(request, output, rows, tokens[end - num_drafts : end], drawn.get(request), now, gaps)
            except Exception as error:
                log.exception("a request failed", extra={"request_id": request.id})
                self._finish(request, "error", Chunk(error=_failed(error)))
        self.metrics.step_tokens(gaps)

    def _draw(self, step: Step, output: Output) -> dict[Request, int]:
        """What is drawn for the requests that take one token and draw it from a row as it is: all in one go."""
        row_of = dict(zip(step.plan.wanted, output.rows, strict=True))
        found = [
            (request, row_of[segment.start + segment.count - 1])
            for request, segment in zip(step.requests, step.plan.segments, strict=True)
            if request.generates
            and segment.past + segment.count == request.length
            and self._generations[request].sampler.draws(len(request.output))
        ]
        if not found:
            return {}
        requests, rows = zip(*found, strict=True)
        try:
            tokens = draw(output, rows, [self._generations[request].sampler for request in requests])
        except Exception:
            log.exception("drawing for %d requests failed; each draws alone", len(requests))
            return {}
        return dict(zip(requests, tokens, strict=True))

    def _extend(
        self,
        request: Request,
        output: Output,
        rows: Sequence[int],
        drafts: list[int],
        drawn: int | None,
        now: float,
        gaps: list[float],
    ) -> None:
        """Choose a token from the first row, and from the next as long as the token before it is as drafted."""
        sampler = self._generations[request].sampler
        accepted, refused = 0, False
        for row in rows:
            token, chosen = sampler.choose(output, row, len(request.output), drawn)
            if request.watched:
                request.logprob_sum += token_logprob(output, row, token, request.temperature)
            if request.last_token is not None:
                gaps.append(now - request.last_token)
            request.first_token = request.first_token or now
            request.last_token = now
            self._append(request, token, chosen)
            if accepted == len(drafts):
                break
            refused = token != drafts[accepted]
            if refused or request.finish_reason is not None or request.channel.closed:
                break
            accepted += 1
            request.computed += 1
        if drafts and request.speculation is not None:
            request.speculation.judge(accepted, refused)
            self.metrics.speculation(len(drafts), accepted)

    def _append(self, request: Request, token: int, chosen: TokenLogprob | None) -> None:
        """A new token: spell it, look for a reason to stop, answer."""
        text, reason = self._generations[request].append(token)
        chunk = Chunk(text, [token], [chosen] if chosen else [])
        if len(request.output) == 1:
            chunk.prompt_logprobs = request.prompt_logprobs
        if reason is None:
            self._emit(request, chunk)
        else:
            self._finish(request, reason, chunk)

    @staticmethod
    def _score(request: Request, segment: Segment, output: Output, rows: Sequence[int]) -> None:
        """Tell the log-probabilities of the prompt's tokens that follow the segment's scored positions."""
        assert request.params.prompt_logprobs is not None
        tokens = request.span(segment.past + 1, segment.past + 1 + segment.scored)
        request.prompt_logprobs += prompt_logprobs(output, rows, tokens, request.params.prompt_logprobs)

    def _embed(self, request: Request, hidden: Floats) -> None:
        """Add a chunk's hidden states, [count, hidden]; after the last one answer with their normed mean."""
        before = np.zeros(hidden.shape[1]) if request.hidden_sum is None else request.hidden_sum
        request.hidden_sum = np.vstack([before, hidden]).sum(axis=0)  # row by row: the same bits for any chunks
        if not request.prefilling:
            vector = request.hidden_sum / (np.linalg.norm(request.hidden_sum) or 1.0)
            self._finish(request, "stop", Chunk(embedding=vector.tolist()))

    def _fail(self, step: Step) -> None:
        for request in step.requests:
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


def _failed(error: Exception) -> InternalError:
    return InternalError(f"the request failed inside the server: {error}")
