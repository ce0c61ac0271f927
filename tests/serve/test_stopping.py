"""Stop strings: the same cut however the text is split, and nothing of a stop string leaves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.stopping import StopStrings

text = st.text("ab\n", max_size=12)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3).map(tuple)


def cut(whole: str, stop: tuple[str, ...]) -> str:
    """The text up to the end of the earliest completed stop string, without it."""
    for end in range(len(whole) + 1):
        starts = [end - len(s) for s in stop if whole[:end].endswith(s)]
        if starts:
            return whole[: min(starts)]
    return whole


@given(st.lists(text, max_size=8), stops)
def test_streamed_equals_whole(pieces: list[str], stop: tuple[str, ...]) -> None:
    strings = StopStrings(stop)
    found = ""
    for character in "".join(pieces):
        emitted, stopped = strings.push(character)
        found += emitted
        if stopped:
            break
    else:
        found += strings.flush()
    assert found == cut("".join(pieces), stop)


@given(st.lists(text, max_size=8), stops)
def test_no_stop_string_is_ever_emitted(pieces: list[str], stop: tuple[str, ...]) -> None:
    strings = StopStrings(stop)
    found = ""
    for piece in pieces:
        emitted, stopped = strings.push(piece)
        found += emitted
        assert not any(s in found for s in stop)
        if stopped:
            return
    assert found + strings.flush() == "".join(pieces)
