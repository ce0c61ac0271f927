"""Token by token, text comes in whole characters, and each token has its place in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.tokenizer import Tokenizer
from tests.serve.tiny import SPECIAL

PIECES = st.sampled_from([*SPECIAL, "License", " ", "grüß", "🙂", "\U00013000", "\n", "x  y"])
TEXTS = st.lists(PIECES, min_size=1, max_size=8).map("".join)


@pytest.fixture(scope="module")
def tokenizer(artifact: Path) -> Tokenizer:
    return Tokenizer(artifact)


@given(text=TEXTS)
@settings(deadline=None)
def test_offsets_cut_a_text_into_its_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    offsets = tokenizer.offsets(ids, text)
    assert tokenizer.spell(ids) == text
    pieces = [text[a:b] for a, b in zip(offsets, [*offsets[1:], len(text)], strict=True)]
    assert "".join(pieces) == text
    for id, piece in zip(ids, pieces, strict=True):
        spelled = tokenizer.token_text(id)
        assert piece == spelled or "\ufffd" in spelled, "a token of whole characters is one piece"


def test_special_tokens_that_the_text_lacks_take_no_room(tokenizer: Tokenizer) -> None:
    text = "License<|end|>x"
    ids = tokenizer.encode(text)
    (end,) = tokenizer.encode("<|end|>")
    plain = tokenizer.offsets(ids, text)
    assert tokenizer.offsets([end, *ids, end], text) == [0, *plain, len(text)]


@given(text=TEXTS, other=TEXTS)
@settings(deadline=None)
def test_a_prompt_may_end_amid_a_character(tokenizer: Tokenizer, text: str, other: str) -> None:
    """What follows any beginning of a text is what that beginning does not spell."""
    ids = tokenizer.encode(text + other)
    whole = tokenizer.decode(ids)
    for cut in range(len(ids) + 1):
        stream = tokenizer.decode_stream(ids[:cut])
        said = "".join(stream.push(id) for id in ids[cut:])
        begun = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert begun + said == whole
