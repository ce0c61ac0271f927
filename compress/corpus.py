"""Text to calibrate on, text to choose a recipe by, and text to judge by, never the same.

The default is what every interpreter carries: Python's language reference (`pydoc_data.topics`, English prose) and
the sources of the standard library (code and docstrings). Documents go to one side or the other by a hash of their
name, so that the held-out side is unseen by calibration and by search. Every third document is put as an answer in the
model's chat format, if it has one, since that is how a chat model is used.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pydoc_data import topics
from typing import Literal

from serve.tokenizer import Tokenizer

DOCUMENT_CHARACTERS = 6000
MIN_DOCUMENT_CHARACTERS = 1500
CHAT_EVERY = 3
HELD_OUT_SHARE = 3  # one document in three is held out
VALIDATION_SHARE = 3  # and of the others, while a search runs, one in three is what it chooses by


Side = Literal["calibration", "validation", "held-out"]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token windows, each [window] tokens long, and the digest of the text they came from."""

    windows: list[list[int]]
    digest: str


def sides_of(path: Path | None) -> tuple[list[str], list[str]]:
    """(calibration documents, held-out documents) of a file, or of the default. Raises ValueError if it is no UTF-8."""
    if path is None:
        return default_texts()
    try:
        return split_texts(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8: {error}") from error


def sides_of_search(path: Path | None) -> tuple[list[str], list[str]]:
    """(calibration documents, validation documents) of the calibration side. Raises ValueError as `sides_of` does."""
    documents, _ = sides_of(path)
    validation = documents[VALIDATION_SHARE - 1 :: VALIDATION_SHARE]
    return [d for i, d in enumerate(documents) if i % VALIDATION_SHARE != VALIDATION_SHARE - 1], validation


def default_texts() -> tuple[list[str], list[str]]:
    """(calibration documents, held-out documents) in a fixed order."""
    documents = {f"topic/{name}": text for name, text in topics.topics.items()}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")):
        documents[f"source/{path.name}"] = path.read_text(encoding="utf-8", errors="replace")
    sides: tuple[list[str], list[str]] = ([], [])
    for name in sorted(documents):
        if len(documents[name]) >= MIN_DOCUMENT_CHARACTERS:
            held_out = hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_SHARE == 0
            sides[held_out].append(documents[name][:DOCUMENT_CHARACTERS])
    return sides


def split_texts(text: str) -> tuple[list[str], list[str]]:
    """Documents of supplied text, cut by length; every third one is held out."""
    step = DOCUMENT_CHARACTERS
    documents = [text[start : start + step] for start in range(0, len(text), step)]
    held_out = documents[HELD_OUT_SHARE - 1 :: HELD_OUT_SHARE]
    return [d for i, d in enumerate(documents) if i % HELD_OUT_SHARE != HELD_OUT_SHARE - 1], held_out


def make_corpus(texts: Sequence[str], tokenizer: Tokenizer, side: Side, *, num_windows: int, window: int) -> Corpus:
    """`num_windows` windows of `window` tokens, one from each document, in a shuffled fixed order.

    Raises ValueError if the text gives fewer.
    """
    order = shuffled(texts)
    windows = list(islice(cut_windows(order, tokenizer, window), num_windows))
    if len(windows) < num_windows:
        raise ValueError(
            f"the {side} text has {len(windows)} documents of at least {window} tokens, and --{side}-windows asks for "
            f"{num_windows}; give longer text, or less of --{side}-windows or --window"
        )
    digest = hashlib.sha256("\0".join(order).encode()).hexdigest()
    return Corpus(windows, digest)


def shuffled(texts: Sequence[str]) -> list[str]:
    """In an order that is always the same."""
    order = list(texts)
    random.Random(0).shuffle(order)
    return order


def cut_windows(texts: Sequence[str], tokenizer: Tokenizer, window: int) -> Iterator[list[int]]:
    """The first `window` tokens of each document that has as many."""
    for number, text in enumerate(texts):
        if tokenizer.has_chat_template and number % CHAT_EVERY == 0:
            question = {"role": "user", "content": "Write about: " + " ".join(text.split()[:8])}
            text = tokenizer.render_chat([question]) + text
        tokens = tokenizer.encode(text)
        if len(tokens) >= window:
            yield tokens[:window]
