"""What is judged: something that continues prompts and knows how probable a text is. Both ends of the pipeline are one.

`open_target` makes one of a checkpoint's directory or of a server's URL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from train.errors import TrainError
from train.evaluation.options import Options

Prompt = str | Sequence[Mapping[str, str]]  # a text, or a conversation for the chat template


class Unable(TrainError):
    """This target cannot be judged so: what needs it is skipped, the rest is judged."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to continue prompts. Temperature 0: always the most probable token. Nothing is cut off or penalised.

    The i-th prompt of a call is continued with seed + i by a server; a checkpoint seeds each of its batches.
    """

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Passage:
    """A text whose probability is asked for, after `context`. A conversation asks for the assistant's next answer."""

    context: Prompt
    text: str


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of the tokens of a passage's text, in nats, and of how many tokens and bytes of UTF-8.

    A first token before which nothing stands is not foretold: neither it nor its bytes are counted.
    """

    log_probability: float
    tokens: int
    num_bytes: int


@runtime_checkable
class Target(Protocol):
    def describe(self) -> dict[str, Any]:
        """What was judged, for the results; plain JSON."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """The answer to each prompt, without it, ended before a stop string. Raises TrainError if one is too long."""

    def log_likelihoods(self, passages: Sequence[Passage]) -> list[Likelihood]:
        """One per passage. Raises Unable if the target does not tell."""


@runtime_checkable
class Classifier(Protocol):
    def describe(self) -> dict[str, Any]:
        """What was judged, for the results; plain JSON."""

    labels: tuple[str, ...]

    def classify(self, texts: Sequence[str]) -> list[str]:
        """The most probable label of each text."""


def open_target(where: str | Path, options: Options) -> Target | Classifier:
    """`where`: http(s)://HOST:PORT of an OpenAI-compatible server, or a Hugging Face directory. Raises TrainError."""
    # Imported here: a server is judged without torch, a checkpoint without a client.
    if str(where).startswith(("http://", "https://")):
        from train.evaluation.server_target import ServerTarget

        return ServerTarget(str(where), options)
    config = Path(where) / "config.json"
    if not config.is_file():
        raise TrainError(f"{where} has no config.json; give a checkpoint's directory or a server's URL (http://...)")
    try:
        architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    except ValueError as error:
        raise TrainError(f"{config} is no JSON: {error}; export the checkpoint again") from error
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        from train.evaluation.classifier_target import ClassifierTarget

        return ClassifierTarget(Path(where), options)
    from train.evaluation.checkpoint_target import CheckpointTarget

    return CheckpointTarget(Path(where), options)
