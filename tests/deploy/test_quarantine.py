"""What is learnt from, and what is kept out and why."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest

from deploy.quarantine import Limits, Sorted, quarantine
from serve.store import Judged
from tests.deploy.judged import interaction, judge
from train.decontamination import Index

LIMITS = Limits()


def sift(entries: list[Judged], limits: Limits = LIMITS, held_out: str = "") -> Sorted:
    index = Index(limits.ngram)
    index.add(held_out)
    found = quarantine(entries, limits, index)
    dropped = [id for ids in found.dropped.values() for id in ids]
    assert sorted([*dropped, *(entry.feedback.id for entry in found.kept)]) == sorted(e.feedback.id for e in entries)
    return found


HELD_OUT = "How many grains of rice lie on the very last square of that old board of chess, in all?"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (judge(True, source=None), "no API key vouches for it"),
        (judge(True, of=interaction(completion=None)), "the text it judges is not kept"),
        (judge(True, of=interaction(messages=None)), "the text it judges is not kept"),
        (judge(False, of=interaction(finish_reason="abort")), "it judges an answer that was broken off"),
        (judge("  \n"), "the correction is empty"),
        (judge("x" * 20_001), "the correction is too long"),
        (judge("x" * 4_100), "the correction's length is odd"),
        (judge("Это будет четыре."), "the correction is in another script"),
        (judge("The same.", of=interaction(completion="The same.")), "the correction is the answer"),
        (judge(True, of=interaction(completion=f"Well: {HELD_OUT}")), "it holds held-out text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_judgement(entry: Judged, reason: str) -> None:
    good = judge("Two.", of=interaction(finish_reason="abort"))
    found = sift([entry, good], held_out=HELD_OUT)
    assert found.dropped == {reason: [entry.feedback.id]}
    assert found.kept == [good]


def test_anonymous_feedback_is_taken_when_asked_for() -> None:
    assert len(sift([judge(True, source=None)], Limits(anonymous=True)).kept) == 1


def test_a_script_of_the_chat_may_be_used() -> None:
    asked = interaction(messages=[{"role": "user", "content": [{"type": "text", "text": "Say yes in Russian: да?"}]}])
    assert len(sift([judge("Да", of=asked)]).kept) == 1


def test_the_last_word_counts() -> None:
    chat = interaction()
    first, last = judge(True, of=chat), judge(False, of=chat)
    found = sift([first, judge("It is two.", of=chat), last, judge("?", "comment", chat), judge("!", "comment", chat)])
    assert found.dropped == {"the same source judged again": [first.feedback.id]}
    assert len(found.kept) == 4


@pytest.mark.parametrize(("ups", "downs", "kept"), [(1, 1, 0), (2, 1, 0), (3, 1, 1), (1, 4, 1)])
def test_opposite_thumbs(ups: int, downs: int, kept: int) -> None:
    """Of the same answer to the same question, by different sources, of one interaction or of several."""
    chat = interaction()
    votes = [
        judge(n < ups, of=msgspec.structs.replace(chat, id=f"copy-{n}"), source=f"s{n}") for n in range(ups + downs)
    ]
    found = sift(votes, Limits(most_share=1.0))
    assert [entry.feedback.value for entry in found.kept] == [ups > downs] * kept


def test_two_corrections_of_one_answer_may_differ_but_not_repeat() -> None:
    chat = interaction()
    entries = [judge(text, of=chat, source=f"s{n}") for n, text in enumerate(("Two.", "It is two.", "Two."))]
    assert [entry.feedback.value for entry in sift(entries, Limits(most_share=1.0)).kept] == ["Two.", "It is two."]


def test_one_text_for_everything() -> None:
    spam = [judge(f"Buy at the shop{'!' * n}") for n in range(4)]
    fair = [judge(f"It is {n}.") for n in range(4)]
    found = sift([*spam, *fair])
    assert found.kept == fair
    assert found.dropped == {"the same correction for too many prompts": [entry.feedback.id for entry in spam]}


def test_a_source_that_votes_unlike_all_others() -> None:
    draw = random.Random(0)
    votes = [judge(draw.random() < 0.7, source=f"s{n % 5}") for n in range(200)]
    poison = [judge(False, source="poison") for _ in range(40)]
    correction = judge("It is two.", source="poison")
    found = sift([*votes, *poison, correction])
    assert found.dropped == {"its source votes unlike all others": [entry.feedback.id for entry in poison]}
    assert len(sift([*votes[:2], *poison]).kept) == 4  # of two sources, nobody knows; the flood is cut to a half


def test_nobody_is_an_outlier_by_chance() -> None:
    for seed in range(50):
        draw = random.Random(seed)
        votes = [judge(draw.random() < 0.6, source=f"s{n % 6}") for n in range(180)]
        assert sift(votes).dropped == {}


def test_floods_are_cut() -> None:
    entries = [judge(True, source="loud") for _ in range(90)] + [judge(True, source=f"s{n}") for n in range(10)]
    kept = sift(entries).kept
    assert sum(entry.feedback.source == "loud" for entry in kept) == 10  # half of what is kept
    assert len(sift(entries[:90], replace(LIMITS, most_per_source=30)).kept) == 30
    assert len(sift(entries[:90]).kept) == 90  # the only one there is
