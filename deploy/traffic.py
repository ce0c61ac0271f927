"""What two versions answered and what people said of it, read from the records as values to compare."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, NamedTuple, get_args

from proto.records import DEMONSTRATION, Feedback, Interaction, to_created
from serve.store import Store

Name = Literal["errors", "aborts", "ttft", "token_time", "approval"]
NAMES: tuple[Name, ...] = get_args(Name)
CLOCKS = timedelta(minutes=1)  # by which servers' clocks may differ: records are stored nearly in the order of time
LEAST_SECONDS = 1e-6  # of what has a logarithm


class Value(NamedTuple):
    version: str
    value: float


Streams = dict[Name, list[Value]]


@dataclass(frozen=True, slots=True)
class Traffic:
    """For each figure its values, in the order they came. `since` and `until` are cursors of the interactions."""

    streams: Streams
    since: int
    until: int


@dataclass(slots=True)
class _Person:
    """Who asks: a subject, or where none is named a request. The version is that of the first answer."""

    version: str
    ends: str
    values: dict[Name, list[float]] = field(default_factory=lambda: defaultdict(list))


def read_traffic(
    store: Store, versions: tuple[str, str], began: str, now: str, *, settle_seconds: float, anonymous: bool
) -> Traffic:
    """What the versions answered from `began` to `now`, both written as `created` is. Raises StoreError.

    An error counts at once: `errors` has a value, 0 or 1, for each answer. The others have one for each person, since
    the server gives a person to one version, and one person's answers are more alike than those of many: the mean
    over what was answered, and said of it, in the `settle_seconds` from the first answer. Before that there is no
    value, and afterwards it stays, so that no look changes what an earlier one has seen.

    `aborts` is a share; `ttft` and `token_time` are logarithms of seconds; `approval` is 1 for a liked answer, -1 for
    a disliked or corrected one and 0 for others. Feedback that no API key vouches for counts if `anonymous`.
    """
    streams: Streams = {name: [] for name in NAMES}
    people: dict[str, _Person] = {}
    since = until = seek(store, to_created(datetime.fromisoformat(began) - CLOCKS))
    late = to_created(datetime.fromisoformat(now) + CLOCKS)
    for logged in store.interactions(since):
        answer, until = logged.interaction, logged.sequence
        if answer.created > late:
            break
        if answer.model_digest not in versions or not began <= answer.created <= now:
            continue
        streams["errors"].append(Value(answer.model_digest, answer.finish_reason == "error"))
        who = f"request {answer.request_id}" if answer.subject is None else f"subject {answer.subject}"
        if (person := people.get(who)) is None:
            ends = datetime.fromisoformat(answer.created) + timedelta(seconds=settle_seconds)
            person = people[who] = _Person(answer.model_digest, to_created(ends))
        if answer.model_digest == person.version and answer.created <= person.ends:
            said = [f for f in logged.feedback if f.created <= person.ends and (anonymous or f.source is not None)]
            for name, value in figures(answer, said):
                person.values[name].append(value)
    for person in people.values():
        if person.ends <= now:
            for name, values in person.values.items():
                streams[name].append(Value(person.version, math.fsum(values) / len(values)))
    return Traffic(streams, since, until)


def figures(answer: Interaction, said: list[Feedback]) -> Iterator[tuple[Name, float]]:
    """All but `errors`. Times and approval are those of whole answers, since the others have figures of their own."""
    yield "aborts", answer.finish_reason == "abort"
    if answer.finish_reason not in ("stop", "length") or answer.endpoint == "embedding":
        return
    yield "approval", approval(said)
    if answer.ttft_seconds is not None:
        yield "ttft", math.log(max(answer.ttft_seconds, LEAST_SECONDS))
        if answer.completion_tokens > 1:
            each = (answer.duration_seconds - answer.ttft_seconds) / (answer.completion_tokens - 1)
            yield "token_time", math.log(max(each, LEAST_SECONDS))


def approval(said: list[Feedback]) -> int:
    """1, 0 or -1: the last thumb, or any other boolean; a correction says that the answer was not good."""
    if any(feedback.metric_name == DEMONSTRATION for feedback in said):
        return -1
    thumbs = [feedback.value for feedback in said if isinstance(feedback.value, bool)]
    return 0 if not thumbs else 1 if thumbs[-1] else -1


def seek(store: Store, created: str) -> int:
    """A cursor after which the interactions created at that time or later lie, found by bisection."""

    def is_early(cursor: int) -> bool:
        found = next(store.interactions(cursor), None)
        return found is not None and found.interaction.created < created

    low, high = 0, 1
    while is_early(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_early(middle) else (low, middle)
    return low
