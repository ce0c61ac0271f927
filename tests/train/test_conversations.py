from __future__ import annotations

from typing import Any

import pytest

from tests.train.templates import CHATML, COUNTING, ENDED_ONCE, MARKED, PLAIN_WORDS, REASONING, STRICT
from tests.train.tiny import CHAT_TEMPLATE, make_tokenizer
from train.conversations import Refused, Renderer, Rendering, check_messages
from train.errors import DataError


def renderer(template: str | None) -> Renderer:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    if template == CHAT_TEMPLATE:
        tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = template
    return Renderer(tokenizer)


def say(*contents: str, first: str = "user") -> list[dict[str, Any]]:
    """Messages by the user and the assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def learnt(rendering: Rendering) -> list[str]:
    assert rendering.learnt is not None
    return [rendering.text[start:stop] for start, stop in rendering.learnt]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHAT_TEMPLATE, ["two<|end|>", "four<|end|>"]),
        (CHATML, ["two<|im_end|>", "four<|im_end|>"]),
        (REASONING, ["two<|im_end|>", "<think>\n\n</think>\n\nfour<|im_end|>"]),
        (PLAIN_WORDS, [" two\n", " four\n"]),
        (MARKED, ["two<|im_end|>", "four<|im_end|>"]),
    ],
)
def test_every_answer_is_learnt_with_its_end_of_turn(template: str, answers: list[str]) -> None:
    assert learnt(renderer(template).conversation(say("one", "two", "three", "four"), "a:1")) == answers
    last = renderer(template).answered(say("one", "two", "three"), say("four", first="assistant"), "a:1")
    assert learnt(last) == answers[1:]
    assert learnt(renderer(template).answered("three", "four", "a:1")) == answers[1:]


def test_a_last_message_by_the_user_is_not_learnt() -> None:
    assert learnt(renderer(CHATML).conversation(say("one", "two", "three"), "a:1")) == ["two<|im_end|>"]


def test_thoughts_of_earlier_answers_are_left_out_with_their_template() -> None:
    said = renderer(REASONING).conversation(say("one", "<think>hm</think>\n\ntwo", "three", "four"), "a:1")
    assert learnt(said)[0] == "two<|im_end|>"


def test_what_is_said_before_anyone_asks_and_empty_answers_are_not_learnt() -> None:
    said = renderer(CHATML).conversation(say("Hello!", "one", "two", first="assistant"), "a:1")
    assert learnt(said) == ["two<|im_end|>"]
    assert learnt(renderer(CHATML).conversation(say("one", " ", "three", "four"), "a:1")) == ["four<|im_end|>"]
    assert learnt(renderer(CHATML).conversation([], "a:1")) == []


def test_strings_stay_strings_without_a_template() -> None:
    said = renderer(None).answered("one ", "two", "a:1")
    assert said == Rendering("one two", ((4, 7),), plain=True)
    assert learnt(renderer(None).answered("one", "", "a:1")) == []
    with pytest.raises(DataError, match="a:1: the tokenizer has no chat template"):
        renderer(None).answered("one", say("two", first="assistant"), "a:1")


@pytest.mark.parametrize("template", [COUNTING, ENDED_ONCE])
def test_a_template_that_hides_where_answers_lie_is_an_error(template: str) -> None:
    with pytest.raises(DataError, match=r"a:1: .* answer 1 .*put \{% generation %\}"):
        renderer(template).conversation(say("one", "two", "three", "four"), "a:1")


def test_a_template_may_refuse() -> None:
    with pytest.raises(Refused, match="a user has to begin"):
        renderer(STRICT).conversation(say("two", first="assistant"), "a:1")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "is str; a list of messages"),
        (["text"], "message 0"),
        ([{"role": 1, "content": "a"}], 'no object with a string as its "role"'),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": None}],
            'message 1 of "chosen" has no "content"',
        ),
    ],
)
def test_messages_are_checked(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_messages(value, "chosen", "a:1")
    check_messages([{"role": "assistant", "content": None, "tool_calls": [{}]}], "chosen", "a:1")
