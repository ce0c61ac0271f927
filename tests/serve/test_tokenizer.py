"""Token by token, text comes in whole characters, and each token has its place in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers

from serve.tokenizer import MOST_HELD, Tokenizer
from tests.serve.tiny import SPECIAL, VOCABULARY

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


@given(data=st.data())
@settings(deadline=None)
def test_bytes_that_are_no_characters_are_not_held_for_ever(tokenizer: Tokenizer, data: st.DataObject) -> None:
    broken = [id for id in range(VOCABULARY) if "\ufffd" in tokenizer.token_text(id)]
    (end,) = tokenizer.encode("<|end|>")
    ids = data.draw(st.lists(st.sampled_from([*broken, end]), max_size=60))
    stream = tokenizer.decode_stream(data.draw(st.lists(st.sampled_from(broken), max_size=9)))
    pieces = [stream.push(id) for id in ids]
    for at in range(len(ids) - MOST_HELD):
        assert any(pieces[at : at + MOST_HELD]) or end in ids[at : at + MOST_HELD]
    rest = tokenizer.encode("\nLicense grüß")
    assert "".join(stream.push(id) for id in rest).endswith("\nLicense grüß")
    offsets = tokenizer.offsets(ids, tokenizer.spell(ids))
    assert offsets == sorted(offsets)


def test_bytes_of_tokens_that_are_bytes_and_of_tokens_that_are_text(tmp_path: Path) -> None:
    """A vocabulary as SentencePiece makes it, where "é" is that letter, and not the byte that GPT-2 writes so."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581a", "é", "</s>"]
    library = Library(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", "\u2581")
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    ids = [257, *tokenizer.encode("é\n\u20ac"), 259]
    assert [tokenizer.token_bytes(id) for id in ids] == [b" a", "é".encode(), b"\n", b"\xe2", b"\x82", b"\xac", b"</s>"]
    assert tokenizer.token_bytes(10**6) == b""


def test_bytes_of_byte_level_tokens(tokenizer: Tokenizer) -> None:
    text = "grüß \U00013000\n"
    assert b"".join(tokenizer.token_bytes(id) for id in tokenizer.encode(text)) == text.encode()
