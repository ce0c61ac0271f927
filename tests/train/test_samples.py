"""From records to samples: what is learnt of each shape, what is skipped, what is an error."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.train.templates import CHATML, MARKED, STRICT
from tests.train.tiny import make_tokenizer
from train.data import Record, SkipReport
from train.errors import DataError
from train.samples import COLUMNS, Sample, SampleMaker, Shape


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


user = partial(turn, "user")
assistant = partial(turn, "assistant")


def make(
    shape: Shape,
    *records: dict[str, Any],
    context: int = 256,
    template: str | None = "",
    report: SkipReport | None = None,
    **options: Any,
) -> list[Sample]:
    """Samples by the tiny tokenizer, with its own template if none is given."""
    tokenizer = make_tokenizer()
    if template != "":
        tokenizer.chat_template = template
    maker = SampleMaker(tokenizer, shape, context, report or SkipReport(), **options)
    rows = [Record(columns, Path("a.jsonl"), row) for row, columns in enumerate(records, 1)]
    return list(maker.make(rows))


def text_of(sample: Sample, which: int = 0, *, learnt: bool = False) -> str:
    sequence = sample.sequences[which]
    return str(make_tokenizer().decode(sequence.tokens[sequence.learnt] if learnt else sequence.tokens))


def test_text_is_learnt_whole_and_cut_into_pieces() -> None:
    long = "abcdefghij" * 5
    short, cut = make(Shape.TEXT, {"text": "Grüße"}, {"text": long}, context=20)
    assert text_of(short) == text_of(short, learnt=True) == "Grüße<|end|>"
    assert [len(piece.tokens) for piece in cut.sequences] == [20, 20, 13]
    assert text_of(cut, 0) == long[:20]
    assert text_of(cut, 2) == long[38:] + "<|end|>"


@pytest.mark.parametrize(
    ("record", "template", "text"),
    [
        ({"messages": [user("a"), assistant("b")]}, "", "<|user|>a<|end|><|assistant|>b<|end|>"),
        ({"prompt": "a", "completion": "b"}, "", "<|user|>a<|end|><|assistant|>b<|end|>"),
        ({"prompt": "a", "completion": "b"}, None, "ab<|end|>"),
    ],
)
def test_conversations_can_be_learnt_whole_as_text(record: dict[str, Any], template: str | None, text: str) -> None:
    (sample,) = make(Shape.TEXT, record, template=template)
    assert text_of(sample) == text_of(sample, learnt=True) == text


@pytest.mark.parametrize(
    ("record", "template", "learnt"),
    [
        (
            {"messages": [turn("system", "s"), user("a"), assistant("b"), user("c"), assistant("d")]},
            "",
            "b<|end|>d<|end|>",
        ),
        ({"prompt": "a", "completion": "b"}, "", "b<|end|>"),
        ({"prompt": [user("a"), assistant("b"), user("c")], "completion": "d"}, "", "d<|end|>"),
        ({"prompt": "a", "completion": [assistant("b"), user("c"), assistant("d")]}, "", "b<|end|>d<|end|>"),
        ({"prompt": "a ", "completion": "b"}, None, "b<|end|>"),
    ],
)  # fmt: skip
def test_of_chats_the_answers_are_learnt(record: dict[str, Any], template: str | None, learnt: str) -> None:
    (sample,) = make(Shape.CHAT, record, template=template)
    assert text_of(sample, learnt=True) == learnt
    assert text_of(sample).endswith(learnt[-8:])  # nothing follows the last answer


def test_of_chatml_the_answers_and_their_ends_are_learnt() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    maker = SampleMaker(tokenizer, Shape.CHAT, 256, SkipReport())
    messages = [user("Was?"), assistant("Größe 😀"), user("And?"), assistant(" fine\n")]
    (sample,) = maker.make([Record({"messages": messages}, Path("a"), 1)])
    (found,) = sample.sequences
    assert tokenizer.decode(found.tokens[found.learnt]) == "Größe 😀<|im_end|> fine\n<|im_end|>"
    assert found.tokens.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)[:-1]


def test_of_a_template_that_marks_answers_the_mask_is_that_of_transformers() -> None:
    messages = [user("Was?"), assistant("Größe 😀"), user("And?"), assistant(" fine")]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = MARKED
    known = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    (sample,) = make(Shape.CHAT, {"messages": messages}, template=MARKED)
    assert sample.sequences[0].tokens.tolist() == known["input_ids"]
    assert sample.sequences[0].learnt.tolist() == [bool(mark) for mark in known["assistant_masks"]]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c", "weight": 2},
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": "c", "weight": 2.0},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")], "weight": 2},
    ],
)  # fmt: skip
def test_pairs_have_one_prompt_and_two_answers(record: dict[str, Any]) -> None:
    (sample,) = make(Shape.PAIRS, record)
    assert [text_of(sample, which) for which in range(2)] == [
        f"<|user|>a<|end|><|assistant|>{answer}<|end|>" for answer in "bc"
    ]
    assert [text_of(sample, which, learnt=True) for which in range(2)] == ["b<|end|>", "c<|end|>"]
    assert sample.weight == 2.0


def test_pairs_of_plain_strings() -> None:
    (sample,) = make(Shape.PAIRS, {"prompt": "a ", "chosen": "b", "rejected": "cc"}, template=None)
    assert [text_of(sample, which) for which in range(2)] == ["a b<|end|>", "a cc<|end|>"]


def test_an_answer_before_the_paths_of_a_pair_part_is_not_learnt() -> None:
    begun = [user("a"), assistant("b"), user("c")]
    record = {"chosen": [*begun, assistant("d")], "rejected": [*begun, assistant("e")]}
    (sample,) = make(Shape.PAIRS, record)
    assert [text_of(sample, which, learnt=True) for which in range(2)] == ["d<|end|>", "e<|end|>"]


def test_thumbs_and_classes() -> None:
    up, down = make(Shape.THUMBS, *({"prompt": "a", "completion": "b", "label": label} for label in (True, False)))
    assert (up.target, down.target, up.weight) == (1, 0, 1.0)
    assert text_of(up, learnt=True) == "b<|end|>"
    one, two = make(
        Shape.CLASSES,
        {"text": "ab", "label": "good", "weight": 0.5},
        {"messages": [user("a")], "label": 3, "weight": None},
    )
    assert (text_of(one), one.target, one.weight) == ("ab", "good", 0.5)
    assert (text_of(two), two.target, two.weight) == ("<|user|>a<|end|>", 3, 1.0)


LONG = "x" * 40


@pytest.mark.parametrize(
    ("shape", "record", "reason"),
    [
        (Shape.TEXT, {"text": " \n"}, "empty text"),
        (Shape.TEXT, {"messages": []}, "empty text"),
        (Shape.CLASSES, {"text": "", "label": 1}, "empty text"),
        (Shape.CHAT, {"messages": []}, "no answer"),
        (Shape.CHAT, {"messages": [user("a")]}, "no answer"),
        (Shape.CHAT, {"prompt": "a", "completion": ""}, "no answer"),
        (Shape.PAIRS, {"prompt": "a", "chosen": "b", "rejected": ""}, "no answer"),
        (Shape.PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        (Shape.CHAT, {"prompt": LONG, "completion": "b"}, "too long"),
        (Shape.PAIRS, {"prompt": "a", "chosen": "b", "rejected": LONG}, "too long"),
        (Shape.THUMBS, {"prompt": "a", "completion": LONG, "label": True}, "too long"),
        (Shape.CLASSES, {"text": LONG, "label": 1}, "too long"),
    ],
)
def test_what_is_of_no_use_is_skipped_and_counted(shape: Shape, record: dict[str, Any], reason: str) -> None:
    good = {
        Shape.TEXT: {"text": "ok"},
        Shape.CHAT: {"prompt": "a", "completion": "ok"},
        Shape.PAIRS: {"prompt": "a", "chosen": "ok", "rejected": "no"},
        Shape.THUMBS: {"prompt": "a", "completion": "ok", "label": True},
        Shape.CLASSES: {"text": "ok", "label": 1},
    }[shape]
    report = SkipReport()
    (sample,) = make(shape, record, good, context=32, report=report)
    assert "ok" in text_of(sample)
    assert report.places == {reason: ["a.jsonl:1"]}
    assert report.num_bad == 0


def test_a_prompt_can_be_cut_and_the_answer_stays() -> None:
    prompt = "".join(map(chr, range(65, 105)))
    (chat,) = make(Shape.CHAT, {"prompt": prompt, "completion": "b"}, context=20, too_long="cut")
    assert text_of(chat) == f"{prompt[-16:]}<|end|><|assistant|>b<|end|>"
    (pair,) = make(Shape.PAIRS, {"prompt": prompt, "chosen": "b", "rejected": "ccc"}, context=20, too_long="cut")
    assert [text_of(pair, which) for which in range(2)] == [
        f"{prompt[-14:]}<|end|><|assistant|>{answer}<|end|>" for answer in ("b", "ccc")
    ]
    (labelled,) = make(Shape.CLASSES, {"text": prompt, "label": 1}, context=20, too_long="cut")
    assert text_of(labelled) == prompt[:20]
    report = SkipReport()
    assert not make(Shape.CHAT, {"prompt": "a", "completion": LONG}, context=20, too_long="cut", report=report)
    assert report.counts == {"too long": 1}


def test_of_a_cut_conversation_the_answers_with_a_prompt_are_learnt() -> None:
    messages = [user("a"), assistant(LONG), user("c"), assistant("d")]
    (sample,) = make(Shape.CHAT, {"messages": messages}, context=20, too_long="cut")
    assert len(sample.sequences[0].tokens) == 20
    assert text_of(sample, learnt=True) == "d<|end|>"


@pytest.mark.parametrize(
    ("shape", "record", "message"),
    [
        (Shape.TEXT, {"content": "a"}, 'no column "text"'),
        (Shape.TEXT, {"text": 3}, '"text" is int'),
        (Shape.TEXT, {"text": None}, '"text" is NoneType'),
        (Shape.CHAT, {"text": "a"}, 'no column "messages"'),
        (Shape.CHAT, {"prompt": "a"}, 'no column "completion"'),
        (Shape.CHAT, {"messages": "a"}, '"messages" is str'),
        (Shape.PAIRS, {"chosen": "a", "rejected": "b"}, 'no column "prompt"'),
        (Shape.PAIRS, {"prompt": "a", "chosen": "a"}, 'no column "rejected"'),
        (Shape.PAIRS, {"prompt": "a", "chosen": "a", "rejected": "b", "weight": -1}, '"weight" is -1.0, not a number'),
        (Shape.PAIRS, {"prompt": "a", "chosen": "a", "rejected": "b", "weight": "2"}, '"weight" is str'),
        (Shape.THUMBS, {"prompt": "a", "completion": "b", "label": 1}, '"label" is int'),
        (Shape.CLASSES, {"text": "a"}, 'no column "label"'),
        (Shape.CLASSES, {"label": 1}, 'no column "text"'),
        (Shape.CLASSES, {"text": "a", "label": True}, '"label" is bool'),
    ],
)
def test_wrong_columns_are_an_error_that_names_them(shape: Shape, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        make(shape, record)
    text = str(caught.value)
    assert text.startswith("a.jsonl:1: ")
    assert message in text
    assert "the columns found are " + ", ".join(f'"{name}"' for name in record) in text
    assert COLUMNS[shape] in text


def test_labels_that_are_known_bind() -> None:
    assert len(make(Shape.CLASSES, {"text": "a", "label": "b"}, labels=["b", "c"])) == 1
    with pytest.raises(DataError, match=r"a\.jsonl:1: the label 'd' is none of b, c"):
        make(Shape.CLASSES, {"text": "a", "label": "d"}, labels=["b", "c"])


def test_a_conversation_that_the_template_refuses_is_bad() -> None:
    report = SkipReport(max_bad_share=0.5, num_records=2)
    records = [{"messages": [turn("system", "b")]}, {"messages": [user("a"), assistant("b")]}]
    assert len(make(Shape.CHAT, *records, template=STRICT, report=report)) == 1
    assert report.places == {"refused by the chat template: a user has to begin": ["a.jsonl:1"]}
    assert report.num_bad == 1


def test_tokenizers_and_contexts_that_do_not_do() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match="context of 1 tokens"):
        SampleMaker(tokenizer, Shape.TEXT, 1, SkipReport())
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        SampleMaker(tokenizer, Shape.TEXT, 8, SkipReport())


def test_order_is_kept_over_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.samples.CHARACTERS_AT_ONCE", 5)
    texts = [f"text {number}" for number in range(7)]
    assert [text_of(sample) for sample in make(Shape.TEXT, *({"text": text} for text in texts))] == [
        f"{text}<|end|>" for text in texts
    ]
