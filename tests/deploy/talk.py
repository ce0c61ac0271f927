"""Simulated people who talk to two versions, in real records, at a time that a test sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import numpy as np

from proto.records import Feedback, Interaction, to_created
from serve.store import Store

_NUMBERS = count(1)


@dataclass
class Clock:
    """Says what `utc_now` says."""

    moment: datetime = field(default_factory=lambda: datetime(2026, 11, 21, 12, tzinfo=UTC))

    def __call__(self) -> str:
        return to_created(self.moment)

    def later(self, seconds: float) -> str:
        self.moment += timedelta(seconds=seconds)
        return self()


@dataclass
class Behaviour:
    """Of a version: how often it fails, how long it takes, and how many of those who judge its answers like them."""

    errors: float = 0.0
    slower: float = 1.0
    liked: float = 0.5


def answer(version: str, created: str, **fields: Any) -> Interaction:
    number = next(_NUMBERS)
    given: dict[str, Any] = {
        "id": f"chat-{number}",
        "created": created,
        "model": "m",
        "model_digest": version,
        "endpoint": "chat",
        "prompt_tokens": 9,
        "completion_tokens": 11,
        "cached_tokens": 0,
        "ttft_seconds": 0.1,
        "duration_seconds": 0.6,
        "finish_reason": "stop",
        "subject": f"person-{number}",
        "request_id": f"r-{number}",
    }
    return Interaction(**(given | fields))


def said(of: Interaction, created: str, value: bool | float | str, metric: str = "thumbs", **fields: Any) -> Feedback:
    number = next(_NUMBERS)
    given = {"id": f"feedback-{number}", "inference_id": of.id, "metric_name": metric, "source": "key"}
    return Feedback(created=created, value=value, **(given | fields))


def talk(store: Store, clock: Clock, people: int, *, seed: int, share: float, versions: dict[str, Behaviour]) -> None:
    """People come a second after each other; the first version is current, the second on trial with the share.

    All that get an answer judge it. Time goes on until what they said is settled.
    """
    random = np.random.default_rng(seed)
    names: Sequence[str] = list(versions)
    batch: list[Interaction | Feedback] = []
    for _ in range(people):
        version = names[int(random.random() < share)]
        does = versions[version]
        created = clock.later(1)
        if random.random() < does.errors:
            batch.append(answer(version, created, finish_reason="error", ttft_seconds=None, completion_tokens=0))
            continue
        ttft, each = np.exp(random.normal((-2, -4), (0.5, 0.3))) * does.slower
        one = answer(version, created, ttft_seconds=float(ttft), duration_seconds=float(ttft + 10 * each))
        batch += [one, said(one, created, bool(random.random() < does.liked))]
    store.append(batch)
    clock.later(600)
