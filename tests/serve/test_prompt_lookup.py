"""Drafts against a search through the whole text, and how far they are trusted."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from serve.prompt_lookup import SIZES, PromptLookup
from serve.speculation import MOST_DRAFTS, PROBE_EVERY, Speculation


def search(text: list[int], most: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest end of `text` that occurred before."""
    for size in SIZES:
        for at in range(len(text) - 1, size - 1, -1):
            if text[at - size : at] == text[-size:]:
                endless = text + text[at:] * most
                return endless[at : at + most]
    return []


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=6), st.integers(1, 8))
@settings(deadline=None)
def test_drafts_follow_the_latest_occurrence_of_the_longest_match(parts: list[list[int]], most: int) -> None:
    lookup, text = PromptLookup(), list[int]()
    for part in parts:
        lookup.extend(part)
        text += part
        assert len(lookup) == len(text)
        assert lookup.draft(most) == search(text, most)


def drafted(speculation: Speculation, price: float) -> int:
    return len(speculation.draft(100, price))


def loop() -> Speculation:
    speculation = Speculation()
    speculation.extend([1, 2, 3] * 10)
    return speculation


def test_drafts_grow_while_right_and_shrink_while_wrong() -> None:
    speculation, lengths = loop(), []
    for _ in range(6):
        lengths.append(drafted(speculation, 0.3))
        speculation.judge(lengths[-1], refused=False)
    assert lengths == sorted(lengths)
    assert lengths[-1] == MOST_DRAFTS
    for _ in range(20):
        speculation.judge(0, refused=True)
    assert drafted(speculation, 0.3) == 0


def test_the_dearer_a_token_the_shorter_the_draft() -> None:
    lengths = [drafted(loop(), price) for price in (0.0, 0.05, 0.2, 0.45, 0.6)]
    assert lengths == [8, 4, 2, 1, 0]


def test_given_up_drafts_are_tried_again() -> None:
    speculation = loop()
    assert drafted(speculation, 0.1) > 0
    for _ in range(20):
        speculation.judge(0, refused=True)
    speculation.extend([1, 2, 3] * (PROBE_EVERY // 3))
    assert drafted(speculation, 0.1) == 0
    speculation.extend([1, 2, 3])
    assert [drafted(speculation, 0.1) for _ in range(2)] == [1, 0]


def test_room_limits_drafts() -> None:
    assert len(loop().draft(2, 0.0)) == 2
    assert loop().draft(0, 0.0) == []
    assert loop().draft(-1, 0.0) == []
