"""A tokenizer from records: what it learns, that nothing is lost, and that transformers and the server take it."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from serve.tokenizer import Tokenizer as ServedTokenizer
from train import bpe, flops
from train.bpe import SPECIAL, measure, train_tokenizer
from train.errors import TrainError

CODE = Path(flops.__file__).read_text()
CHAT = [{"role": "user", "content": "Add 12."}, {"role": "assistant", "content": "def add(a):\n    return a + 12"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([CODE] * 3, 600)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_special_tokens_come_first_then_bytes(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == 600
    assert all(len(tokenizer.id_to_token(number)) == 1 for number in range(3, 259))
    assert all(len(tokenizer.id_to_token(number)) > 1 for number in range(259, 600))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 2025", ["x", " =", " ", "2", "0", "2", "5"]),
        ("    return self.name", ["   ", " return", " self", ".name"]),
        ("a\n\n    b", ["a", "\n\n", "   ", " b"]),
        ("it's (fine)", ["it", "'s", " (", "fine", ")"]),
        ("if x:\n", ["if", " x", ":\n"]),
        ("snake_case", ["snake", "_case"]),
    ],
)
def test_where_text_is_cut(tokenizer: Tokenizer, text: str, expected: list[str]) -> None:
    assert pieces(tokenizer, text) == expected


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_nothing_is_lost(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_more_tokens_need_fewer_of_them() -> None:
    counts = [measure(train_tokenizer([CODE] * 3, size), [CODE]) for size in (259, 300, 500)]
    size = len(CODE.encode())
    assert [item[0] for item in counts] == [size] * 3
    assert counts[0][1] == size  # a token a byte
    assert size > counts[1][1] > counts[2][1]


def test_the_same_text_gives_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert train_tokenizer([CODE] * 3, 600).to_str() == tokenizer.to_str()


def test_only_the_first_part_of_a_long_text_is_measured(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setattr(bpe, "MEASURED_BYTES", 1000)

    def endless() -> Iterator[str]:
        while True:
            yield "word " * 20

    assert measure(tokenizer, endless())[0] == 1000


def run(*arguments: str) -> int:
    parser = ArgumentParser()
    bpe.configure(parser)
    return bpe.run(parser.parse_args(arguments))


def test_from_records_to_a_directory_that_others_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": CODE}) + "\n" + json.dumps({"messages": CHAT}) + "\n")
    (tmp_path / "b.txt").write_text(CODE)
    (tmp_path / "c.txt").write_text("something else")
    given = [str(tmp_path / name) for name in ("a.jsonl", "b.txt")]
    output = tmp_path / "made"
    assert run(*given, "-o", str(output), "--vocab-size", "500", "--held-out", str(tmp_path / "c.txt")) == 0
    training, held_out = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert training[2] == f"{2 * len(CODE.encode()) + len('Add 12.') + 2 + len(CHAT[1]['content']):,}"
    assert held_out[2] == "14"
    assert float(training[-1]) > float(held_out[-1]) > 1

    loaded = AutoTokenizer.from_pretrained(output)
    assert len(loaded) == 500
    assert (loaded.eos_token, loaded.bos_token, loaded.pad_token) == (SPECIAL[0],) * 3
    served = ServedTokenizer(output)
    assert served.vocab_size == 500
    wanted = "<|im_start|>user\nAdd 12.<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True) == wanted
    assert served.render_chat(CHAT[:1]) == wanted
    whole = loaded.apply_chat_template(CHAT, tokenize=False)
    assert whole == f"{wanted}{CHAT[1]['content']}<|im_end|>\n"
    assert served.encode(whole) == loaded(whole)["input_ids"]
    assert served.encode(whole).count(2) == 2
    assert served.decode(served.encode(CODE)) == CODE


def test_too_little_text_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words, a few words")
    with pytest.raises(
        TrainError, match=r"--vocab-size 1000 is more than the text gives, 2\d\d tokens; give more text"
    ):
        run(str(tmp_path / "a.txt"), "-o", str(tmp_path / "made"), "--vocab-size", "1000")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(("size", "limit"), [("258", "at least 259"), ("2000000", "at most 1e")])
def test_sizes_that_cannot_be(tmp_path: Path, size: str, limit: str) -> None:
    with pytest.raises(TrainError, match=f"--vocab-size .* is out of range; give {limit}"):
        run("x", "-o", str(tmp_path / "made"), "--vocab-size", size)
