"""Prompts, answers and conversations as text, and where in it lies what is learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from train.errors import DataError

Message = dict[str, Any]
Turns = str | Sequence[Message]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Refused(Exception):
    """The chat template does not take this conversation."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """Text, and the spans of characters that are learnt (None: all of it).

    In plain text the tokenizer's own special tokens are still to be added, and the one that ends it.
    """

    text: str
    learnt: tuple[tuple[int, int], ...] | None
    plain: bool = False


class Renderer:
    """Writes conversations by the tokenizer's chat template.

    Where the answers lie: a template with `{% generation %}` says so. Of any other, the conversation up to an answer
    is rendered with the generation prompt, as it will be when the model is used; that has to be the beginning of the
    whole, and the answer starts there. It ends with its end-of-turn token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.has_template = tokenizer.chat_template is not None
        self._special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._marked = self.has_template and bool(GENERATION.search(tokenizer.get_chat_template()))

    def whole(self, said: str | Sequence[Message], where: str) -> Rendering:
        """A text or a conversation that is learnt from end to end. Raises as `conversation` does."""
        if isinstance(said, str):
            return Rendering(said, None, plain=True)
        return Rendering(self._render(said, where)[0] if said else "", None)

    def join(self, prompt: Turns, answer: Turns) -> Turns:
        """Messages, or a string if both are strings and there is no template to write them with."""
        if isinstance(prompt, str) and isinstance(answer, str) and not self.has_template:
            return prompt + answer
        return [*_as_messages(prompt, "user"), *_as_messages(answer, "assistant")]

    def answered(self, prompt: Turns, answer: Turns, where: str) -> Rendering:
        """A prompt and what is learnt in answer to it. Raises as `conversation` does."""
        joined = self.join(prompt, answer)
        if isinstance(joined, str):
            return Rendering(joined, ((len(prompt), len(joined)),) if answer else (), plain=True)
        return self.conversation(joined, where, first=len(_as_messages(prompt, "user")))

    def conversation(self, messages: Sequence[Message], where: str, *, first: int = 0) -> Rendering:
        """`messages`, of which the assistant's answers from number `first` on are learnt.

        What an assistant says before anyone else is no answer, and is not learnt. Raises Refused, and DataError if
        the answers cannot be found in what the template makes.
        """
        if not messages:
            return Rendering("", ())
        whole, marked = self._render(messages, where)
        if self._marked:
            known = len(self._render(messages[:first], where)[1]) if first else 0
            return Rendering(whole, tuple(marked[known:]))
        answers = [
            number
            for number, message in enumerate(messages)
            if number >= max(1, first) and message["role"] == "assistant" and _says_something(message)
        ]
        return Rendering(whole, tuple(self._find(messages, number, whole, where) for number in answers))

    def _find(self, messages: Sequence[Message], number: int, whole: str, where: str) -> tuple[int, int]:
        """Where answer `number` is in `whole`, in characters."""
        before, _ = self._render(messages[:number], where, prompt=True)
        through = whole if number + 1 == len(messages) else self._render(messages[: number + 1], where)[0]
        start = len(before)
        if whole.startswith(before):
            if whole.startswith(through):
                return start, start + len(self._without_tail(through[start:]))
            # Templates of reasoning models write the last answer otherwise than those before it.
            content, end_of_turn = messages[number].get("content"), self._tokenizer.eos_token
            end = whole.find(end_of_turn, start) if end_of_turn else -1
            said = whole[start:end].strip()
            if end >= 0 and said and isinstance(content, str) and content.strip().endswith(said):
                return start, end + len(end_of_turn)
        raise DataError(
            f"{where}: the chat template writes the beginning of this conversation otherwise once answer {number} has "
            "been given, so that where it lies cannot be told; put {% generation %} around answers in the template"
        )

    def _without_tail(self, turn: str) -> str:
        """Without the white space after an end-of-turn token, which no model is ever asked to generate."""
        short = turn.rstrip()
        return short if short.endswith(self._special) else turn

    def _render(
        self, messages: Sequence[Message], where: str, *, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and, if the template marks them, the spans of the answers."""
        if not self.has_template:
            raise DataError(
                f"{where}: the tokenizer has no chat template to write messages with; give strings, or a template"
            )
        try:
            rendered: Any = render_jinja_template(
                [[{name: value for name, value in message.items() if value is not None} for message in messages]],
                chat_template=self._tokenizer.get_chat_template(),
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self._marked,
                **self._tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:
            raise Refused(str(error)) from error
        texts, spans = rendered
        return texts[0], spans[0] if self._marked else []


def check_messages(value: Any, column: str, where: str) -> None:
    """Raises DataError if `value` is no list of messages."""
    if not isinstance(value, list):
        raise DataError(f'{where}: "{column}" is {type(value).__name__}; a list of messages is wanted')
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{where}: message {number} of "{column}" is no object with a string as its "role"')
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise DataError(f'{where}: message {number} of "{column}" has no "content" of text')


def _as_messages(value: Turns, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def _says_something(message: Message) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))
