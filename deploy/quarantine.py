"""Which feedback may be learnt from: whoever can speak to the server can speak to the next model.

Rules look at one judgement after the other, or at all that are left; each that drops some says why. They know no
model, and stop careless and clumsy harm: floods, one text for everything, a source that says the opposite of all
others. What comes through them still has to pass the gate.
"""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from proto.records import COMMENT, DEMONSTRATION, Feedback, Interaction
from serve.store import Judged
from train.decontamination import Index
from train.flags import option

UNFINISHED = ("abort", "error")
MAJORITY = 3
MAD = 1.4826  # times the median absolute deviation is the standard deviation, of a normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a judgement must be to be learnt from."""

    anonymous: bool = option(False, "take feedback that no API key vouches for")
    most_per_source: int = option(500, "judgements of one API key", least=1)
    most_share: float = option(0.5, "of all that is kept from several API keys, by one of them", least=0.01, most=1)
    most_repeats: int = option(3, "different prompts that one text may be the correction for", least=1)
    most_characters: int = option(20_000, "in a correction", least=1)
    longest_ratio: float = option(20.0, "a correction's length to the answer's, either way; short ones pass", least=1)
    same_script: float = option(0.3, "of a correction's letters, in a script that the chat uses", least=0, most=1)
    outlier: float = option(4.0, "deviations of a source's share of thumbs up from the other sources'", least=1)
    least_votes: int = option(20, "thumbs of a source, before that is looked at", least=2)
    ngram: int = option(13, "words in common with a held-out text that make a record contaminated", least=2)


@dataclass(slots=True)
class Sorted:
    """`kept` in their order; `dropped` by reason: the feedback's ids, as its words may have to be erased."""

    kept: list[Judged]
    dropped: dict[str, list[str]] = field(default_factory=dict)


# One judgement -> why it is dropped, or None.
Rule = Callable[[Judged], str | None]
# All that are left -> those to drop, each with the reason.
Review = Callable[[list[Judged]], Iterable[tuple[Judged, str]]]


def quarantine(judged: Iterable[Judged], limits: Limits, held_out: Index) -> Sorted:
    """Apply every rule, those on single judgements first."""
    result = Sorted(list(judged))

    def drop(found: Iterable[tuple[Judged, str]]) -> None:
        reasons = {entry.feedback.id: reason for entry, reason in found}
        for entry in result.kept:
            if (reason := reasons.get(entry.feedback.id)) is not None:
                result.dropped.setdefault(reason, []).append(entry.feedback.id)
        result.kept = [entry for entry in result.kept if entry.feedback.id not in reasons]

    for rule in single_rules(limits, held_out):
        drop([(entry, reason) for entry in result.kept if (reason := rule(entry)) is not None])
    reviews: list[Review] = [superseded, contradictions]
    reviews += [partial(review, limits=limits) for review in (repeats, outliers, floods)]
    for review in reviews:
        drop(review(result.kept))
    return result


def single_rules(limits: Limits, held_out: Index) -> list[Rule]:
    def source(entry: Judged) -> str | None:
        return None if entry.feedback.source or limits.anonymous else "no API key vouches for it"

    def content(entry: Judged) -> str | None:
        interaction = entry.interaction
        has_text = (interaction.messages or interaction.prompt) and interaction.completion is not None
        return None if has_text else "the text it judges is not kept"

    def finished(entry: Judged) -> str | None:
        unfinished = entry.interaction.finish_reason in UNFINISHED and entry.feedback.metric_name != DEMONSTRATION
        return "it judges an answer that was broken off" if unfinished else None

    def length(entry: Judged) -> str | None:
        if (text := correction(entry)) is None:
            return None
        if not text.strip():
            return "the correction is empty"
        if len(text) > limits.most_characters:
            return "the correction is too long"
        answer = max(len(entry.interaction.completion or ""), 200)  # below that, ratios mean little
        ratio = max(len(text), 200) / answer
        return None if 1 / limits.longest_ratio <= ratio <= limits.longest_ratio else "the correction's length is odd"

    def script(entry: Judged) -> str | None:
        if (text := correction(entry)) is None:
            return None
        used = scripts(question(entry.interaction) + (entry.interaction.completion or ""))
        given = scripts(text)
        known = sum(count for name, count in given.items() if name in used)
        odd = bool(given) and bool(used) and known < limits.same_script * given.total()
        return "the correction is in another script" if odd else None

    def unchanged(entry: Judged) -> str | None:
        return "the correction is the answer" if correction(entry) == entry.interaction.completion else None

    def contamination(entry: Judged) -> str | None:
        texts = (question(entry.interaction), entry.interaction.completion or "", correction(entry) or "")
        return "it holds held-out text" if any(held_out.match(text) for text in texts) else None

    return [source, content, finished, length, script, unchanged, contamination]


