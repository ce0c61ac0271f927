"""From timed answers to vLLM's figures, with vLLM's meanings and JSON keys.

TTFT: first streamed chunk with choices - send. ITL: gaps between successive chunks, pooled over requests. TPOT: per
request (last chunk - first chunk) / (tokens - 1). Token counts are the server's own `usage`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from bench.connection import BadAnswer, Exchange


@dataclass(slots=True)
class Timing:
    """One answered request: token counts, and when each chunk came, seconds after the send."""

    prompt_tokens: int
    output_tokens: int
    arrivals: list[float] = field(default_factory=list)


def read(exchange: Exchange) -> Timing:
    """Raises BadAnswer for anything but a whole answer with usage."""
    arrivals: list[float] = []
    usage: dict[str, Any] | None = None
    for arrival, data in exchange.events():
        if data == b"[DONE]":
            continue
        event = msgspec.json.decode(data)
        if "error" in event:
            raise BadAnswer(str(event["error"])[:200])
        if event.get("choices"):
            arrivals.append(arrival - exchange.sent)
        usage = event.get("usage") or usage
    if usage is None or not arrivals:
        raise BadAnswer("the stream ended without usage or without tokens")
    return Timing(usage["prompt_tokens"], usage["completion_tokens"], arrivals)


def score(exchanges: list[Exchange], duration: float) -> dict[str, Any]:
    """The figures of one run of `duration` seconds."""
    timings: list[Timing] = []
    errors: Counter[str] = Counter()
    for exchange in exchanges:
        try:
            timings.append(read(exchange))
        except (BadAnswer, msgspec.DecodeError, KeyError) as error:
            errors[str(error)] += 1
    prompts, outputs = (sum(getattr(t, key) for t in timings) for key in ("prompt_tokens", "output_tokens"))
    first = [t.arrivals[0] for t in timings]
    gaps = [gap for t in timings for gap in np.diff(t.arrivals).tolist()]
    per_token = [(t.arrivals[-1] - t.arrivals[0]) / (t.output_tokens - 1) for t in timings if t.output_tokens > 1]
    return {
        "duration": duration,
        "completed": len(timings),
        "failed": len(exchanges) - len(timings),
        "total_input_tokens": prompts,
        "total_output_tokens": outputs,
        "request_throughput": len(timings) / duration,
        "output_throughput": outputs / duration,
        "total_token_throughput": (prompts + outputs) / duration,
        **_spread("ttft", first),
        **_spread("tpot", per_token),
        **_spread("itl", gaps),
        **_spread("e2el", [t.arrivals[-1] for t in timings]),
        "errors": dict(errors),
    }


def _spread(name: str, seconds: list[float]) -> dict[str, float]:
    values = np.array(seconds or [0.0]) * 1e3
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        f"p99_{name}_ms": float(np.percentile(values, 99)),
    }
