"""Answers in OpenAI's JSON: whole, and as the events of a stream. What is constant in a stream is made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from serve.answer import Answer
from serve.errors import PawlError
from serve.http_limits import error_body
from serve.request import Chunk, TokenLogprob, Usage
from serve.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode


class Offsets:
    """Where one answer's tokens start in its text, in characters; amid a character, where that starts."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], echo: str | None) -> None:
        self._of_prompt = [] if echo is None else tokenizer.offsets(prompt, echo)
        self._stream = tokenizer.decode_stream(prompt)
        self._at = len(echo or "")

    def push(self, tokens: list[int]) -> list[int]:
        """Of the tokens that come next; an echoed prompt's are the first ones."""
        offsets, self._of_prompt = self._of_prompt, []
        for token in tokens[len(offsets) :]:
            offsets.append(self._at)
            self._at += len(self._stream.push(token))
        return offsets


class Spelling:
    """How log-probabilities are written: completions and chat differ. Knows each answer's length so far."""

    def __init__(self, answer: Answer, *, chat: bool) -> None:
        self._answer = answer
        self._tokenizer = answer.version.tokenizer
        self._chat = chat
        self._offsets: dict[int, Offsets] = {}

    def logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self._chat:
            return {"content": [self._chat_entry(entry) for entry in entries]}
        if index not in self._offsets:
            prompt, echo = self._answer.requests[index].prompt, self._answer.echo_of(index)
            self._offsets[index] = Offsets(self._tokenizer, prompt, echo)
        return {
            "tokens": [self._name(entry.token_id) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": self._offsets[index].push([entry.token_id for entry in entries]),
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float] | None:
        return None if entry.logprob is None else {self._name(id): logprob for id, logprob in entry.top}

    def _chat_entry(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._chat_token(id, logprob) for id, logprob in entry.top]
        return self._chat_token(entry.token_id, entry.logprob) | {"top_logprobs": top}

    def _chat_token(self, id: int, logprob: float | None) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(id)
        return {"token": self._tokenizer.token_text(id), "logprob": logprob, "bytes": list(data)}

    def _name(self, id: int) -> str:
        """The token's text; for bytes that are no text their escapes, so that distinct tokens stay distinct keys."""
        text = self._tokenizer.token_text(id)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._tokenizer.token_bytes(id))


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def whole_json(answer: Answer, chunks: list[Chunk], *, chat: bool) -> bytes:
    """The body of an answer that is not streamed."""
    spelling = Spelling(answer, chat=chat)
    choices = [
        {
            "index": index,
            **({"message": {"role": "assistant", "content": chunk.text}} if chat else {"text": chunk.text}),
            "logprobs": spelling.logprobs(index, chunk.logprobs) if chunk.logprobs else None,
            "finish_reason": chunk.finish_reason,
        }
        for index, chunk in enumerate(chunks)
    ]
    kind = "chat.completion" if chat else "text_completion"
    return encode(_envelope(answer, kind) | {"choices": choices, "usage": usage_json(answer.usage)})


class Events:
    """One stream's events. The hot path only escapes the text between two constants."""

    def __init__(self, answer: Answer, *, chat: bool, include_usage: bool) -> None:
        self._answer = answer
        self._chat = chat
        self._include_usage = include_usage
        self._spelling = Spelling(answer, chat=chat)
        self._envelope = _envelope(answer, "chat.completion.chunk" if chat else "text_completion")
        opening = b"data: " + encode(self._envelope)[:-1]
        self._last = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        text = b'"delta":{"content":' if chat else b'"text":'
        numbers = range(len(answer.requests))
        self._before = [opening + b',"choices":[{"index":%d,' % index + text for index in numbers]
        self._closed = b"}" if chat else b""  # of the delta
        self._after = self._closed + b',"logprobs":null,"finish_reason":null}]' + self._last
        role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]' + self._last
        self._roles = [opening + b',"choices":[{"index":%d,' % i + role if chat else b"" for i in numbers]

    def of(self, index: int, chunk: Chunk) -> bytes:
        """The events of a chunk; empty if it has nothing to say, such as a token that ends within a character."""
        if chunk.finish_reason is None and not chunk.logprobs:
            if not chunk.text:
                return b""
            event = self._before[index] + encode(chunk.text) + self._after
        else:
            logprobs = self._spelling.logprobs(index, chunk.logprobs) if chunk.logprobs else None
            rest = b',"logprobs":%b,"finish_reason":%b}]' % (encode(logprobs), encode(chunk.finish_reason))
            event = self._before[index] + encode(chunk.text) + self._closed + rest + self._last
        if role := self._roles[index]:
            # With the first text, not ahead of it: clients take the first chunk's time for that of the first token.
            self._roles[index] = b""
            return role + event
        return event

    def end(self) -> bytes:
        """What follows the last chunk."""
        if not self._include_usage:
            return DONE
        usage = encode(self._envelope | {"choices": [], "usage": usage_json(self._answer.usage)})
        return b"data: " + usage + b"\n\n" + DONE

    @staticmethod
    def error(error: PawlError) -> bytes:
        """An error after the stream has begun."""
        return b"data: " + encode(error_body(error)) + b"\n\n" + DONE


def _envelope(answer: Answer, kind: str) -> dict[str, Any]:
    return {
        "id": answer.id,
        "object": kind,
        "created": answer.created,
        "model": answer.model,
        "system_fingerprint": answer.version.name,
    }
