"""How one request chooses, spells and stops: what the engine keeps for it beside its state."""

from __future__ import annotations

from serve.request import FinishReason, Request
from serve.sampler import Sampler
from serve.stopping import StopStrings
from serve.tokenizer import Tokenizer


class Generation:
    """One request's. Its tokens come in order, each once."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...], capacity: int
    ) -> None:
        """`capacity`: the most tokens of a request, prompt and completion."""
        stop_ids = request.params.stop_token_ids
        if not request.params.ignore_eos:
            stop_ids += eos_token_ids
        self.sampler = Sampler(request.params, request.prompt, vocab_size, stop_ids)
        self._request = request
        self._capacity = capacity
        self._text = tokenizer.decode_stream(request.prompt)
        self._stop = StopStrings(request.params.stop)
        self._stop_ids = frozenset(stop_ids)

    def append(self, token: int) -> tuple[str, FinishReason | None]:
        """Add a token to the request's output: the text that can be said now, and why it is the last, if it is."""
        request = self._request
        request.output.append(token)
        if token in self._stop_ids and len(request.output) > request.params.min_tokens:
            return self._stop.flush(), "stop"
        text, stopped = self._stop.push(self._text.push(token))
        if stopped:
            return text, "stop"
        if len(request.output) >= request.params.max_tokens or request.length >= self._capacity:
            return text + self._stop.flush(), "length"
        return text, None
