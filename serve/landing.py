"""Landing: from a run's results to tokens, scores and embeddings, and to what each request is told of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from serve.engine_metrics import EngineMetrics
from serve.errors import InternalError
from serve.generation import Generation
from serve.plan import Floats, Output, Segment
from serve.request import Chunk, FinishReason, Request
from serve.sampler import draw, prompt_logprobs, token_logprob
from serve.scheduler import Scheduler, Step

log = logging.getLogger("pawl.engine")

Emit = Callable[[Request, Chunk], None]
Finish = Callable[[Request, FinishReason, Chunk], None]


class Landing:
    """An engine's, on its thread. An error in one request ends that request."""

    def __init__(
        self,
        scheduler: Scheduler,
        generations: Mapping[Request, Generation],
        metrics: EngineMetrics,
        emit: Emit,
        finish: Finish,
    ) -> None:
        self._scheduler = scheduler
        self._generations = generations
        self._metrics = metrics
        self._emit = emit
        self._finish = finish

    def foretell(self, step: Step) -> None:
        """Tell the plan what the draw from each wanted position will take, so that the runner can guess it."""
        plan = step.plan
        plan.shares, plan.top_ps = [0.0] * len(plan.wanted), [1.0] * len(plan.wanted)
        at = 0
        for request, segment in zip(step.requests, plan.segments, strict=True):
            at += segment.scored
            ahead = request in step.ahead
            if request.generates and (ahead or segment.past + segment.count == request.length):
                sampler = self._generations[request].sampler
                plan.shares[at] = sampler.share(len(request.output) + ahead)
                plan.top_ps[at] = request.params.top_p
                at += 1

    def land(self, step: Step, output: Output, later: Step | None) -> None:
        """Turn what `step` computed into tokens and scores; `later` was launched behind it."""
        hidden_at = 0
        gaps: list[float] = []
        now = time.monotonic()
        row_of = dict(zip(step.plan.wanted, output.rows, strict=True))
        drawn = self._draw(step, output, row_of)
        for request, segment, counts in step.results():
            if request.embed:
                hidden_at += segment.count
            if not counts:
                continue
            try:
                if request.embed:
                    self._embed(request, segment, output.hidden[hidden_at - segment.count : hidden_at])
                    continue
                if segment.scored:
                    self._score(request, segment, output, row_of)
                num_drafts = segment.past + segment.count - request.length
                if num_drafts < 0:
                    continue  # there is more of the prompt to come
                if not request.generates:
                    self._finish(request, "length", Chunk(prompt_logprobs=request.prompt_logprobs))
                    continue
                end = segment.start + segment.count
                row = row_of[end - num_drafts - 1]
                if num_drafts:
                    rows = [row_of[at] for at in range(end - num_drafts - 1, end)]
                    self._verify(request, output, rows, step.plan.tokens[end - num_drafts : end], now, gaps)
                else:
                    self._extend(request, output, row, now, gaps, drawn.get(request))
                if output.guesses is not None:
                    guessed = bool(output.guesses[row] == request.output[-1])
                    self._scheduler.settle(request, later, guessed=guessed)
            except Exception as error:
                log.exception("a request failed", extra={"request_id": request.id})
                self._finish(request, "error", Chunk(error=failed(error)))
        self._metrics.step_tokens(gaps)

    def _draw(self, step: Step, output: Output, row_of: Mapping[int, int]) -> dict[Request, int]:
        """What is drawn for the requests that take one token and draw it from a row as it is: all in one go."""
        found = [
            (request, row_of[segment.start + segment.count - 1])
            for request, segment, counts in step.results()
            if request.params.temperature
            and counts
            and request.generates
            and segment.past + segment.count == request.length
            and self._generations[request].sampler.draws(len(request.output))
        ]
        if not found:
            return {}
        requests, rows = zip(*found, strict=True)
        samplers = [self._generations[request].sampler for request in requests]
        try:
            tokens = draw(output, rows, samplers, [len(request.output) for request in requests])
        except Exception:
            log.exception("drawing for %d requests failed; each draws alone", len(requests))
            return {}
        return dict(zip(requests, tokens, strict=True))

    def _verify(
        self, request: Request, output: Output, rows: Sequence[int], drafts: list[int], now: float, gaps: list[float]
    ) -> None:
        """Choose a token from the first row, and from the next as long as the token before it is as drafted."""
        accepted, refused = 0, False
        for row in rows:
            token = self._extend(request, output, row, now, gaps)
            if accepted == len(drafts):
                break
            refused = token != drafts[accepted]
            if refused or request.finish_reason is not None or request.channel.closed:
                break
            accepted += 1
            request.computed += 1
        if request.speculation is not None:
            request.speculation.judge(accepted, refused)
            self._metrics.speculation(len(drafts), accepted)

    def _extend(
        self, request: Request, output: Output, row: int, now: float, gaps: list[float], drawn: int | None = None
    ) -> int:
        """Choose a token, unless it was `drawn`; spell it, look for a reason to stop, answer."""
        generation = self._generations[request]
        token, chosen = generation.sampler.choose(output, row, len(request.output), drawn)
        if request.watched:
            request.logprob_sum += token_logprob(output, row, token, request.temperature)
        if request.last_token is None:
            request.first_token = now
        else:
            gaps.append(now - request.last_token)
        request.last_token = now
        text, reason = generation.append(token)
        chunk = Chunk(text, [token], [chosen] if chosen else [])
        if len(request.output) == 1:
            chunk.prompt_logprobs = request.prompt_logprobs
        if reason is None:
            self._emit(request, chunk)
        else:
            self._finish(request, reason, chunk)
        return token

    @staticmethod
    def _score(request: Request, segment: Segment, output: Output, row_of: Mapping[int, int]) -> None:
        """Tell the log-probabilities of the prompt's tokens that follow the segment's scored positions."""
        assert request.params.prompt_logprobs is not None
        rows = [row_of[at] for at in range(segment.start, segment.start + segment.scored)]
        tokens = request.span(segment.past + 1, segment.past + 1 + segment.scored)
        request.prompt_logprobs += prompt_logprobs(output, rows, tokens, request.params.prompt_logprobs)

    def _embed(self, request: Request, segment: Segment, hidden: Floats) -> None:
        """Add a chunk's hidden states, [count, hidden]; after the last one answer with their normed mean."""
        before = np.zeros(hidden.shape[1]) if request.hidden_sum is None else request.hidden_sum
        request.hidden_sum = np.vstack([before, hidden]).sum(axis=0)  # row by row: the same bits for any chunks
        if segment.past + segment.count == len(request.prompt):
            vector = request.hidden_sum / (np.linalg.norm(request.hidden_sum) or 1.0)
            self._finish(request, "stop", Chunk(embedding=vector.tolist()))


def failed(error: Exception) -> InternalError:
    return InternalError(f"the request failed inside the server: {error}")
