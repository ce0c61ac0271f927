"""The text: two sides that never meet, the same in every run."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from compress.corpus import (
    DOCUMENT_CHARACTERS,
    MIN_DOCUMENT_CHARACTERS,
    Side,
    default_texts,
    make_corpus,
    sides_of,
    sides_of_search,
    split_texts,
)
from serve.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
CALIBRATION: Side = "calibration"
TEXTS = [f"document {number} " + f"{chr(ord('a') + number)} " * 150 for number in range(9)]


def make_tokenizer(directory: Path, *, template: str | None = None) -> Tokenizer:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return Tokenizer(directory)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(tmp_path)


def test_the_default_sides_are_disjoint_and_the_same_every_time() -> None:
    calibration, held_out = default_texts()
    assert set(calibration) & set(held_out) == set()
    assert min(len(calibration), len(held_out)) >= 32  # enough for the default windows of both
    assert all(MIN_DOCUMENT_CHARACTERS <= len(text) <= DOCUMENT_CHARACTERS for text in calibration + held_out)
    assert default_texts() == (calibration, held_out)


def test_a_search_takes_its_sides_from_those_of_calibration() -> None:
    calibration, validation = sides_of_search(None)
    assert sorted(calibration + validation) == sorted(sides_of(None)[0])
    assert min(len(calibration), len(validation)) >= 32


@pytest.mark.parametrize("num_documents", [3, 4, 5, 10])
def test_supplied_text_is_split_without_overlap_or_loss(num_documents: int) -> None:
    documents = [chr(ord("a") + number) * DOCUMENT_CHARACTERS for number in range(num_documents)]
    calibration, held_out = split_texts("".join(documents))
    assert set(calibration) & set(held_out) == set()
    assert sorted(calibration + held_out) == documents
    assert len(held_out) == num_documents // 3


def test_windows_are_of_one_length_from_different_documents(tokenizer: Tokenizer) -> None:
    corpus = make_corpus(TEXTS, tokenizer, CALIBRATION, num_windows=5, window=100)
    assert [len(window) for window in corpus.windows] == [100] * 5
    assert len({tuple(window) for window in corpus.windows}) == 5
    starts = [text[:40] for text in TEXTS]
    assert all(tokenizer.decode(window)[:40] in starts for window in corpus.windows)


def test_the_same_text_gives_the_same_windows_and_digest(tokenizer: Tokenizer) -> None:
    first, again = (make_corpus(TEXTS, tokenizer, CALIBRATION, num_windows=4, window=64) for _ in range(2))
    assert first == again
    changed = make_corpus([*TEXTS[:-1], TEXTS[-1] + "!"], tokenizer, CALIBRATION, num_windows=4, window=64)
    assert changed.digest != first.digest


def test_one_document_in_three_is_an_answer_where_the_model_chats(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, template=TEMPLATE)
    texts = [tokenizer.decode(w) for w in make_corpus(TEXTS, tokenizer, CALIBRATION, num_windows=9, window=100).windows]
    chats = [text for text in texts if text.startswith("[user]Write about: document")]
    assert len(chats) == 3
    assert all("[assistant]document" in text for text in chats)


def test_documents_shorter_than_a_window_are_left_out(tokenizer: Tokenizer) -> None:
    texts = ["short", *TEXTS[:2], "too short"]
    assert len(make_corpus(texts, tokenizer, CALIBRATION, num_windows=2, window=200).windows) == 2
    with pytest.raises(ValueError, match="the calibration text has 2 documents of at least 200 tokens") as told:
        make_corpus(texts, tokenizer, CALIBRATION, num_windows=3, window=200)
    assert "--calibration-windows asks for 3; give longer text, or less" in str(told.value)


@pytest.mark.parametrize("texts", [[], ["short"], ["x" * 199]])
def test_text_without_a_window_is_refused(texts: list[str], tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="the held-out text has 0 documents of at least 200 tokens"):
        make_corpus(texts, tokenizer, "held-out", num_windows=1, window=200)
