"""Texts to token ids and back: by a tokenizer on disk, or by a server's `/tokenize`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from train.errors import TrainError

Messages = Sequence[Mapping[str, str]]


class Tokenization(Protocol):
    def encode(self, text: str, *, special: bool) -> list[int]:
        """`special`: with what the tokenizer puts around a text, such as a first token."""

    def render(self, messages: Messages) -> list[int]:
        """The conversation in the chat template, up to where the assistant's answer begins."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Without special tokens."""


def prompt_tokens(tokenization: Tokenization, prompt: str | Messages) -> list[int]:
    """What stands before an answer."""
    if isinstance(prompt, str):
        return tokenization.encode(prompt, special=True)
    return tokenization.render(prompt)


class LocalTokenization:
    """Of a checkpoint, or of an artifact: any directory with a `tokenizer.json`. Raises TrainError."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise TrainError(
                f"{directory} holds no tokenizer: {error}; give a directory with tokenizer.json"
            ) from error

    def encode(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def render(self, messages: Messages) -> list[int]:
        if not self.tokenizer.chat_template:
            raise TrainError("the tokenizer has no chat template; leave out --chat, and judge prompts, not messages")
        plain = [dict(message) for message in messages]
        text = str(self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
        return self.encode(text, special=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        tokens = list(token_ids)
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class ServerTokenization:
    """vLLM's `/tokenize` and `/detokenize`, which our server has too."""

    def __init__(self, post: Callable[[str, dict[str, Any]], Any], model: str) -> None:
        self._post = post
        self._model = model

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self._tokens({"prompt": text, "add_special_tokens": special})

    def render(self, messages: Messages) -> list[int]:
        return self._tokens({"messages": list(messages)})

    def decode(self, token_ids: Sequence[int]) -> str:
        answer = self._post("/detokenize", {"model": self._model, "tokens": list(token_ids)})
        text: str = answer["prompt"]
        return text

    def _tokens(self, of: dict[str, Any]) -> list[int]:
        tokens: list[int] = self._post("/tokenize", {"model": self._model} | of)["tokens"]
        return tokens
