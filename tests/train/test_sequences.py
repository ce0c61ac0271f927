from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.train.tiny import make_tokenizer
from train.conversations import Rendering
from train.sequences import Encoder, TokenSequence, pieces, shorten


def sequence(length: int, *learnt: int) -> TokenSequence:
    return TokenSequence(np.arange(length, dtype=np.uint32), np.isin(np.arange(length), learnt))


def test_a_token_that_reaches_into_the_answer_is_learnt() -> None:
    vocabulary = {symbol: number for number, symbol in enumerate(["<e>", "a", "Ġ", ":", "b", "Ġb"])}
    made = Tokenizer(models.BPE(vocabulary, [("Ġ", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>")
    (found,) = Encoder(tokenizer, end_text=True).encode([Rendering("a: ba", ((3, 5),), plain=True)])
    assert found.tokens.tolist() == [1, 3, 5, 1, 0]
    assert found.learnt.tolist() == [False, False, True, True, True]


def test_all_bytes_of_a_letter_are_learnt_and_templates_end_themselves() -> None:
    renderings = [Rendering("a😀<|end|>", ((1, 9),)), Rendering("b", None, plain=True)]
    chat, text = Encoder(make_tokenizer(), end_text=True).encode(renderings)
    assert chat.learnt.tolist() == [False, *[True] * 5]
    assert len(text.tokens) == 2
    assert text.tokens[-1] == 0
    (bare,) = Encoder(make_tokenizer(), end_text=False).encode(renderings[1:])
    assert bare.tokens.tolist() == text.tokens[:1].tolist()


@pytest.mark.parametrize("ends", [False, True])
def test_special_tokens_of_the_tokenizer_itself_are_kept_and_not_doubled(ends: bool) -> None:
    tokenizer = make_tokenizer()
    form = "<|user|> $A <|end|>" if ends else "<|user|> $A"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("<|user|>", 1), ("<|end|>", 0)]
    )
    renderings = [Rendering("ab", None, plain=True), Rendering("ab", ((0, 2),), plain=True)]
    text, answer = Encoder(tokenizer, end_text=True).encode(renderings)
    assert text.tokens.tolist() == answer.tokens.tolist() == [1, *tokenizer.encode("ab", add_special_tokens=False), 0]
    assert answer.learnt.tolist() == [False, True, True, True]


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(2, 20))
def test_pieces_foretell_every_token_once(length: int, context: int) -> None:
    cut = pieces(sequence(length), context)
    assert [*cut[0].tokens[:1], *(token for piece in cut for token in piece.tokens[1:])] == list(range(length))
    assert all(2 <= len(piece.tokens) <= context for piece in cut) or length == 1


def test_the_start_is_cut_away_but_not_bos() -> None:
    cut = shorten(sequence(10, 7, 8, 9), 4, bos=0)
    assert cut.tokens.tolist() == [0, 5, 6, 7, 8, 9]
    assert cut.learnt.tolist() == [False, False, False, True, True, True]
    assert shorten(sequence(10, 7, 8, 9), 4, bos=None).tokens.tolist() == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("count", [2, 3, 20])
def test_an_answer_that_has_lost_its_prompt_is_not_learnt(count: int) -> None:
    cut = shorten(sequence(10, 2, 3, 8, 9), count, bos=None)
    assert np.flatnonzero(cut.learnt).tolist() == ([8 - count, 9 - count] if count < 10 else [])
    assert cut.can_learn == (count < 10)
