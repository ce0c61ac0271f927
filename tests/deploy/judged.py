"""Judgements in the making: an interaction, and what somebody says of it."""

from __future__ import annotations

from itertools import count
from typing import Any

from proto.records import Feedback, Interaction
from serve.store import Judged

_NUMBERS = count(1)


def interaction(**fields: Any) -> Interaction:
    number = next(_NUMBERS)
    given = {
        "id": f"chat-{number}",
        "created": "2026-11-21T12:00:00.000Z",
        "model": "m",
        "model_digest": "0" * 64,
        "endpoint": "chat",
        "messages": [{"role": "user", "content": f"What is {number} plus {number}?"}],
        "completion": f"I would guess {number * 2 + 1}.",
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "cached_tokens": 0,
        "ttft_seconds": 0.1,
        "duration_seconds": 0.2,
        "finish_reason": "stop",
        "request_id": "r",
    }
    return Interaction(**(given | fields))


def judge(
    value: bool | float | str, metric: str = "", of: Interaction | None = None, source: str | None = "a"
) -> Judged:
    """A thumb, a score (a float), or a correction (a text) of an interaction of its own, unless one is given."""
    number = next(_NUMBERS)
    kind = "thumbs_up" if isinstance(value, bool) else "demonstration" if isinstance(value, str) else "score"
    judged = of or interaction()
    feedback = Feedback(
        id=f"feedback-{number}",
        created="2026-11-21T12:00:01.000Z",
        inference_id=judged.id,
        metric_name=metric or kind,
        value=value,
        source=source,
    )
    return Judged(number, feedback, judged)
