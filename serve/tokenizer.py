"""Text to tokens and back, and the chat template, rendered in a sandbox."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

from proto.manifest import CHAT_TEMPLATE, TOKENIZER
from serve.errors import InvalidRequest

PRIMING_TOKENS = 6  # of the prompt: enough for a decoder to know whether a leading space belongs
MOST_BYTES = 4  # of a character, each of which may be a token of its own
MOST_HELD = 8  # tokens without text


class Tokenizer:
    """The artifact's tokenizer. Safe for concurrent use."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {id: token.content for id, token in added.items() if token.special}
        self._texts: dict[int, str] = {}  # of single tokens
        self._decoders = repr(self._tokenizer.decoder)
        template = directory / CHAT_TEMPLATE
        self._template = _environment().from_string(template.read_text()) if template.is_file() else None

    @cached_property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. A batch of one, since only that lets other threads run meanwhile."""
        return list(self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """One token as text; bytes that are not UTF-8 on their own come as U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = str(self._tokenizer.decode([token_id], skip_special_tokens=False))
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """One token's exact bytes if the vocabulary is byte-level or has tokens for bytes, else those of its text."""
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        table = _byte_level_table()
        if "ByteLevel" in self._decoders and all(char in table for char in piece):
            return bytes(table[char] for char in piece)
        if "ByteFallback" in self._decoders and (byte := re.fullmatch("<0x([0-9A-F]{2})>", piece)):
            return bytes.fromhex(byte[1])
        return self.token_text(token_id).encode()

    def spell(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens spelled out."""
        stream = self.decode_stream([])
        return "".join(stream.push(id) or self._special.get(id, "") for id in ids)

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Where each of the tokens `ids` of `text` starts in it, in characters; amid a character, where that starts.

        Special tokens that the text does not spell out, as tokenizers put in front of it, take no room.
        """
        stream, at, offsets = self.decode_stream([]), 0, list[int]()
        for id in ids:
            offsets.append(min(at, len(text)))
            piece = stream.push(id)
            special = self._special.get(id, "")
            at += len(piece or (special if text.startswith(special, at) else ""))
        return offsets

    def decode_stream(self, prompt: list[int]) -> TextStream:
        """An incremental decoder of what follows `prompt`."""
        return TextStream(self._tokenizer, prompt)

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt for `messages` by the model's own template. Raises InvalidRequest if it refuses them."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions")
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template refused the messages: {error}", param="messages") from error


class TextStream:
    """Tokens in, whole characters out: a piece is held until its last byte has come."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt: list[int]) -> None:
        """`prompt` may end amid a character, which then comes whole with the token that completes it."""
        self._tokenizer = tokenizer
        self._before: list[int] = []
        begun = prompt[1 - MOST_BYTES :]
        for end in range(len(prompt), len(prompt) - len(begun) - 1, -1):
            before = prompt[max(end - PRIMING_TOKENS, 0) : end]
            if not tokenizer.decode(before).endswith("\ufffd"):
                self._before, begun = before, prompt[end:]
                break
        self._restart(begun)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, possibly none."""
        text = self._stream.step(self._tokenizer, token_id)
        if text:
            self._held.clear()
            return str(text)
        self._held.append(token_id)
        if len(self._held) < MOST_HELD:
            return ""
        # They are no characters, or special. The stream would look at all of them again with every token.
        gone, kept = self._held[: 1 - MOST_BYTES], self._held[1 - MOST_BYTES :]
        return str(self._tokenizer.decode(gone)) + self._restart(kept)

    def _restart(self, tokens: list[int]) -> str:
        """Go on from what came before all tokens, with `tokens`."""
        self._stream = DecodeStream(ids=self._before, skip_special_tokens=True)
        self._held: list[int] = []
        return "".join([self.push(token_id) for token_id in tokens])


def _environment() -> jinja2.Environment:
    """The environment that chat templates are written for (that of transformers), without access to Python."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now(datetime.UTC).strftime(form)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment


def _raise(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


@cache
def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (byte-level BPE)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
