"""Sample records, and both databases to keep them in."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from proto.records import Feedback, Interaction, new_id, utc_now
from serve.records import Records

ROOT = Path(__file__).parents[2]
numbers = itertools.count()


def interaction(id: str, *, content: bool = True, **fields: Any) -> Interaction:
    known: dict[str, Any] = {
        "created": utc_now(),
        "endpoint": "chat",
        "messages": [{"role": "user", "content": "hello"}] if content else None,
        "completion": "hi" if content else None,
    }
    return Interaction(
        id=id,
        model="tiny",
        model_digest="0" * 64,
        prompt_tokens=3,
        completion_tokens=1,
        cached_tokens=0,
        ttft_seconds=0.01,
        duration_seconds=0.02,
        finish_reason="stop",
        request_id="r",
        **(known | fields),
    )


def feedback(inference_id: str, *, key: str | None = None, value: bool | float | str = True, **fields: Any) -> Feedback:
    known: dict[str, Any] = {
        "id": new_id("feedback"),
        "created": utc_now(),
        "metric_name": "comment" if isinstance(value, str) else "thumbs",
    }
    return Feedback(inference_id=inference_id, value=value, idempotency_key=key, **(known | fields))


def during(log: Records, body: Callable[[Records], Awaitable[None]]) -> None:
    """Run `body` on a started log and close it."""

    async def run() -> None:
        log.start()
        try:
            await body(log)
        finally:
            await log.close()

    asyncio.run(run())
