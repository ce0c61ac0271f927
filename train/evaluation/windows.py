"""Log-likelihoods of texts of any length by a model of limited context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from train.errors import TrainError
from train.evaluation.targets import Likelihood, Passage
from train.evaluation.tokenization import Tokenization, prompt_tokens

LARGEST_WINDOW = 2048  # tokens, unless asked for


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that the model reads at once; those from `first` on (at least 1) are foretold."""

    tokens: list[int]
    first: int


def window_shape(length: int, stride: int, context: int) -> tuple[int, int]:
    """The length of the windows and their stride, where 0 asks for the default. Raises TrainError if it cannot be."""
    if length > context:
        raise TrainError(f"--window {length} is beyond the target's context of {context} tokens; give at most that")
    length = length or min(context, LARGEST_WINDOW)
    if stride >= length:
        raise TrainError(f"--stride {stride} must be below the window's {length} tokens; give less")
    return length, stride or length - 1


def cut(tokens: list[int], start: int, length: int, stride: int) -> list[Window]:
    """Windows of at most `length` tokens that foretell each of tokens[max(start, 1):] once.

    Each but the first begins so that it foretells `stride` tokens after `length - stride` known ones. With the stride
    length - 1 windows touch in a single token: the usual, cheapest perplexity, which is too high by what the beginnings
    of windows lack in context. A smaller stride gives more context and costs more.
    """
    foretold = max(start, 1)
    windows = []
    end = min(len(tokens), max(length, foretold + stride))
    begin = max(0, end - length)
    while foretold < end:
        windows.append(Window(tokens[begin:end], foretold - begin))
        foretold = end
        begin = end + stride - length
        end = min(len(tokens), end + stride)
    return windows


def log_likelihoods(
    passages: Sequence[Passage],
    tokenization: Tokenization,
    score: Callable[[list[Window]], list[float]],
    length: int,
    stride: int,
) -> list[Likelihood]:
    """`score` gives the sum of the log-probabilities (nats) of the tokens that each window foretells.

    A text after a context is tokenized by itself, as if it had been generated.
    """
    windows: list[Window] = []
    parts: list[tuple[slice, int, int]] = []  # of each passage: its windows, tokens, bytes
    for passage in passages:
        num_bytes = len(passage.text.encode())
        if passage.context:
            known = prompt_tokens(tokenization, passage.context)
            tokens = known + tokenization.encode(passage.text, special=False)
            start = len(known)
        else:
            tokens, start = tokenization.encode(passage.text, special=True), 1
            if tokens:
                # A byte that is no character by itself is decoded as U+FFFD; a special token as nothing.
                num_bytes -= len(tokenization.decode(tokens[:1]).replace("\ufffd", "?").encode())
        made = cut(tokens, start, length, stride)
        parts.append((slice(len(windows), len(windows) + len(made)), max(0, len(tokens) - start), num_bytes))
        windows += made
    sums = score(windows)
    return [Likelihood(sum(sums[which]), tokens, num_bytes) for which, tokens, num_bytes in parts]
