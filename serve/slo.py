"""Service level objectives: which requests count for each, and which of them were good. Exact, unlike buckets.

`availability`: of what was accepted, or refused because the queue was full, good is what did not fail. `ttft`: of what
was to generate, good is what had its first token in time. `tpot`: of what generated two tokens or more, good is what
took no longer than the limit for each, on average. Whom the client left in time counts for none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from serve.request import Request

Slo = Literal["availability", "ttft", "tpot"]
SLOS: tuple[Slo, ...] = get_args(Slo)


@dataclass(frozen=True)
class Objectives:
    """`target` is the share of requests, 0 to 1, that are to be good; the others are what a good one keeps within."""

    target: float = 0.99
    ttft_seconds: float = 2.5
    tpot_seconds: float = 0.1

    def judge(self, request: Request, now: float) -> Iterator[tuple[Slo, bool]]:
        """For each objective that a finished request counts for, whether it was good; `now` is monotonic."""
        failed, left = request.finish_reason == "error", request.finish_reason == "abort"
        if not left:
            yield "availability", not failed
        if request.first_token is not None:
            yield "ttft", request.first_token - request.arrival <= self.ttft_seconds
        elif request.generates and (failed or now - request.arrival > self.ttft_seconds):
            yield "ttft", False
        gaps = len(request.output) - 1
        if gaps > 0 and request.first_token is not None and request.last_token is not None:
            yield "tpot", (request.last_token - request.first_token) / gaps <= self.tpot_seconds