def superseded(judged: list[Judged]) -> Iterator[tuple[Judged, str]]:
    """Somebody judged again: the last word counts. Comments stand beside each other."""
    last: dict[Hashable, Judged] = {}
    for entry in judged:
        if entry.feedback.metric_name != COMMENT:
            given = entry.feedback
            before = last.get(key := (given.source, given.inference_id, given.metric_name))
            if before is not None:
                yield before, "the same source judged again"
            last[key] = entry


def contradictions(judged: list[Judged]) -> Iterator[tuple[Judged, str]]:
    """Opposite thumbs for one answer, unless one side has MAJORITY times the other's; and the same said twice."""
    said: dict[tuple[str, str, str | None], list[Judged]] = defaultdict(list)
    for entry in judged:
        if entry.feedback.metric_name != COMMENT and not is_score(entry.feedback):
            interaction = entry.interaction
            said[entry.feedback.metric_name, question(interaction), interaction.completion].append(entry)
    for (metric, _, _), entries in said.items():
        values = Counter(entry.feedback.value for entry in entries)
        (most, count), *others = values.most_common()
        if metric != DEMONSTRATION and others:
            decided = count >= MAJORITY * (len(entries) - count)
            losers = [entry for entry in entries if not decided or entry.feedback.value != most]
            yield from ((entry, "others say the opposite of the same answer") for entry in losers)
            entries = [entry for entry in entries if entry not in losers]
        seen: set[object] = set()
        for entry in entries:
            if entry.feedback.value in seen:
                yield entry, "a duplicate"
            seen.add(entry.feedback.value)


def repeats(judged: list[Judged], limits: Limits) -> Iterator[tuple[Judged, str]]:
    """One text as the correction of everything."""
    prompts: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for entry in judged:
        if (text := correction(entry)) is not None:
            prompts[words_of(text)].add(question(entry.interaction))
    for entry in judged:
        if (text := correction(entry)) is not None and len(prompts[words_of(text)]) > limits.most_repeats:
            yield entry, "the same correction for too many prompts"


def outliers(judged: list[Judged], limits: Limits) -> Iterator[tuple[Judged, str]]:
    """Thumbs of sources whose share of thumbs up is far from that of the others, by the median absolute deviation."""
    votes: dict[str | None, list[bool]] = defaultdict(list)
    for entry in judged:
        if isinstance(entry.feedback.value, bool):
            votes[entry.feedback.source].append(entry.feedback.value)
    shares = {source: sum(given) / len(given) for source, given in votes.items() if len(given) >= limits.least_votes}
    if len(shares) < 3:
        return  # of two that differ, either may be the odd one
    odd = set()
    for source, share in shares.items():
        others = [value for name, value in shares.items() if name != source]
        middle = statistics.median(others)
        spread = MAD * statistics.median(abs(value - middle) for value in others)
        chance = (max(middle * (1 - middle), 0.01) / len(votes[source])) ** 0.5  # of so few votes
        if abs(share - middle) > limits.outlier * max(spread, chance):
            odd.add(source)
    for entry in judged:
        if isinstance(entry.feedback.value, bool) and entry.feedback.source in odd:
            yield entry, "its source votes unlike all others"


def floods(judged: list[Judged], limits: Limits) -> Iterator[tuple[Judged, str]]:
    """All but the first of a source that says too much, by itself or as a share of what is kept of everybody."""
    counts = Counter(entry.feedback.source for entry in judged)
    caps = {source: min(count, limits.most_per_source) for source, count in counts.items()}
    if len(caps) > 1:
        for source in sorted(caps, key=lambda name: caps[name], reverse=True):
            others = sum(caps.values()) - caps[source]
            caps[source] = min(caps[source], max(1, int(others * limits.most_share / max(1 - limits.most_share, 1e-9))))
    seen: Counter[str | None] = Counter()
    for entry in judged:
        source = entry.feedback.source
        seen[source] += 1
        if seen[source] > caps[source]:
            yield entry, "its source said too much"


def correction(entry: Judged) -> str | None:
    """The answer as it should have been, if the feedback is one."""
    return str(entry.feedback.value) if entry.feedback.metric_name == DEMONSTRATION else None


def words_of(text: str) -> tuple[str, ...]:
    """What is left of a text when case, spaces and punctuation do not count."""
    return tuple(re.findall(r"\w+", text.casefold()))


def is_score(feedback: Feedback) -> bool:
    return isinstance(feedback.value, float | int) and not isinstance(feedback.value, bool)


def question(interaction: Interaction) -> str:
    """All that was asked, as one text."""
    return interaction.prompt or "\n\n".join(text_of(message) for message in interaction.messages or ())


def text_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def scripts(text: str) -> Counter[str]:
    """Letters by script, the first word of their Unicode names: LATIN, CYRILLIC, CJK."""
    return Counter(unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha())
